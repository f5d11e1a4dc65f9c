"""Queries from files and the hub: those that GRPO learns from, and questions that measure.

JSON files are read here, so that a bad row is named by its line; all else that holds tables (CSV,
Parquet, folders, the hub) is read by the library `datasets`.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from language_self_play.config import Table
from language_self_play.errors import InputFileError
from language_self_play.extras import require
from language_self_play.hub import look_for_hub
from language_self_play.randomness import permutation, stream_key
from language_self_play.recipe_files import read_text

BUILT_IN_QUERIES = "arena"
# The first of these that a row has is its query; Alpaca's `instruction` is joined with its `input`.
QUERY_COLUMNS = ("prompt", "query", "question", "instruction", "messages", "problem")
# The same of the key of a question that measures, and of what it is called.
ANSWER_COLUMNS = ("answer", "test", "test_list", "solution")
TEST_COLUMNS = ("test", "test_list")  # those whose keys are programs
ID_COLUMNS = ("id", "task_id", "unique_id", "question_id")
TABLE_BUILDERS = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
HUB_ID = re.compile(r"\w[\w-]*(\.[\w-]+)*(/\w[\w.-]*)?")


class Question(NamedTuple):
    """A query, and the key by which a verifier checks its answers, where there is one."""

    query: str
    key: str | None = None


class KeyedQuestion(NamedTuple):
    """A question that measures: its name in the data set, itself, and the key to its answers."""

    id: str
    query: str
    key: str


def load_queries(
    section: Table, is_held_out: Callable[[str], bool] = lambda query: False
) -> list[Question]:
    """The data set's questions in order, without evaluation questions.

    Raises InputFileError that names the line or row, ConfigError where `datasets` is not installed.
    """
    assert section.path is not None, "checked with the configuration"
    questions = [
        question
        for place, row in _rows(section, "data")
        if not is_held_out((question := _question(row, place, section, "data")).query)
    ]
    if not questions:
        raise InputFileError(f"{section.path}: holds no queries to learn from")
    return questions


def place_of(question: Question, section: Table) -> str:
    """Where the question stands first, such as `queries.jsonl:3`: read again, for a sentence."""
    rows = _rows(section, "data")
    return next(place for place, row in rows if _question(row, place, section, "data") == question)


def load_keyed_questions(section: Table, setting: str) -> tuple[list[KeyedQuestion], bool]:
    """(all questions in order, whether their keys are programs); the setting is named in errors.

    Without `answer_column` it is the first of ANSWER_COLUMNS that the first row has. An id is what
    the first of ID_COLUMNS says, else the row's number, from 1. Raises InputFileError that names the
    line or row, also for an id that comes twice, ConfigError where `datasets` is not installed.
    """
    questions: dict[str, KeyedQuestion] = {}
    places: dict[str, str] = {}
    are_programs = False
    for place, column, question in _keyed(section, setting):
        are_programs = column in TEST_COLUMNS
        if (name := question.id) in questions:
            raise InputFileError(
                f"{place}: has the id {name!r}, and so has {places[name]}; every question needs one"
                " of its own"
            )
        questions[name], places[name] = question, place
    if not questions:
        raise InputFileError(f"{section.path}: holds no questions")
    return list(questions.values()), are_programs


def place_of_keyed(question: KeyedQuestion, section: Table, setting: str) -> str:
    """Where the question stands, such as `test.jsonl:3`: read again, for a sentence."""
    return next(place for place, _, found in _keyed(section, setting) if found == question)


def _keyed(section: Table, setting: str) -> Iterator[tuple[str, str | None, KeyedQuestion]]:
    """(where it stands, the column of its key, the question) of every row."""
    for number, (place, row) in enumerate(_rows(section, setting), 1):
        if section.answer_column is None and isinstance(row, Mapping):
            section = section.model_copy(
                update={"answer_column": _answer_column(row, place, setting)}
            )
        question = _question(row, place, section, setting)
        assert question.key is not None, "there is an answer column, and each row must have a key"
        named = next((row[c] for c in ID_COLUMNS if row.get(c) not in (None, "")), number)
        yield place, section.answer_column, KeyedQuestion(str(named), question.query, question.key)


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


def _rows(section: Table, setting: str) -> Iterator[tuple[str, Any]]:
    """(where it stands, the row) of every row."""
    path = Path(str(section.path))
    if section.path == BUILT_IN_QUERIES:
        folder = Path(str(resources.files("language_self_play")))
        return _rows_of_lines(folder / "arena" / "human_queries.jsonl", setting)
    names_table = os.path.isdir(path) or path.suffix in TABLE_BUILDERS or _may_be_hub_id(section)
    if names_table:
        return _rows_of_table(section, setting)
    _refuse(section, setting, "subset", "split", what="a JSON file")
    if path.suffix == ".json":
        return _rows_of_array(path, setting)
    return _rows_of_lines(path, setting)


def _may_be_hub_id(section: Table) -> bool:
    """`owner/name` or `name`, not that of a JSON file, and no such file here."""
    path = Path(str(section.path))
    is_json = path.suffix in (".json", ".jsonl", ".gz")
    return not os.path.exists(path) and not is_json and bool(HUB_ID.fullmatch(str(section.path)))


def _refuse(section: Table, setting: str, *fields: str, what: str) -> None:
    """Raise InputFileError for a setting that has no effect on what `section.path` names."""
    for field in fields:
        value = getattr(section, field)
        if value != type(section).model_fields[field].default:
            raise InputFileError(
                f"{setting}.{field} = {value!r}: {section.path} is {what}, which has no {field}s;"
                " leave it out"
            )


def _rows_of_lines(path: Path, setting: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_text(path, setting).split("\n"), 1):
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                reason = getattr(error, "msg", error)
                raise InputFileError(f"{path}:{number}: not a JSON object: {reason}") from None


def _rows_of_array(path: Path, setting: str) -> Iterator[tuple[str, Any]]:
    """One JSON array of objects, as Alpaca is published; else a JSON object a line."""
    text = _text(path, setting)
    if not text.lstrip().startswith("["):
        yield from _rows_of_lines(path, setting)
        return
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputFileError(f"{path}: not a JSON array of objects: {error}") from None
    for number, row in enumerate(rows, 1):
        yield f"{path}, row {number}", row


def _text(path: Path, setting: str) -> str:
    if path.suffix != ".gz":
        return read_text(path, f"{setting}.path").removeprefix("\ufeff")
    try:
        with gzip.open(path, "rt", encoding="utf-8-sig", newline="\n") as stream:
            return stream.read()
    except FileNotFoundError:
        raise InputFileError(f"{setting}.path = {str(path)!r}: no such file") from None
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InputFileError(f"{path}: can't be unpacked ({error})") from None


def _rows_of_table(section: Table, setting: str) -> Iterator[tuple[str, Any]]:
    """Rows of whatever `datasets` reads."""
    path = str(section.path)
    builder = _table_builder(section, setting)
    if builder is None and not os.path.exists(path):
        look_for_hub()  # before datasets is imported, which then reads what it has found
    datasets = require("datasets", "data", f"{setting}.path = {path!r}")
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what fails is our sentence to say
    options: dict[str, Any] = {}
    if builder is not None:
        options = {"sep": "\t"} if path.endswith(".tsv") else {}
        options |= {"path": builder, "data_files": path}
    try:
        if any(os.path.exists(f"{path}/dataset_{kind}.json") for kind in ("info", "dict")):
            table = _saved_split(section, setting, datasets.load_from_disk(path))
        else:
            table = datasets.load_dataset(
                **({"path": path, "name": section.subset} | options), split=section.split
            )
    except InputFileError:
        raise
    except Exception as error:
        # Readers of many formats, and the hub's client, raise errors of many kinds.
        while error.__cause__ is not None and isinstance(error.__cause__, Exception):
            error = error.__cause__  # what `datasets` wraps says what is wrong
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0].rstrip(".") if lines else type(error).__name__
        wanted = ""
        if os.path.isdir(path):
            wanted = (
                "; a folder must hold tables of questions: name a file (JSON, JSONL, CSV, Parquet), or a"
                " folder of such files"
            )
        raise InputFileError(
            f"{setting}.path = {path!r}: can't be read: {reason}{wanted}"
        ) from None
    for number, row in enumerate(table, 1):
        yield f"{path}, row {number}", row


def _table_builder(section: Table, setting: str) -> str | None:
    """What `datasets` calls the file's format, None for folders and the hub. Raises InputFileError."""
    path = Path(str(section.path))
    builder = None if os.path.isdir(path) else TABLE_BUILDERS.get(path.suffix)
    if builder and not os.path.exists(path):
        raise InputFileError(f"{setting}.path = {section.path!r}: no such file")
    if builder:
        _refuse(section, setting, "subset", what="a file")
    return builder


def _saved_split(section: Table, setting: str, saved: Any) -> Any:
    """The split of what `save_to_disk` wrote: one table, or several by name."""
    _refuse(section, setting, "subset", what="a saved data set")
    if not isinstance(saved, dict):
        _refuse(section, setting, "split", what="a single saved data set")
        return saved
    if section.split not in saved:
        raise InputFileError(
            f"{setting}.split = {section.split!r}: {section.path} has no such split; it has"
            f" {', '.join(saved)}"
        )
    return saved[section.split]


# ---------------------------------------------------------------- what a row says


def _question(row: Any, place: str, section: Table, setting: str) -> Question:
    """The question of one row. Raises InputFileError."""
    if not isinstance(row, Mapping):
        raise InputFileError(f"{place}: not a JSON object")
    name = section.column or next((c for c in QUERY_COLUMNS if c in row), None)
    columns = ", ".join(map(str, row)) or "none"
    if name is None or name not in row:
        missing = f"no column {name!r}" if name else f"none of {', '.join(QUERY_COLUMNS)}"
        raise InputFileError(
            f"{place}: has {missing}, its columns are {columns}; {setting}.column names the query's"
        )
    query = _query_text(row[name])
    if query is None:
        raise InputFileError(
            f"{place}: has no text in column {name!r}; {setting}.column names the column"
        )
    if section.column is None and name == "instruction":
        query += _alpaca_input(row.get("input"), place)
    _refuse_half_characters(query, name, place)
    if section.answer_column is None:
        return Question(query)
    key = _key_text(row.get(section.answer_column), section.answer_column, place)
    if key is None:
        raise InputFileError(
            f"{place}: has no key in column {section.answer_column!r}, its columns are {columns};"
            f" {setting}.answer_column names it"
        )
    _refuse_half_characters(key, section.answer_column, place)
    if section.answer_column == "test" and isinstance(name := row.get("entry_point"), str):
        key += f"\ncheck({name})\n"  # HumanEval's tests only define it
    return Question(query, key)


def _answer_column(row: Mapping[str, Any], place: str, setting: str) -> str:
    """The column with the keys. Raises InputFileError."""
    if (name := next((c for c in ANSWER_COLUMNS if c in row), None)) is None:
        raise InputFileError(
            f"{place}: has none of {', '.join(ANSWER_COLUMNS)}, its columns are"
            f" {', '.join(map(str, row)) or 'none'}; a set that measures has a question and the key to its"
            f" answer in every row, and {setting}.answer_column names the keys' column"
        )
    return name


def _alpaca_input(value: Any, place: str) -> str:
    """What Alpaca's format adds to an instruction: an empty line and the input, or nothing."""
    if value is None or value == "":
        return ""
    if not isinstance(value, str):
        raise InputFileError(f"{place}: column 'input' holds {value!r}, which is not a text")
    return f"\n\n{value}" if value.strip() else ""


def _key_text(value: Any, column: str, place: str) -> str | None:
    """A text as it is, a list of texts as its lines, anything else as JSON; None for nothing."""
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        # Unit tests, as in MBPP: as JSON they would be a program that tests nothing.
        value = "\n".join(value)
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return None
    if isinstance(value, str):
        return value if value.strip() else None
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        raise InputFileError(
            f"{place}: column {column!r} holds a {type(value).__name__}; a key is a text, a number,"
            " or made of lists and tables of them"
        ) from None


def _refuse_half_characters(text: str, column: str, place: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise InputFileError(
            f"{place}: column {column!r} holds half a character (a lone surrogate), which no"
            " tokenizer reads"
        ) from None


def _query_text(value: Any) -> str | None:
    """The text of a query: itself, or of a conversation what its user says first."""
    if isinstance(value, list):
        said = [
            m.get("content") for m in value if isinstance(m, Mapping) and m.get("role") == "user"
        ]
        value = said[0] if said else None
    return value if isinstance(value, str) and value.strip() else None
