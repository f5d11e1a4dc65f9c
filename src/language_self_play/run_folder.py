"""The run folder: plain files that hold everything a run did, and nothing else does.

    config.toml  metrics.jsonl  events.jsonl  games/step-000012.jsonl  evaluations/step-000100.jsonl
    checkpoints/  model/  run.lock

docs/run-folder.md tells what each is, what is atomic, and how to recover. Values that can't be
reproduced stand under `time/` or `memory/`; metrics and games hold no timestamps, so that a resumed
run's folder is the uninterrupted run's.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NoReturn

from language_self_play.config import Config, with_other_engine
from language_self_play.durable import PASSING, append_text, replace_text
from language_self_play.errors import ConfigError, NonFiniteError, Paused, RunFolderError
from language_self_play.recipe_files import load_toml

Record = dict[str, Any]
# What of a trained model a run holds: all its weights, or its adapter alone.
Part = Literal["model", "adapter"]

# What a resumed run may change: how long it runs, cadences, when it stops, how much memory it takes, and,
# on purpose, the device.
RESUMABLE = (
    *("steps", "eval.every", "checkpoint.", "guard.", "log.", "device", "distributed."),
    *("learner.tokens_per_micro_batch", "rollout.batch_size", "rollout.vllm."),
)

# What is left open in a recipe, and written to config.toml as it was resolved.
RESOLVED = ("threads", "dtype", "device")

# Steps whose records may wait for a disk that can't take them, before the run stops. They are paid
# for again in any case where no checkpoint can be written; a passing fault is over sooner.
UNWRITTEN_STEPS = 20


class RunFolder:
    """Writes and reads one run's folder."""

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        self.config_file = self.folder / "config.toml"
        self.metrics_file = self.folder / "metrics.jsonl"
        self.events_file = self.folder / "events.jsonl"
        self.games_folder = self.folder / "games"
        self.evaluations_folder = self.folder / "evaluations"
        self.checkpoints_folder = self.folder / "checkpoints"
        self.model_folder = self.folder / "model"
        self.adapter_folder = self.folder / "adapter"
        self.own = self  # what this process alone reads and writes
        self._unwritten: list[tuple[dict[Path, str], str]] = []  # files of a step, its record
        self._untold: list[str] = []  # events
        self._warned: dict[str, int] = {}  # what couldn't be written -> the error's number

    @classmethod
    def holding(cls, path: Path) -> RunFolder | None:
        """The run that `path` is, or lies in: its model/ or adapter/, or a checkpoint's, or its shards/."""
        within = path.name in ("model", "adapter", "shards")
        inside = within and path.parent.parent.name == "checkpoints"
        above = path.parent.parent.parent if inside else path.parent
        for folder in (path, above) if within else (path,):
            run = cls(folder)
            if os.path.isfile(run.config_file) and run.checkpoints_folder.is_dir():
                return run
        return None

    @property
    def resume_command(self) -> str:
        """What to type to go on with the run."""
        return f"{command_name()} train --resume {shlex.quote(str(self.folder))}"

    def has_finished(self, steps: int) -> bool:
        """Whether `steps` steps are played and their model is there."""
        last: Record = {}
        with suppress(OSError, ValueError):  # a torn line is no end
            lines = self.events_file.read_text("utf-8").splitlines()
            last = next((json.loads(line) for line in reversed(lines) if line.endswith("}")), {})
        ended = last.get("event") == "finished" and last.get("step") == steps
        return ended and self.model_folder.is_dir()

    def newest_model(self) -> Path:
        """model/, or the newest checkpoint's where the run has not finished. Raises RunFolderError."""
        if self.model_folder.is_dir():
            return self.model_folder
        for checkpoint in reversed(self.checkpoints()):
            for part in ("model", "adapter", "shards"):
                if (checkpoint / part).is_dir():
                    return checkpoint / part
        raise RunFolderError(
            f"{self.folder}: has no model yet, as no checkpoint has been written;"
            f" go on with the run by: {self.resume_command}"
        )

    def checkpoints(self) -> list[Path]:
        """The folders checkpoints/step-…, whole or damaged, oldest first."""
        found = self.checkpoints_folder.glob("step-*")
        named = [f for f in found if re.fullmatch(r"step-\d+", f.name) and f.is_dir()]
        return sorted(named, key=step_of)

    def refuse_if_used(self) -> None:
        """Raises RunFolderError if a run is already here, or no folder can be."""
        place = next(p for p in (self.folder, *self.folder.parents) if os.path.exists(p))
        named = "" if place == self.folder else f" {place.absolute()}"
        if not place.is_dir():
            raise RunFolderError(
                f"{self.folder}:{named} is a file; a run needs a folder of its own"
            )
        if not os.access(place, os.W_OK | os.X_OK):
            raise RunFolderError(
                f"{self.folder}:{named} can't be written; choose another folder by --run"
            )
        if os.path.exists(self.config_file) or os.path.exists(self.metrics_file):
            raise RunFolderError(
                f"{self.folder}: already holds a run; go on with it by --resume {self.folder},"
                " or choose another folder by --run"
            )

    def create(self, config: Config) -> None:
        """Make the folder and write its config.toml, which makes it a run. Raises RunFolderError."""
        with _Sentences(self.folder):
            self.games_folder.mkdir(parents=True, exist_ok=True)
            self.checkpoints_folder.mkdir(exist_ok=True)
        self.refuse_if_used()
        self.write_config(config)

    def write_config(self, config: Config) -> None:
        with _Sentences(self.folder):
            replace_text(self.config_file, config.to_toml())

    def config(self) -> dict[str, Any]:
        """The table of config.toml. Raises RunFolderError if there is no run here."""
        if not os.path.isfile(self.config_file):
            raise RunFolderError(f"{self.folder}: no run here (there is no config.toml)")
        if not (table := load_toml(self.config_file)):
            raise RunFolderError(
                f"{self.config_file}: holds no settings, as if the disk had lost them; put back a copy of"
                " it, or start a new run"
            )
        return table

    def resumed_config(self, overrides: Mapping[str, Any]) -> Config:
        """The run's configuration with `overrides`. Raises ConfigError as refuse_changes does."""
        table = with_other_engine(self.config(), overrides)
        config = Config.from_table(table, overrides, self.config_file)
        self.refuse_changes(config)
        return config

    def _began_with(self) -> Config:
        return Config.from_table(self.config(), file=self.config_file)

    def refuse_changes(self, config: Config) -> None:
        """Raises ConfigError if `config` changes more of this run than what RESUMABLE names."""
        before = flatten(self._began_with().model_dump())
        now = flatten(config.model_dump())
        for name in dict.fromkeys([*now, *before]):
            value = now.get(name)
            # Unset, they are what they were when the run began.
            unset = name in RESOLVED and value in (None, "auto")
            if value != before.get(name) and not unset and not may_change(name):
                raise ConfigError(
                    f"{name} = {value!r}: was {before.get(name)!r} when the run began, and a resumed"
                    f" run may change only {', '.join(RESUMABLE)}; start a new run instead"
                )
        if config.steps != before["steps"] and config.learner.schedule != "constant":
            raise ConfigError(
                f"steps = {config.steps}: was {before['steps']!r} when the run began, and with"
                f" learner.schedule = {config.learner.schedule!r} every learning rate would have been"
                " another; start a new run instead"
            )

    def as_resolved(self, config: Config) -> Config:
        """`config` with what it leaves open as it was when the run began."""
        before = self._began_with()
        left_open = [name for name in RESOLVED if getattr(config, name) in (None, "auto")]
        return config.model_copy(update={name: getattr(before, name) for name in left_open})

    def record(self, record: Record, games: list[Record], questions: Sequence[Record] = ()) -> None:
        """Append one step's metrics, and write its games and the questions of its evaluation.

        What the disk can't take now (a reason in durable.PASSING) is kept, and written with the next
        step's. Raises Paused once more than UNWRITTEN_STEPS wait; RunFolderError for other reasons.
        """
        step = record["step"]
        files = {self._games_file(step): games, self._evaluation_file(step): questions}
        texts = {file: "".join(map(_json_line, rows)) for file, rows in files.items() if rows}
        self._unwritten.append((texts, _json_line(record)))
        try:
            self.flush()
        except RunFolderError as error:
            self.tolerate("records", error, "the run goes on and tries again at each step")
            if len(self._unwritten) > UNWRITTEN_STEPS:
                self.stop(error)

    def flush(self) -> None:
        """Write the records that wait, games and questions first. Raises RunFolderError."""
        while self._unwritten:
            files, line = self._unwritten[0]
            with _Sentences(self.folder):
                for file, text in files.items():
                    if not file.parent.exists():
                        file.parent.mkdir()
                    replace_text(file, text)
                append_text(self.metrics_file, line)
            del self._unwritten[0]
        self.written("records")

    def tolerate(self, what: str, error: RunFolderError, meanwhile: str) -> None:
        """Go on without `what`, as `meanwhile` says, where `error` may pass; raises it otherwise.

        It is told in events.jsonl each time, and in a warning once a reason.
        """
        if error.errno not in PASSING:
            raise error
        self.event("unwritten", what=what, reason=str(error))
        if self._warned.get(what) != error.errno:
            self._warned[what] = error.errno
            warnings.warn(f"{error}; {meanwhile}; {PASSING[error.errno]}", stacklevel=3)

    def written(self, what: str) -> None:
        """The opposite: the next time that `what` can't be written is worth a warning again."""
        self._warned.pop(what, None)

    def stop(self, error: RunFolderError) -> NoReturn:
        """End a run whose folder can't be written, resumable from its newest checkpoint."""
        newest = step_of(self.checkpoints()[-1]) if self.checkpoints() else 0
        self.event("paused", step=newest, reason=str(error))
        advice = PASSING.get(error.errno or 0, "see to that")
        raise Paused(
            f"paused, {error}; {newest} steps are safe; {advice}, then go on with:"
            f" {self.resume_command}"
        )

    def event(self, kind: str, **details: Any) -> None:
        """Append to events.jsonl what happened outside the game (started, paused, resumed, …).

        What the disk can't take now comes with the next event. Raises RunFolderError otherwise.
        """
        event = {"time": round(time.time(), 3), "event": kind, **details}
        self._untold.append(_json_line(event))
        try:
            with _Sentences(self.folder):
                append_text(self.events_file, "".join(self._untold))
        except RunFolderError as error:
            if error.errno not in PASSING:
                raise
        else:
            self._untold.clear()

    def metrics(self) -> Iterator[Record]:
        """The records so far, in order. An unfinished last line is passed over."""
        if not self.metrics_file.is_file():
            return
        with self.metrics_file.open(encoding="utf-8", newline="\n") as lines:
            for number, line in enumerate(lines, 1):
                if line.endswith("\n"):
                    yield _parse_line(line, self.metrics_file, number)

    def games(self, step: int) -> list[Record]:
        """The games of a step; empty if it has none."""
        return _read_lines(self._games_file(step))

    def evaluation(self, step: int) -> list[Record]:
        """Every question of the evaluation of weights version `step`; empty if there was none."""
        return _read_lines(self._evaluation_file(step))

    def evaluated_steps(self) -> list[int]:
        """The versions that were evaluated question by question, in order."""
        return sorted(map(step_of, self.evaluations_folder.glob("step-*.jsonl")))

    def truncate(self, step: int) -> None:
        """Drop the records, games and evaluations of `step` and later, as if the run had just reached it.

        Lines that were torn or damaged after that don't matter. One before is left out, with a
        warning, and metrics.damaged.jsonl keeps the file as it was. Raises RunFolderError.
        """
        kept, damaged = self._lines_before(step)
        with _Sentences(self.folder):
            if damaged:
                copy = self.metrics_file.with_name("metrics.damaged.jsonl")
                shutil.copyfile(self.metrics_file, copy)
                warnings.warn(
                    f"{self.metrics_file}: no record in line {', '.join(map(str, damaged))}; going"
                    f" on without, {copy.name} keeps the file as it was",
                    stacklevel=2,
                )
            replace_text(self.metrics_file, "".join(kept))
            for folder in (self.games_folder, self.evaluations_folder):
                for file in folder.glob("step-*.jsonl"):
                    if step_of(file) >= step:
                        file.unlink()

    def _lines_before(self, step: int) -> tuple[list[str], list[int]]:
        """The lines of metrics.jsonl with records before `step`, and the numbers of damaged ones."""
        kept: list[str] = []
        damaged: list[int] = []
        if not self.metrics_file.is_file() or step == 0:
            return kept, damaged
        with self.metrics_file.open(encoding="utf-8", errors="replace", newline="\n") as lines:
            for number, line in enumerate(lines, 1):
                found = _step_in(line)
                if found is None:
                    damaged.append(number)
                elif found < step:
                    kept.append(line)
                if found is not None and found >= step - 1:
                    break
        return kept, damaged

    def _games_file(self, step: int) -> Path:
        return self.games_folder / f"step-{step:06d}.jsonl"

    def _evaluation_file(self, step: int) -> Path:
        return self.evaluations_folder / f"step-{step:06d}.jsonl"


class _Sentences:
    """Turns an OSError of the file system into one sentence."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError) and not isinstance(error, RunFolderError):
            raise unwritable(error.filename or self.folder, error) from None


def unwritable(place: str | Path, error: OSError) -> RunFolderError:
    """The sentence for an OSError of the file system, with its errno."""
    sentence = RunFolderError(f"{place}: can't be written ({error.strerror})")
    sentence.errno = error.errno
    return sentence


def may_change(name: str) -> bool:
    """Whether a resumed run may change the setting: RESUMABLE names it, or it is an evaluation's cadence."""
    return name.startswith(RESUMABLE) or (name.startswith("eval.") and name.endswith(".every"))


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint or a games file."""
    return int(path.stem.removeprefix("step-"))


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested table with dotted names."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def free_run_folder(name: str, root: Path = Path("runs")) -> Path:
    """runs/NAME, or runs/NAME-2, … : the first that does not exist."""
    candidate, number = root / name, 1
    while candidate.exists():
        number += 1
        candidate = root / f"{name}-{number}"
    return candidate


def _step_in(line: str) -> int | None:
    """The step of a whole line of metrics.jsonl; None if it is torn or damaged."""
    try:
        step = json.loads(line)["step"] if line.endswith("\n") else None
    except (ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None


def _read_lines(file: Path) -> list[Record]:
    """The objects of a file of JSON lines; empty if it is not there. Raises RunFolderError."""
    if not file.is_file():
        return []
    # Not splitlines: a text may hold U+2028 and its like, which are no ends of JSON lines.
    lines = file.read_text("utf-8").split("\n")
    return [_parse_line(line, file, n) for n, line in enumerate(lines, 1) if line]


def command_name() -> str:
    """`lsp`, or how this process was started where the shell would not find it."""
    started = sys.argv[0]
    if shutil.which("lsp") or os.path.basename(started) != "lsp":
        return "lsp"
    return os.path.relpath(started)


def _parse_line(line: str, file: Path, number: int) -> Record:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise RunFolderError(f"{file}:{number}: damaged, not a JSON object ({error.msg})") from None


def _json_line(record: Record) -> str:
    try:
        line = json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
        # Half a surrogate pair has no UTF-8; escaped it has.
        return line if line.isascii() or _has_utf8(line) else json.dumps(record) + "\n"
    except ValueError:
        bad = [k for k, v in record.items() if isinstance(v, float) and not math.isfinite(v)]
        raise NonFiniteError(
            f"step {record.get('step')}: {', '.join(bad) or 'a game'} is not finite"
        ) from None


def _has_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
