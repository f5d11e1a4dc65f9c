"""Queries for GRPO: JSONL files, what `datasets` reads, and which of them belong to a step."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from language_self_play.config import Data
from language_self_play.data import Question, load_queries, queries_of_step
from language_self_play.errors import ConfigError, InputFileError

Load = Callable[..., list[Question]]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """load(content, **settings): the questions of a file q.jsonl with that content."""
    monkeypatch.chdir(tmp_path)

    def write_and_load(content: str | bytes, **settings: Any) -> list[Question]:
        data = content if isinstance(content, bytes) else content.encode()
        Path("q.jsonl").write_bytes(data)
        return load_queries(Data(path="q.jsonl", **settings))

    return write_and_load


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The library, with its cache in a folder of the test, which is the working folder."""
    library = pytest.importorskip("datasets")
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    library.disable_progress_bars()
    return library


def lines(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def refusal(**settings: Any) -> str:
    with pytest.raises(InputFileError) as refused:
        load_queries(Data(**settings))
    return str(refused.value)


# ---------------------------------------------------------------- columns


def test_queries_are_read_in_order_from_their_column(load):
    rows = '{"prompt": "1+1", "id": 3}\n\n{"prompt": "sort ba"}\r\n'
    assert load(rows) == [("1+1", None), ("sort ba", None)]
    assert load('{"text": "1+1", "prompt": "2"}', column="text") == [("1+1", None)]


@pytest.mark.parametrize("column", ["query", "prompt", "question", "instruction", "messages"])
def test_each_known_column_is_found_without_being_named(load, column):
    assert load(lines({"id": 7, column: "1+1"})) == [("1+1", None)]


def test_of_several_known_columns_the_first_of_the_documented_order_is_read(load):
    row = {"messages": "5", "instruction": "4", "question": "3", "query": "2", "prompt": "1"}
    found = []
    while row:
        [question] = load(lines(row))
        found.append(question.query)
        row = {name: text for name, text in row.items() if text != question.query}
    assert found == ["1", "2", "3", "4", "5"]


def test_alpacas_input_stands_below_its_instruction_after_an_empty_line(load):
    rows = [
        {"instruction": "Add.", "input": "1, 2", "output": "3"},
        {"instruction": "Say hi.", "input": "", "output": "hi"},
        {"instruction": "Say ho.", "input": None, "output": "ho"},
        {"instruction": "Say no.", "output": "no"},
    ]
    expected = ["Add.\n\n1, 2", "Say hi.", "Say ho.", "Say no."]
    assert [q.query for q in load(lines(*rows))] == expected
    # Found, too, where the first line has none.
    late = [q.query for q in load(lines({"instruction": "Say hi."}, rows[0]))]
    assert late == ["Say hi.", "Add.\n\n1, 2"]


def test_a_column_that_is_named_is_read_alone(load):
    row = {"instruction": "Add.", "input": "1, 2"}
    assert load(lines(row), column="instruction") == [("Add.", None)]


def test_of_a_chat_the_first_user_message_is_the_query(load):
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "and 2+2"},
    ]
    assert load(lines({"messages": chat})) == [("1+1", None)]
    assert load(lines({"prompt": chat[1:2]})) == [("1+1", None)]


def test_a_query_may_hold_every_line_separator(load):
    query = "one\u2028two\u2029three\x85four\x0cfive"
    assert load(json.dumps({"prompt": query}, ensure_ascii=False) + "\n") == [(query, None)]


def test_a_byte_order_mark_is_no_part_of_the_first_line(load):
    assert load(b"\xef\xbb\xbf" + b'{"prompt": "1+1"}\n') == [("1+1", None)]


# ---------------------------------------------------------------- keys


@pytest.mark.parametrize(
    ("value", "key"),
    [
        ("#### 42\n", "#### 42\n"),
        (42, "42"),
        (0, "0"),
        (-0.5, "-0.5"),
        (True, "true"),
        (["assert f(1) == 2", "assert f(2) == 3"], "assert f(1) == 2\nassert f(2) == 3"),
        ([1, 2], "[1, 2]"),
        ({"städte": ["Köln"]}, '{"städte": ["Köln"]}'),
    ],
)
def test_a_key_is_text_or_lines_of_text_or_json(load, value, key):
    assert load(lines({"q": "?", "a": value}), column="q", answer_column="a") == [("?", key)]


def test_keys_are_read_only_from_the_column_that_is_named(load):
    assert load(lines({"question": "1+1", "answer": "2"})) == [("1+1", None)]


def test_list_of_unit_tests_runs_as_a_program(load):
    tests = ["assert f(1) == 2", "assert f(2) == 3"]
    [question] = load(lines({"prompt": "Write f.", "tests": tests}), answer_column="tests")
    exec(f"def f(x):\n    return x + 1\n\n{question.key}\n", {})
    with pytest.raises(AssertionError):
        exec(f"def f(x):\n    return 2\n\n{question.key}\n", {})


# ---------------------------------------------------------------- bad rows of JSONL


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"prompt": "1+1"}\n\n{"prompt": \n', "q.jsonl:3: not a JSON object: Expecting value"),
        ("1+1\nreverse ab\n", "q.jsonl:1: not a JSON object: Extra data"),
        ('["1+1"]\n', "q.jsonl:1: not a JSON object"),
        ('{"prompt": "1"}\nnull\n', "q.jsonl:2: not a JSON object"),
        ('{"prompt": ' + "9" * 5000 + "}", "q.jsonl:1: not a JSON object: Exceeds the limit"),
        ("[" * 200_000, "q.jsonl:1: not a JSON object: "),
        (
            '{"prompt": "1+1"}\n{"text": "2", "id": 3}\n',
            "q.jsonl:2: has none of prompt, query, question, instruction, messages, problem, its columns are"
            " text, id; data.column names the query's",
        ),
        ("{}\n", "q.jsonl:1: has none of prompt, "),
        ('{"prompt": 3}\n', "q.jsonl:1: has no text in column 'prompt'"),
        ('{"prompt": null}\n', "q.jsonl:1: has no text in column 'prompt'"),
        ('{"prompt": "1"}\n{"prompt": " "}\n', "q.jsonl:2: has no text in column 'prompt'"),
        ('{"messages": []}', "q.jsonl:1: has no text in column 'messages'"),
        (
            '{"messages": [{"role": "assistant", "content": "2"}, "user"]}',
            "q.jsonl:1: has no text in column 'messages'",
        ),
        (
            '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}',
            "q.jsonl:1: has no text in column 'messages'",
        ),
        ('{"instruction": "Add.", "input": 3}', "q.jsonl:1: column 'input' holds 3, which is not"),
        ('{"prompt": "a\\ud800"}', "q.jsonl:1: column 'prompt' holds half a character"),
        (
            '{"instruction": "Add.", "input": "a\\ud800"}',
            "q.jsonl:1: column 'instruction' holds half a character",
        ),
        ("", "q.jsonl: holds no queries to learn from"),
        (" \n\n", "q.jsonl: holds no queries to learn from"),
        (b"\xff\xfe\x00", "data.path = 'q.jsonl': not a text file in UTF-8"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(load, content, sentence):
    with pytest.raises(InputFileError) as refused:
        load(content)
    assert str(refused.value).startswith(sentence)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        ("null", "q.jsonl:2: has no key in column 'a', its columns are prompt, a; data.ans"),
        ("[]", "q.jsonl:2: has no key in column 'a', its columns are prompt, a; data.ans"),
        ("NaN", "q.jsonl:2: has no key in column 'a', its columns are prompt, a; data.ans"),
        ('" "', "q.jsonl:2: has no key in column 'a', its columns are prompt, a; data.ans"),
        ('"\\udc00"', "q.jsonl:2: column 'a' holds half a character"),
    ],
)
def test_a_row_without_a_key_is_named_when_keys_are_asked_for(load, answer, sentence):
    with pytest.raises(InputFileError) as refused:
        load(f'{{"prompt": "1", "a": 1}}\n{{"prompt": "2", "a": {answer}}}', answer_column="a")
    assert str(refused.value).startswith(sentence)
    with pytest.raises(InputFileError, match=r"^q\.jsonl:2: has no key in column 'a'"):
        load('{"prompt": "1", "a": 1}\n{"prompt": "2"}', answer_column="a")


@pytest.mark.parametrize(
    ("field", "sentence"),
    [
        (
            "column",
            "q.jsonl:1: has no column 'gold', its columns are prompt, answer; data.column names the"
            " query's",
        ),
        (
            "answer_column",
            "q.jsonl:1: has no key in column 'gold', its columns are prompt, answer;"
            " data.answer_column names it",
        ),
    ],
)
def test_a_column_that_is_not_there_is_named_with_those_that_are(load, field, sentence):
    with pytest.raises(InputFileError) as refused:
        load(lines({"prompt": "1+1", "answer": "2"}), **{field: "gold"})
    assert str(refused.value) == sentence


@pytest.mark.parametrize(("field", "value"), [("subset", "main"), ("split", "test")])
def test_settings_that_a_jsonl_file_has_no_use_for_are_refused(load, field, value):
    with pytest.raises(InputFileError) as refused:
        load(lines({"prompt": "1+1"}), **{field: value})
    assert str(refused.value) == (
        f"data.{field} = {value!r}: q.jsonl is a JSON file, which has no {field}s; leave it out"
    )


def test_evaluation_questions_are_left_out(tmp_path):
    file = tmp_path / "q.jsonl"
    file.write_text(lines({"prompt": "1+1"}, {"prompt": "2+2"}))
    section = Data(path=str(file))
    assert load_queries(section, lambda query: query == "1+1") == [("2+2", None)]
    with pytest.raises(InputFileError, match="holds no queries to learn from"):
        load_queries(section, lambda query: True)


def test_the_built_in_queries_are_a_thousand():
    questions = load_queries(Data(path="arena"))
    assert len(questions) == 1000
    assert questions[0] == ("sort yn", None)


# ---------------------------------------------------------------- what datasets reads


CSV = 'instruction,input,n\nSay hi.,,1\nAdd.,"1, 2",2\n'
FROM_CSV = [("Say hi.", "1"), ("Add.\n\n1, 2", "2")]


def test_csv_and_parquet_files_and_folders_are_read(datasets):
    Path("q.csv").write_text(CSV)
    table = datasets.Dataset.from_csv("q.csv")
    table.to_parquet("q.parquet")
    Path("folder").mkdir()
    table.to_parquet("folder/train.parquet")
    table.select([1]).to_parquet("folder/test.parquet")
    for path in ("q.csv", "q.parquet", "folder"):
        assert load_queries(Data(path=path, answer_column="n")) == FROM_CSV
    held = load_queries(Data(path="folder", split="test", answer_column="n"))
    assert held == FROM_CSV[1:]
    # Slices are those of `datasets`.
    assert load_queries(Data(path="q.csv", split="train[:1]")) == [("Say hi.", None)]


def test_what_save_to_disk_wrote_is_read(datasets):
    table = datasets.Dataset.from_dict({"question": ["1+1"], "other": [b"\xff"]})
    table.save_to_disk("one")
    datasets.DatasetDict(train=table, test=table).save_to_disk("two")
    assert load_queries(Data(path="one")) == [("1+1", None)]
    assert load_queries(Data(path="two", split="test")) == [("1+1", None)]
    assert refusal(path="two", split="dev") == (
        "data.split = 'dev': two has no such split; it has train, test"
    )
    assert refusal(path="one", split="test").startswith("data.split = 'test': one is a single")
    assert refusal(path="one", subset="main").startswith(
        "data.subset = 'main': one is a saved data set"
    )


def test_json_arrays_and_compressed_lines_are_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chat = [{"role": "user", "content": "1+1"}]
    Path("q.json").write_text(json.dumps([{"messages": chat, "key": {"a": 1}}]))
    assert load_queries(Data(path="q.json", answer_column="key")) == [("1+1", '{"a": 1}')]
    with gzip.open("q.jsonl.gz", "wt") as file:
        file.write(lines({"prompt": "2+2"}))
    assert load_queries(Data(path="q.jsonl.gz")) == [("2+2", None)]
    Path("lines.json").write_text(lines({"prompt": "3+3"}))
    assert load_queries(Data(path="lines.json")) == [("3+3", None)]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("q.json", b"[1,2", "q.json: not a JSON array of objects: "),
        ("q.json", b'[{"prompt": "1"}, 2]', "q.json, row 2: not a JSON object"),
        ("q.json", b"", "q.json: holds no queries to learn from"),
        ("q.json", b"[]", "q.json: holds no queries to learn from"),
        ("q.jsonl.gz", b"no gzip", "q.jsonl.gz: can't be unpacked (Not a gzipped file"),
        ("q.jsonl.gz", gzip.compress(b"\xff"), "q.jsonl.gz: can't be unpacked ('utf-8' codec"),
        ("q.jsonl.gz", gzip.compress(b"x" * 99)[:-9], "q.jsonl.gz: can't be unpacked (Compressed"),
    ],
)
def test_a_bad_json_or_gz_file_is_refused_by_name(name, content, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(content)
    assert refusal(path=name).startswith(sentence)


def test_tabs_separate_the_columns_of_a_tsv_file(datasets):
    Path("q.tsv").write_text("prompt\tn\n1, 2\t3\n")
    assert load_queries(Data(path="q.tsv", answer_column="n")) == [("1, 2", "3")]


def test_a_bad_row_of_a_data_set_is_named_by_its_number(datasets):
    Path("q.csv").write_text("prompt,n\n1+1,2\n,3\n")
    assert refusal(path="q.csv").startswith("q.csv, row 2: has no text in column 'prompt'")
    assert refusal(path="q.csv", column="n").startswith("q.csv, row 1: has no text in column 'n'")
    Path("k.csv").write_text("prompt,n\n1+1,2\n2+2,\n")
    assert refusal(path="k.csv", answer_column="n").startswith("k.csv, row 2: has no key in")
    dated = datasets.Dataset.from_pandas(
        pytest.importorskip("pandas").DataFrame({"prompt": ["1"], "t": ["2026-01-01"]})
    ).cast_column("t", datasets.Value("timestamp[s]"))
    dated.to_parquet("t.parquet")
    assert refusal(path="t.parquet", answer_column="t").startswith(
        "t.parquet, row 1: column 't' holds a datetime; a key is"
    )


@pytest.mark.parametrize(
    ("name", "content", "settings", "sentence"),
    [
        ("e.csv", "", {}, "data.path = 'e.csv': can't be read: No columns"),
        ("h.csv", "prompt\n", {}, "data.path = 'h.csv': can't be read: "),
        ("e.parquet", "", {}, "data.path = 'e.parquet': can't be read: "),
        (
            "s.csv",
            "prompt\n1\n",
            {"split": "dev"},
            "data.path = 's.csv': can't be read: Unknown split",
        ),
        ("s.csv", "prompt\n1\n", {"subset": "main"}, "data.subset = 'main': s.csv is a file,"),
        (
            "c.csv",
            "text,label\nx,y\n",
            {},
            "c.csv, row 1: has none of prompt, query, question, instruction, messages, problem, its columns"
            " are text, label;",
        ),
        (
            "c.csv",
            "prompt\nx\n",
            {"answer_column": "a"},
            "c.csv, row 1: has no key in column 'a', ",
        ),
    ],
)
def test_a_bad_file_is_refused_in_one_sentence(datasets, name, content, settings, sentence):
    Path(name).write_text(content)
    message = refusal(path=name, **settings)
    assert message.startswith(sentence)
    assert "\n" not in message


@pytest.mark.parametrize(
    "path", ["no.jsonl", "no.csv", "no.json.gz", "no.tsv", "./no", "../no/a/b", "no/"]
)
def test_a_file_that_is_not_there_is_not_looked_for_on_the_hub(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "no such file" in refusal(path=path)


def test_an_empty_folder_and_an_unreachable_hub_are_refused(datasets):
    Path("nothing").mkdir()
    assert refusal(path="nothing").startswith("data.path = 'nothing': can't be read: ")
    assert refusal(path="nobody/nothing").startswith(
        "data.path = 'nobody/nothing': can't be read: Couldn't reach 'nobody/nothing' on the Hub"
    )


def test_without_the_library_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.chdir(tmp_path)
    Path("q.csv").write_text(CSV)
    with pytest.raises(ConfigError, match=r"language-self-play\[data\]"):
        load_queries(Data(path="q.csv"))


def test_jsonl_needs_no_library(tmp_path):
    (tmp_path / "q.jsonl").write_text(lines({"prompt": "1+1"}))
    code = (
        "import sys; from language_self_play.data import load_queries;"
        "from language_self_play.config import Data; print(load_queries(Data(path='q.jsonl')));"
        "print({'datasets', 'pyarrow', 'pandas'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout == "[Question(query='1+1', key=None)]\nset()\n", run.stderr


# ---------------------------------------------------------------- published data


def test_gsm8k_is_read_with_its_worked_answers_as_keys(test_data):
    path = str(test_data / "data" / "gsm8k" / "test.jsonl")
    questions = load_queries(Data(path=path, answer_column="answer"))
    assert len(questions) == 1319
    assert questions[0].query.startswith("Janet\u2019s ducks lay 16 eggs per day.")
    assert questions[0].key.endswith("\n#### 18")


def test_alpacas_seed_tasks_are_read_in_alpacas_format(test_data, load):
    file = test_data / "data" / "alpaca" / "seed_tasks.jsonl"
    tasks = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    # The format in which Alpaca is published has one instance a row.
    rows = [{"instruction": t["instruction"], **t["instances"][0]} for t in tasks]
    questions = load(lines(*rows), answer_column=None)
    assert len(questions) == 175
    assert questions[0].query.startswith("Is there anything I can eat for a breakfast")
    assert questions[1].query == (
        "What is the relation between the given pairs?\n\nNight : Day :: Right : Left"
    )
    assert sum("\n\n" in q.query for q in questions) >= 100


def test_humaneval_is_read_compressed_and_its_tests_are_the_keys(test_data):
    path = str(test_data / "data" / "humaneval" / "HumanEval.jsonl.gz")
    questions = load_queries(Data(path=path, answer_column="test"))
    assert len(questions) == 164
    assert questions[0].query.startswith("from typing import List\n\n\ndef has_close_elements(")
    assert "def check(candidate):" in questions[163].key


# ---------------------------------------------------------------- which of them belong to a step


def questions_of(*texts: str) -> list[Question]:
    return [Question(text, f"key of {text}") for text in texts]


def test_each_time_through_the_file_every_query_comes_once_in_another_order():
    questions = questions_of(*map(str, range(12)))
    steps = [queries_of_step(questions, step, 4, 0) for step in range(6)]
    first, second = list(chain(*steps[:3])), list(chain(*steps[3:]))
    assert Counter(first) == Counter(second) == Counter(questions)
    assert len({tuple(first), tuple(second), tuple(questions)}) == 3


def test_a_step_that_ends_a_pass_begins_the_next_one():
    questions = questions_of(*map(str, range(5)))
    drawn = list(chain(*(queries_of_step(questions, step, 3, 1) for step in range(5))))
    # 15 queries are three passes of 5.
    assert [Counter(drawn[i : i + 5]) for i in (0, 5, 10)] == [Counter(questions)] * 3


def test_the_queries_of_a_step_are_a_function_of_seed_and_step_alone():
    questions = questions_of(*map(str, range(100)))
    assert queries_of_step(questions, 7, 8, 3) == queries_of_step(questions, 7, 8, 3)
    assert queries_of_step(questions, 7, 8, 3) != queries_of_step(questions, 7, 8, 4)


def test_a_query_keeps_its_key():
    for query, key in queries_of_step(questions_of("a", "b", "c"), 5, 4, 0):
        assert key == f"key of {query}"


def test_a_step_may_ask_for_more_queries_than_there_are():
    drawn = queries_of_step(questions_of("a", "b"), 0, 5, 0)
    assert Counter(q.query for q in drawn) in ({"a": 3, "b": 2}, {"a": 2, "b": 3})
