"""Queries for GRPO: a JSONL file, read once, and which of them belong to a step."""

from __future__ import annotations

import json
from collections import Counter
from itertools import chain

import pytest

from language_self_play.config import Data
from language_self_play.errors import InputFileError


@pytest.fixture
def load(tmp_path, monkeypatch):
    from language_self_play.data import load_queries

    monkeypatch.chdir(tmp_path)

    def write_and_load(content: str | bytes, **settings):
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "q.jsonl").write_bytes(data)
        return load_queries(Data(path="q.jsonl", **settings))

    return write_and_load


def test_queries_are_read_in_order_from_their_column(load):
    rows = '{"prompt": "1+1", "id": 3}\n\n{"prompt": "sort ba"}\n'
    assert load(rows) == ["1+1", "sort ba"]
    assert load('{"instruction": "1+1"}', column="instruction") == ["1+1"]


def test_a_query_may_hold_every_line_separator(load):
    query = "one\u2028two\u2029three\x85four\x0cfive"
    assert load(json.dumps({"prompt": query}, ensure_ascii=False) + "\n") == [query]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"prompt": "1+1"}\n{"prompt": \n', "q.jsonl:2: not a JSON object: "),
        ("1+1\nreverse ab\n", "q.jsonl:1: not a JSON object: "),
        ('{"prompt": "1+1"}\n{"query": "2"}\n', "q.jsonl:2: has no text in column 'prompt'"),
        ('{"prompt": 3}\n', "q.jsonl:1: has no text in column 'prompt'"),
        ('{"prompt": " "}\n', "q.jsonl:1: has no text in column 'prompt'"),
        ('["1+1"]\n', "q.jsonl:1: has no text in column 'prompt'"),
        ("", "q.jsonl: holds no queries"),
        (" \n\n", "q.jsonl: holds no queries"),
        (b"\xff\xfe\x00", "q.jsonl: not a text file in UTF-8"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(load, content, sentence):
    with pytest.raises(InputFileError) as refused:
        load(content)
    assert str(refused.value).startswith(sentence)


def test_the_built_in_queries_are_a_thousand():
    from language_self_play.data import load_queries

    assert len(load_queries(Data(path="arena"))) == 1000


def test_each_time_through_the_file_every_query_comes_once_in_another_order():
    from language_self_play.data import queries_of_step

    queries = [str(i) for i in range(12)]
    steps = [queries_of_step(queries, step, 4, 0) for step in range(6)]
    first, second = list(chain(*steps[:3])), list(chain(*steps[3:]))
    assert Counter(first) == Counter(second) == Counter(queries)
    assert len({tuple(first), tuple(second), tuple(queries)}) == 3


def test_a_step_that_ends_a_pass_begins_the_next_one():
    from language_self_play.data import queries_of_step

    queries = [str(i) for i in range(5)]
    drawn = list(chain(*(queries_of_step(queries, step, 3, 1) for step in range(5))))
    # 15 queries are three passes of 5.
    assert [Counter(drawn[i : i + 5]) for i in (0, 5, 10)] == [Counter(queries)] * 3


def test_the_queries_of_a_step_are_a_function_of_seed_and_step_alone():
    from language_self_play.data import queries_of_step

    queries = [str(i) for i in range(100)]
    assert queries_of_step(queries, 7, 8, 3) == queries_of_step(queries, 7, 8, 3)
    assert queries_of_step(queries, 7, 8, 3) != queries_of_step(queries, 7, 8, 4)


def test_a_step_may_ask_for_more_queries_than_there_are():
    from language_self_play.data import queries_of_step

    assert Counter(queries_of_step(["a", "b"], 0, 5, 0)) in (
        {"a": 3, "b": 2},
        {"a": 2, "b": 3},
    )
