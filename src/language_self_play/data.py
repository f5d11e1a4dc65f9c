"""The fixed set of queries that GRPO learns from, and which of them belong to a step.

JSON files are read here, so that a bad row is named by its line; all else that holds tables (CSV,
Parquet, folders, the hub) is read by the library `datasets`.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from language_self_play.config import Data
from language_self_play.errors import InputFileError
from language_self_play.extras import require
from language_self_play.randomness import permutation, stream_key
from language_self_play.recipe_files import read_text

BUILT_IN_QUERIES = "arena"
# The first of these that a row has is its query; Alpaca's `instruction` is joined with its `input`.
QUERY_COLUMNS = ("prompt", "query", "question", "instruction", "messages")
TABLE_BUILDERS = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow"}


class Question(NamedTuple):
    """A query, and the key by which a verifier checks its answers, where there is one."""

    query: str
    key: str | None = None


def load_queries(
    section: Data, is_held_out: Callable[[str], bool] = lambda query: False
) -> list[Question]:
    """The data set's questions in order, without evaluation questions.

    Raises InputFileError that names the line or row, ConfigError where `datasets` is not installed.
    """
    assert section.path is not None, "checked with the configuration"
    questions = [
        question
        for place, row in _rows(section)
        if not is_held_out((question := _question(row, place, section)).query)
    ]
    if not questions:
        raise InputFileError(f"{section.path}: holds no queries to learn from")
    return questions


def queries_of_step(
    questions: list[Question], step: int, num_queries: int, seed: int
) -> list[Question]:
    """The questions of one step: the file in a new random order each time through."""
    chosen = []
    for position in range(step * num_queries, (step + 1) * num_queries):
        epoch, place = divmod(position, len(questions))
        chosen.append(questions[_order(seed, epoch, len(questions))[place]])
    return chosen


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, length: int) -> list[int]:
    return permutation(stream_key(seed, "data", epoch), length)


# ---------------------------------------------------------------- where rows come from


def _rows(section: Data) -> Iterator[tuple[str, Any]]:
    """(where it stands, the row) of every row."""
    path = Path(str(section.path))
    if section.path == BUILT_IN_QUERIES:
        path = Path(str(resources.files("language_self_play"))) / "arena" / "human_queries.jsonl"
    names_table = path.is_dir() or path.suffix in TABLE_BUILDERS or _may_be_hub_id(path)
    if names_table:
        return _rows_of_table(section)
    if path.suffix == ".json":
        return _rows_of_array(path)
    return _rows_of_lines(path)


def _may_be_hub_id(path: Path) -> bool:
    """`owner/name` or `name`, without an ending, and no such file here."""
    return not path.exists() and not path.is_absolute() and not path.suffix and path.name != ".."


def _rows_of_lines(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                reason = getattr(error, "msg", "nested too deeply")
                raise InputFileError(f"{path}:{number}: not a JSON object: {reason}") from None


def _rows_of_array(path: Path) -> Iterator[tuple[str, Any]]:
    """One JSON array of objects, as Alpaca is published; else a JSON object a line."""
    text = _text(path)
    if not text.lstrip().startswith("["):
        yield from _rows_of_lines(path)
        return
    try:
        rows = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputFileError(f"{path}: not a JSON array of objects: {error}") from None
    for number, row in enumerate(rows, 1):
        yield f"{path}, row {number}", row


def _text(path: Path) -> str:
    if path.suffix != ".gz":
        return read_text(path, "data.path")
    try:
        with gzip.open(path, "rt", encoding="utf-8", newline="\n") as stream:
            return stream.read()
    except FileNotFoundError:
        raise InputFileError(f"data.path = {str(path)!r}: no such file") from None
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InputFileError(f"{path}: can't be unpacked ({error})") from None


def _rows_of_table(section: Data) -> Iterator[tuple[str, Any]]:
    """Rows of whatever `datasets` reads."""
    path = str(section.path)
    datasets = require("datasets", "data", f"data.path = {path!r}")
    datasets.disable_progress_bars()
    options: dict[str, Any] = {}
    if builder := TABLE_BUILDERS.get(Path(path).suffix):
        options = {"sep": "\t"} if path.endswith(".tsv") else {}
        options |= {"path": builder, "data_files": path}
    try:
        if Path(path, "dataset_info.json").exists() or Path(path, "dataset_dict.json").exists():
            table = datasets.load_from_disk(path)
            table = table[section.split] if isinstance(table, datasets.DatasetDict) else table
        else:
            table = datasets.load_dataset(
                **({"path": path, "name": section.subset} | options), split=section.split
            )
    except Exception as error:
        # Readers of many formats, and the hub's client, raise errors of many kinds.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0].rstrip(".") if lines else type(error).__name__
        raise InputFileError(f"data.path = {path!r}: can't be read: {reason}") from None
    for number, row in enumerate(table, 1):
        yield f"{path}, row {number}", row


# ---------------------------------------------------------------- what a row says


def _question(row: Any, place: str, section: Data) -> Question:
    """The question of one row. Raises InputFileError."""
    if not isinstance(row, Mapping):
        raise InputFileError(f"{place}: not a JSON object")
    name = section.column or next((c for c in QUERY_COLUMNS if c in row), None)
    columns = ", ".join(map(str, row)) or "none"
    if name is None or name not in row:
        missing = f"no column {name!r}" if name else f"none of {', '.join(QUERY_COLUMNS)}"
        raise InputFileError(
            f"{place}: has {missing}, its columns are {columns}; data.column names the query's"
        )
    query = _query_text(row[name])
    if query is None:
        raise InputFileError(
            f"{place}: has no text in column {name!r}; data.column names the column"
        )
    if section.column is None and name == "instruction" and _query_text(row.get("input")):
        query = f"{query}\n\n{row['input']}"  # Alpaca's format
    if section.answer_column is None:
        return Question(query)
    key = row.get(section.answer_column)
    if key is None or key == "":
        raise InputFileError(
            f"{place}: has no key in column {section.answer_column!r}, its columns are {columns};"
            " data.answer_column names it"
        )
    return Question(query, key if isinstance(key, str) else json.dumps(key, ensure_ascii=False))


def _query_text(value: Any) -> str | None:
    """The text of a query: itself, or of a conversation what its user says first."""
    if isinstance(value, list):
        said = [
            m.get("content") for m in value if isinstance(m, Mapping) and m.get("role") == "user"
        ]
        value = said[0] if said else None
    return value if isinstance(value, str) and value.strip() else None
