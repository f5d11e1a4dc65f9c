"""What a finished run has to say for itself, read from its folder. Never torch."""

from __future__ import annotations

import shlex
from functools import cache, partial
from typing import Any

from language_self_play.arena.tasks import TIERS
from language_self_play.evaluate.outcomes import set_intervals
from language_self_play.evaluate.win_rate import win_rate_interval
from language_self_play.progress import WIN_RATE, evaluations, game_pieces, is_judged, is_scored
from language_self_play.run_folder import Record, RunFolder, command_name
from language_self_play.wording import counted


def print_summary(run: RunFolder, console: Any) -> None:
    """Accuracy before and after, three games, where the run is, what to do next."""
    from rich.text import Text

    records = list(run.metrics())
    evaluations = [r for r in records if "eval/sampled_accuracy" in r]
    if len(evaluations) >= 2:
        console.print(accuracy_table(evaluations[0], evaluations[-1]))
    for line in changes_of_sets(run, records):
        console.print(f"\n{line}", highlight=False, markup=False)
    games = three_games(run, records)
    if games:
        note = " (numbers are answered units first)" if "tier" in games[0] else ""
        console.print(f"\nThree games of the last step, easiest query first{note}:")
        judged = any(is_judged(record) for record in records)
        for game in games:
            text = Text("  ")
            for piece, style in game_pieces(game, judged):
                text.append(piece, style)
            console.print(text)
    folder, lsp = shlex.quote(str(run.folder)), command_name()
    next_commands = [
        ("watch the model play both roles; --answer joins in", f"play {folder}"),
        ("play on", f"train --resume {folder} --steps {2 * run.config()['steps']}"),
    ]
    if any("tier" in game for game in games):
        next_commands[1:] = [("its accuracy by tier and task", f"eval accuracy {folder}")]
        if any(is_judged(record) for record in records):
            next_commands.append(
                ("the game without self-reward, to see what that is for", "train arena-zero")
            )
    lines = [f"\nThe run is in {folder}: config, metrics, games, checkpoints, model. Next:"]
    lines += [f"  {what}:\n    {lsp} {command}" for what, command in next_commands]
    console.print("\n".join(lines), highlight=False, markup=False, emoji=False, soft_wrap=True)


def accuracy_table(before: Record, after: Record) -> Any:
    """Held-out accuracy by tier, sampled and greedy, with 95 % intervals and the change."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(
        box=SIMPLE_HEAD,
        title="Held-out accuracy in %, ± half of a 95 % interval",
        padding=(0, 1),
        pad_edge=False,
    )
    table.add_column("tier", no_wrap=True)
    for kind in ("sampled", "greedy"):
        for when in ("before", "after"):
            table.add_column(f"{kind}\n{when}", justify="right", no_wrap=True)
        table.add_column("\nchange", justify="right", no_wrap=True)
    for tier in (*TIERS, None):
        suffix = f"/{tier}" if tier else ""
        if f"eval/sampled_accuracy{suffix}" not in before:
            continue
        cells = []
        for kind in ("sampled", "greedy"):
            values = [
                (r[f"eval/{kind}_accuracy{suffix}"], r[f"eval/{kind}_accuracy_ci95{suffix}"])
                for r in (before, after)
            ]
            cells += [f"{100 * mean:.1f} ± {100 * half:.1f}" for mean, half in values]
            cells.append(f"{100 * (values[1][0] - values[0][0]):+.1f}")
        table.add_row(tier or "all", *cells, style=None if tier else "bold")
    return table


def changes_of_sets(run: RunFolder, records: list[Record]) -> list[str]:
    """A line for each set: accuracy or win rate at its first and its last evaluation, and the change."""
    lines = []
    asked = cache(partial(_questions, run))
    for key, name in evaluations({k: None for record in records for k in record}).items():
        measured = [r for r in records if key in r and f"{key}_ci95" in r]
        if key == "eval/sampled_accuracy" or not measured:
            continue
        first, last = measured[0], measured[-1]
        unjudged = f"{key.removesuffix(WIN_RATE)}/unjudged"
        in_vain = [r["step"] for r in records if r["step"] > last["step"] and unjudged in r]
        said = [_stated(asked(first["step"]), first, key)]
        if first is not last:
            change = 100 * (last[key] - first[key])
            said += [_stated(asked(last["step"]), last, key), f"{change:+.1f}"]
        said += [f"no verdict at step {in_vain[-1]}"] if in_vain else []
        if len(said) > 1:
            what = f"{name}, accuracy" if key.endswith("/accuracy") else name
            lines.append(f"{what} in %: {', '.join(said)}")
    return lines


def _questions(run: RunFolder, step: int) -> dict[str, list[Record]]:
    """The questions of each set that version `step` was asked; none where their file is damaged."""
    sets: dict[str, list[Record]] = {}
    try:
        for question in run.evaluation(step):
            sets.setdefault(question["set"], []).append(question)
    except (OSError, ValueError, TypeError, KeyError):
        return {}
    return sets


def _stated(sets: dict[str, list[Record]], record: Record, key: str) -> str:
    """An evaluation with its 95 % interval, as `lsp eval` states it; of a win rate what was not judged.

    lm-eval's, and what has no questions (any more), with half of it as its record has it.
    """
    name = key.removeprefix("eval/").rpartition("/")[0]
    questions = sets.get(name)
    interval, notes = f" ± {100 * record[f'{key}_ci95']:.1f}", []
    if key.endswith(WIN_RATE) and questions:
        preferences = [q["preference"] for q in questions if q["preference"] is not None]
        low, high = win_rate_interval(preferences)
        equal = sum(q["answer"] == q["baseline"] for q in questions)
        # Where all are equal nothing was measured: it is a half, whatever the prompts.
        interval = "" if equal == len(questions) else f" [{low:.1f}, {high:.1f}]"
        notes += [f"{equal} of {counted(len(questions), 'pair')} equal, not asked"] if equal else []
        without = len(questions) - len(preferences)
        notes += [f"{without} without a verdict"] if without else []
    elif questions:
        found = set_intervals(name, questions, [1])[key]
        interval = f" [{100 * found.low:.1f}, {100 * found.high:.1f}]"
    noted = f" ({'; '.join(notes)})" if notes else ""
    return f"{100 * record[key]:.1f}{interval} at step {record['step']}{noted}"


def three_games(run: RunFolder, records: list[Record]) -> list[Record]:
    """From the last step that has games: those of the highest, the middle and the lowest value."""
    for record in reversed(records):
        answered = [game for game in run.games(record["step"]) if is_scored(game)]
        if answered:
            answered.sort(key=lambda g: -sum(a["reward"] for a in g["answers"]))
            places = sorted({0, len(answered) // 2, len(answered) - 1})
            return [answered[i] for i in places]
    return []
