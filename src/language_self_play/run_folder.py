"""The run folder: plain files that hold everything a run did, and nothing else does.

    config.toml  metrics.jsonl  events.jsonl  games/step-000012.jsonl  checkpoints/  model/

Values that can't be reproduced stand under `time/` or `memory/`; metrics and games hold no
timestamps, so that a resumed run's folder is the uninterrupted run's.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from language_self_play.config import Config
from language_self_play.errors import ConfigError, NonFiniteError, RunFolderError
from language_self_play.recipe_files import load_recipe, merge

Record = dict[str, Any]
# What of a trained model a run holds: all its weights, or its adapter alone.
Part = Literal["model", "adapter"]

# What a resumed run may change: how long it runs, and cadences.
RESUMABLE = ("steps", "eval.every", "checkpoint.", "log.")


class RunFolder:
    """Writes and reads one run's folder."""

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        self.config_file = self.folder / "config.toml"
        self.metrics_file = self.folder / "metrics.jsonl"
        self.events_file = self.folder / "events.jsonl"
        self.games_folder = self.folder / "games"
        self.checkpoints_folder = self.folder / "checkpoints"
        self.model_folder = self.folder / "model"
        self.adapter_folder = self.folder / "adapter"

    @classmethod
    def holding(cls, path: Path) -> RunFolder | None:
        """The run that `path` is, or lies in: its model/ or adapter/, or a checkpoint's."""
        within = path.name in ("model", "adapter")
        inside = within and path.parent.parent.name == "checkpoints"
        above = path.parent.parent.parent if inside else path.parent
        for folder in (path, above) if within else (path,):
            if (run := cls(folder)).config_file.is_file() and run.checkpoints_folder.is_dir():
                return run
        return None

    def newest_model(self) -> Path:
        """model/, or the newest checkpoint's where the run has not finished."""
        checkpoints = self.checkpoints_folder
        models = sorted([*checkpoints.glob("step-*/model"), *checkpoints.glob("step-*/adapter")])
        return models[-1] if models and not self.model_folder.is_dir() else self.model_folder

    def refuse_if_used(self) -> None:
        """Raises RunFolderError if a run is already here, or something that is no folder."""
        if self.folder.exists() and not self.folder.is_dir():
            raise RunFolderError(f"{self.folder}: is a file; a run needs a folder of its own")
        if self.config_file.exists() or self.metrics_file.exists():
            raise RunFolderError(
                f"{self.folder}: already holds a run; go on with it by --resume {self.folder},"
                " or choose another folder by --run"
            )

    def create(self, config: Config) -> None:
        """Make the folder and write its config.toml. Raises RunFolderError."""
        with _Sentences(self.folder):
            self.games_folder.mkdir(parents=True, exist_ok=True)
            self.checkpoints_folder.mkdir(exist_ok=True)
            try:
                self.config_file.touch(exist_ok=False)  # of two processes one gets the folder
            except FileExistsError:
                self.refuse_if_used()
        self.write_config(config)

    def write_config(self, config: Config) -> None:
        with _Sentences(self.folder):
            replace_text(self.config_file, config.to_toml())

    def config(self) -> dict[str, Any]:
        """The table of config.toml. Raises RunFolderError if there is no run here."""
        if not self.config_file.is_file():
            raise RunFolderError(f"{self.folder}: no run here (there is no config.toml)")
        return load_recipe(self.config_file)

    def resumed_config(self, overrides: Mapping[str, Any]) -> Config:
        """The run's configuration with `overrides`. Raises ConfigError as refuse_changes does."""
        config = Config.from_table(merge(self.config(), overrides))
        self.refuse_changes(config)
        return config

    def refuse_changes(self, config: Config) -> None:
        """Raises ConfigError if `config` changes more of this run than what RESUMABLE names."""
        before = flatten(Config.from_table(self.config()).model_dump())
        for name, value in flatten(config.model_dump()).items():
            if value != before.get(name) and not name.startswith(RESUMABLE):
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

    def record(self, record: Record, games: list[Record]) -> None:
        """Append one step's metrics, and write its games. Raises RunFolderError."""
        step = record["step"]
        self.write_games(step, games)
        self._append(self.metrics_file, record)

    def write_games(self, step: int, games: list[Record]) -> None:
        if games:
            lines = "".join(_json_line(game) for game in games)
            with _Sentences(self.folder):
                replace_text(self.games_folder / f"step-{step:06d}.jsonl", lines)

    def event(self, kind: str, **details: Any) -> None:
        """Append to events.jsonl what happened outside the game (started, paused, resumed, …)."""
        self._append(self.events_file, {"time": round(time.time(), 3), "event": kind, **details})

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
        file = self.games_folder / f"step-{step:06d}.jsonl"
        if not file.is_file():
            return []
        # Not splitlines: a text may hold U+2028 and its like, which are no ends of JSON lines.
        lines = file.read_text("utf-8").split("\n")
        return [_parse_line(line, file, n) for n, line in enumerate(lines, 1) if line]

    def truncate(self, step: int) -> None:
        """Drop the records and games of `step` and later, as if the run had just reached it."""
        kept = [_json_line(r) for r in self.metrics() if r["step"] < step]
        with _Sentences(self.folder):
            replace_text(self.metrics_file, "".join(kept))
            for file in self.games_folder.glob("step-*.jsonl"):
                if int(file.stem.removeprefix("step-")) >= step:
                    file.unlink()

    def _append(self, file: Path, record: Record) -> None:
        with _Sentences(self.folder), file.open("a", encoding="utf-8") as stream:
            stream.write(_json_line(record))


class _Sentences:
    """Turns an OSError of the file system into one sentence."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError) and not isinstance(error, RunFolderError):
            raise RunFolderError(
                f"{error.filename or self.folder}: can't be written ({error.strerror})"
            ) from None


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


def replace_text(file: Path, text: str) -> None:
    """Write `file` whole or not at all."""
    beside = file.with_name(f".{file.name}.new")
    beside.write_text(text, "utf-8")
    os.replace(beside, file)


def remove_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


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
