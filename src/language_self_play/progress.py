"""Watching a run while it plays: a live bar on a terminal, plain lines elsewhere. Never torch.

Both count the steps that are played, 1 to S; records and files are numbered 0 to S − 1, as are the
versions of the weights that evaluations are of.
"""

from __future__ import annotations

import re
import sys
import textwrap
import time
from collections.abc import Mapping
from typing import IO, Any, Protocol

from language_self_play.config import Config
from language_self_play.run_folder import Record

MAX_SHOWN = 60
WIN_RATE = "/win_rate"  # how its metric ends
ENDING = "all steps are played: the last evaluation, then the model to disk"


class Progress(Protocol):
    """What the loop tells a watcher."""

    def __enter__(self) -> Progress: ...

    def __exit__(self, *error: object) -> None: ...

    def step(self, record: Record, games: list[Record]) -> None:
        """A step has been recorded; the last record has no games."""


def build_progress(config: Config, start: int, first: Record | None = None) -> Progress:
    """The watcher that config.log asks for, for a run that plays from step `start`.

    `first` is the record of step 0, if there is one: what evaluations are compared with.
    """
    kind = config.log.progress
    if kind == "auto":
        kind = "bar" if sys.stdout.isatty() else "plain"
    if kind == "none":
        return Silent()
    return (LiveBar if kind == "bar" else PlainLines)(
        config.steps, start, config.log.game_every_s, first=first
    )


class Silent:
    """Shows nothing."""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def step(self, record: Record, games: list[Record]) -> None:
        pass


class PlainLines(Silent):
    """Every few seconds a line of numbers and one game; for logs."""

    def __init__(
        self,
        steps: int,
        start: int,
        every_s: float,
        out: IO[str] | None = None,
        first: Record | None = None,
    ):
        self.steps = steps
        self.start = start
        self.every_s = every_s
        self.out = out or sys.stdout
        self.began = time.monotonic()
        self.shown = float("-inf")
        self.state: Record = {}
        self.of_step: dict[str, int] = {}  # each number's
        self.is_read = True
        self.first = first or {}

    def step(self, record: Record, games: list[Record]) -> None:
        self.state |= record
        self.of_step |= dict.fromkeys(record, int(record["step"]))
        self.first = self.first or record
        now = time.monotonic()
        finished = record["step"] >= self.steps - 1
        if not self.is_read or (now - self.shown < max(self.every_s, 1.0) and not finished):
            return
        self.shown = now
        played = min(record["step"] + 1, self.steps)  # the last record is of no step
        said = [f"step {played}/{self.steps}", headline(self.state, self.first, self.of_step)]
        if played < self.steps:
            left = (now - self.began) / (played - self.start) * (self.steps - played)
            said.insert(1, f"{_duration(left)} left")
        lines = ["  ".join(filter(None, said))]
        if times := time_line(record):
            lines.append(f"    {times}")
        if self.every_s and (game := choose_game(games)):
            lines.append(f"    {game_line(game, is_judged(record))}")
        if record["step"] + 1 == self.steps:
            lines.append(ENDING)
        try:
            print("\n".join(lines), file=self.out, flush=True)
        except OSError:
            self.is_read = False  # the reader has left, its disk is full: the run is worth more


class LiveBar(Silent):
    """A bar, below it the numbers that matter, and every few seconds one game above it."""

    def __init__(
        self,
        steps: int,
        start: int,
        every_s: float,
        console: Any = None,
        first: Record | None = None,
    ):
        from rich.console import Console
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self.every_s = every_s
        self.shown = time.monotonic()
        self.state: Record = {}
        self.of_step: dict[str, int] = {}  # each number's
        self.newest: Record = {}
        self.is_ending = (
            False  # all steps are played; the last evaluation and the model are to come
        )
        self.first = first or {}
        self.console = console or Console()
        self.bar = RichProgress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            expand=True,
        )
        self.task = self.bar.add_task("play", total=steps, completed=start)
        self.live = Live(self._view(), console=self.console, refresh_per_second=4)

    def __enter__(self) -> Progress:
        self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.is_ending = False
        self.live.update(self._view())
        self.live.stop()

    def _view(self) -> Any:
        from rich.console import Group
        from rich.text import Text

        said = [headline(self.state, self.first, self.of_step), time_line(self.newest)]
        if self.is_ending:
            said.append(ENDING)
        lines = [line for text in said for line in in_lines(text, self.console.width)]
        return Group(self.bar, *(Text(line, overflow="fold") for line in lines))

    def step(self, record: Record, games: list[Record]) -> None:
        from rich.text import Text

        self.state |= record
        self.of_step |= dict.fromkeys(record, int(record["step"]))
        self.newest = record  # its parts alone add up to its time
        self.first = self.first or record
        total = int(self.bar.tasks[0].total or 0)
        self.is_ending = record["step"] + 1 == total
        self.bar.update(self.task, completed=min(record["step"] + 1, total))
        self.live.update(self._view())
        now = time.monotonic()
        if self.every_s and now - self.shown >= self.every_s and (game := choose_game(games)):
            self.shown = now
            text = Text(f"{record['step'] + 1:>6}  ", style="dim")
            for piece, style in game_pieces(game, is_judged(record)):
                text.append(piece, style)
            self.console.print(text, overflow="ellipsis", no_wrap=True)


# ---------------------------------------------------------------- words


def headline(
    record: Record, first: Record | None = None, steps: Mapping[str, int] | None = None
) -> str:
    """The numbers that matter: accuracies and win rates, V̄, V_Q, KL of both roles, validity.

    An evaluation stands with its difference to that of the record `first`, in percentage points, and with
    the version of the weights that it is of, where `steps` has an older step than the record's.
    """
    parts = []
    for key, name in evaluations(record).items():
        before = (first or {}).get(key)
        notes = [] if before in (None, record[key]) else [f"{100 * (record[key] - before):+.1f}"]
        notes += _notes(record, key, steps or {})
        parts.append(f"{name} {record[key]:.1%}" + (f" ({', '.join(notes)})" if notes else ""))
    if "reward/mean" in record:
        parts.append(f"V̄ {record['reward/mean']:.2f}")
    if "quality/mean" in record:
        parts.append(f"V_Q {record['quality/mean']:.2f}")
    kls = [f"{record[k]:.3f}" for k in ("kl/solver", "kl/challenger") if k in record]
    if kls:
        parts.append(f"KL {'/'.join(kls)}")
    if "queries/valid_fraction" in record:
        parts.append(f"valid {record['queries/valid_fraction']:.0%}")
    if "queries/unsolvable_fraction" in record:
        parts.append(f"unsolvable {record['queries/unsolvable_fraction']:.0%}")
    return "  ".join(parts)


def _notes(record: Record, key: str, steps: Mapping[str, int]) -> list[str]:
    """Which version an evaluation is of, if not the record's; of a win rate the pairs that nobody judged."""
    step = steps.get(key, record["step"])
    notes = [] if step == record["step"] else [f"version {step}"]
    if not key.endswith(WIN_RATE):
        return notes
    of_set = key.removesuffix(WIN_RATE)
    if (newest := steps.get(f"{of_set}/unjudged", step)) != step:
        return [*notes, f"no verdict of version {newest}"]
    if equal := record.get(f"{of_set}/equal_answers"):
        notes.append(f"{equal:.0%} of pairs equal, not asked")
    if unjudged := record.get(f"{of_set}/unjudged"):
        notes.append(f"{unjudged:.0%} without a verdict")
    return notes


def evaluations(record: Record) -> dict[str, str]:
    """Metric -> name, of what was evaluated: the arena, question sets, win rates, lm-eval's accuracies."""
    found = {"eval/sampled_accuracy": "held-out"} if "eval/sampled_accuracy" in record else {}
    for key in record:
        _, _, name = key.partition("eval/")
        if name.startswith("harness/"):
            if name.endswith(("/acc", "/exact_match")):
                found[key] = name.removeprefix("harness/").replace("/", " ")
        elif name.endswith("/accuracy"):
            found[key] = name.removesuffix("/accuracy")
        elif name.endswith(WIN_RATE):
            found[key] = f"{name.removesuffix(WIN_RATE)} win rate"
    return found


# What a step's time goes into, in the order in which it happens.
PARTS = {
    "sample_challenger": "pose",
    "sample_solver": "answer",
    "reward": "reward",
    "quality": "judge",
    "learn": "learn",
    "sync": "sync",
    "eval": "eval",
    "checkpoint": "save",
    "other": "other",
}


def time_line(record: Record) -> str:
    """Where the step's time went, parts below a hundredth left out; tokens per second; peak memory."""
    if "time/step_s" not in record:
        return ""
    step_s = record["time/step_s"]
    parts = [
        f"{word} {record[key] / step_s:.0%}"
        for part, word in PARTS.items()
        if record.get(key := f"time/{part}_s", 0.0) >= 0.01 * step_s
    ]
    line = f"{step_s:.3g} s a step: {', '.join(parts)}"
    if "time/tokens_per_s" in record:
        line += f"  {record['time/tokens_per_s']:,.0f} tokens/s"
    if "memory/peak_gib" in record:
        line += f"  {record['memory/peak_gib']:.2f} GiB"
    return line


def in_lines(text: str, width: int) -> list[str]:
    """`text` in lines of at most `width`, broken between its parts (two spaces, a comma), not within one."""
    parts = re.sub(r"(?<![, ]) (?! )", "\0", text)
    return [line.replace("\0", " ") for line in textwrap.wrap(parts, width, break_on_hyphens=False)]


def choose_game(games: list[Record]) -> Record | None:
    """The game worth showing: the first whose answers differ in reward, else the first answered."""
    answered = [game for game in games if is_scored(game)]
    for game in answered:
        if len({answer["reward"] for answer in game["answers"]}) > 1:
            return game
    return answered[0] if answered else None


def is_scored(game: Record) -> bool:
    """Whether it has answers, all with finite scores: those that are not stand as null."""
    scores = [answer.get(what, 0.0) for answer in game["answers"] for what in ("reward", "quality")]
    return bool(scores) and None not in scores


def two_answers(game: Record) -> list[Record]:
    """The best and the worst answer by reward."""
    ranked = sorted(game["answers"], key=lambda a: a["reward"], reverse=True)
    return ranked[:1] if len(ranked) == 1 else [ranked[0], ranked[-1]]


def is_judged(record: Record) -> bool:
    """Whether its step has a quality self-reward: that of LSP, not of LSP-Zero or GRPO."""
    return "quality/mean" in record


def game_pieces(game: Record, judged: bool = True) -> list[tuple[str, str]]:
    """One game as (text, rich style) pieces: query, two answers, their scores; R_Q where `judged`."""
    pieces = [(printable(game["query"]), "bold"), ("  →  ", "dim")]
    for i, answer in enumerate(two_answers(game)):
        style = "green" if answer["reward"] > 0 else "red"
        quality = f", R_Q {answer['quality']:.2f}" if judged else ""
        scores = f" (R {answer['reward']:.2g}{quality})"
        pieces += [("  |  ", "dim")] if i else []
        pieces += [(printable(answer["text"]), style), (scores, "dim")]
    rewards = [a["reward"] for a in game["answers"]]
    return [*pieces, (f"   V {sum(rewards) / len(rewards):.2f}", "dim")]


def game_line(game: Record, judged: bool = True) -> str:
    return "".join(piece for piece, _ in game_pieces(game, judged))


def printable(text: str, limit: int = MAX_SHOWN) -> str:
    """`text` on one line of at most `limit` characters; what could steer a terminal is escaped."""
    if not text:
        return "∅"
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[: limit + 1])
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
