"""Questions that have been answered, kept in a file as they come, so that none is paid for twice.

The first line says what was asked of which model; every other one is a question's record. Never torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from language_self_play.durable import append_text, replace_text
from language_self_play.errors import InputFileError
from language_self_play.evaluate.outcomes import Record

# Files of a model's folder that decide on what it says.
DECISIVE = ("*.safetensors", "*.json", "*.jinja", "*.model")


class KeptRecords:
    """The records in `file`, batch by batch; without a file they are only remembered."""

    def __init__(self, file: Path | None, asked: dict[str, Any], batch: int, total: int):
        """Read what an earlier call has left of `total` records: all, or whole batches.

        Raises InputFileError if it was asked something else, or can't be read.
        """
        self.file, self.records = file, list[Record]()
        self._head = json.dumps(asked, ensure_ascii=True) + "\n"
        if file is None:
            return
        try:
            text = file.read_text("utf-8") if file.exists() else ""
            head, *lines = text.split("\n")[:-1] or [""]
            found = [json.loads(line) for line in lines]
            if not all(isinstance(record, dict) for record in found):
                raise ValueError("a line is no record")
            engine = _engine(head) if head else None
        except (OSError, ValueError) as error:
            raise InputFileError(f"{file}: can't be read ({error}); remove it") from None
        if head and f"{head}\n" != self._head:
            ours = asked.get("engine")
            if engine is not None and engine != ours:
                raise InputFileError(
                    f"{file}: holds answers that came from {engine}, and those of {ours} are not mixed"
                    f" with them; go on by --engine {engine}, remove it, or write to another file"
                )
            raise InputFileError(
                f"{file}: holds answers to other questions, of another model or with other settings;"
                " remove it, or write to another file"
            )
        # Draws are functions of where a batch begins, so half of one is asked again.
        whole = len(found) if len(found) == total else len(found) - len(found) % batch
        self.records = found[:whole]
        self._write(lambda: replace_text(file, self._head + "".join(map(_line, self.records))))

    def add(self, records: list[Record]) -> None:
        """Keep one batch. Raises InputFileError if it can't be written."""
        self.records += records
        if (file := self.file) is not None:
            self._write(lambda: append_text(file, "".join(map(_line, records))))

    def remove(self) -> None:
        """Once its records are written elsewhere."""
        if self.file is not None:
            self.file.unlink(missing_ok=True)

    def _write(self, write: Any) -> None:
        try:
            write()
        except OSError as error:
            raise InputFileError(f"{self.file}: can't be written ({error.strerror})") from None


def _engine(head: str) -> str | None:
    """What generated the answers of a file that begins so."""
    asked = json.loads(head)
    engine = asked.get("engine") if isinstance(asked, dict) else None
    return engine if isinstance(engine, str) else None


def _line(record: Record) -> str:
    return json.dumps(record, ensure_ascii=True) + "\n"


def written_when(folder: Path) -> list[list[Any]]:
    """What tells a model in a folder from one that is written there later; nothing of hub ids."""
    files = sorted(file for pattern in DECISIVE for file in folder.glob(pattern))
    return [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]
