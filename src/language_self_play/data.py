"""Queries for GRPO: a JSONL file, read once, and which of them belong to a step."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from importlib import resources
from pathlib import Path

from language_self_play.config import Data, read_text
from language_self_play.errors import InputFileError
from language_self_play.randomness import permutation, stream_key

BUILT_IN_QUERIES = "arena"


def load_queries(
    section: Data, is_held_out: Callable[[str], bool] = lambda query: False
) -> list[str]:
    """The file's queries, without evaluation questions. Raises InputFileError that names the line."""
    assert section.path is not None, "checked with the configuration"
    path = Path(section.path)
    if section.path == BUILT_IN_QUERIES:
        path = Path(str(resources.files("language_self_play"))) / "arena" / "human_queries.jsonl"
    queries = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputFileError(f"{path}:{number}: not a JSON object: {error.msg}") from None
        query = row.get(section.column) if isinstance(row, dict) else None
        if not isinstance(query, str) or not query.strip():
            raise InputFileError(
                f"{path}:{number}: has no text in column {section.column!r};"
                " data.column names the column"
            )
        if not is_held_out(query):
            queries.append(query)
    if not queries:
        raise InputFileError(f"{path}: holds no queries to learn from")
    return queries


def queries_of_step(queries: list[str], step: int, num_queries: int, seed: int) -> list[str]:
    """The queries of one step: the file in a new random order each time through."""
    chosen = []
    for position in range(step * num_queries, (step + 1) * num_queries):
        epoch, place = divmod(position, len(queries))
        chosen.append(queries[_order(seed, epoch, len(queries))[place]])
    return chosen


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, length: int) -> list[int]:
    return permutation(stream_key(seed, "data", epoch), length)
