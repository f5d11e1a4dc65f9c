"""Files of AlpacaEval: what is read, what is refused and how, what alpaca_eval would read back."""

from __future__ import annotations

import csv
import gzip
import json

import pytest

from language_self_play.errors import InputFileError
from language_self_play.evaluate.outputs import (
    Annotation,
    Output,
    hub_baseline,
    read_annotations,
    read_difficulties,
    read_instructions,
    read_outputs,
    write_annotations,
    write_leaderboard,
    write_outputs,
)

ROW = {
    "instruction": "Say hi",
    "output_1": "hello",
    "generator_1": "base",
    "output_2": "hi",
    "generator_2": "model",
    "annotator": "judge",
    "preference": 1.75,
    "dataset": "koala",
}


def without(*names, **changes):
    return {k: v for k, v in (ROW | changes).items() if k not in names}


def write(path, rows):
    path.write_text(json.dumps(rows))
    return path


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz", "a.jsonl.gz"])
def test_arrays_and_lines_are_read_packed_or_not(name, tmp_path):
    rows = [ROW, without("annotator", "dataset", instruction="Say ho")]
    lines = "\n".join(map(json.dumps, rows)) + "\n\n"
    text = lines if "jsonl" in name else json.dumps(rows)
    data = ("\ufeff" + text).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    annotations, unjudged = read_annotations(tmp_path / name, "--annotations")
    assert annotations == [
        Annotation("Say hi", "hello", "base", "hi", "model", 1.75, "judge", "koala"),
        Annotation("Say ho", "hello", "base", "hi", "model", 1.75, ""),
    ]
    assert unjudged == []


def test_a_preference_of_0_is_a_tie_and_none_is_left_out_and_counted(tmp_path):
    rows = [
        without(preference=0, instruction="a"),
        without(preference=None, instruction="b"),
        without(preference=float("nan"), instruction="c"),
        without(preference=2, instruction="d"),
    ]
    annotations, unjudged = read_annotations(write(tmp_path / "a.json", rows), "--annotations")
    assert [(a.instruction, a.preference) for a in annotations] == [("a", 1.5), ("d", 2.0)]
    assert unjudged == ["b", "c"]


BAD_ANNOTATIONS = {
    "no instruction": (
        [without("instruction")],
        "row 1: has no column 'instruction', its columns are",
    ),
    "no answer": ([ROW, without("output_2")], "row 2: has no column 'output_2'"),
    "no preference": ([without("preference")], "row 1: has no column 'preference'"),
    "a preference of 3": (
        [without(preference=3)],
        "row 1: preference = 3; must be a number from 1",
    ),
    "an order's preference of 3": (
        [without(model_first=3)],
        "row 1: model_first = 3; must be a number from 1",
    ),
    "a preference in words": ([without(preference="m")], "row 1: preference = 'm'; must be"),
    "a preference of true": ([without(preference=True)], "row 1: preference = True; must be"),
    "an infinite preference": (
        [without(preference=float("inf"))],
        "row 1: preference = inf; must be",
    ),
    "an answer that is a list": (
        [without(output_1=["x"])],
        "row 1: column 'output_1' holds ['x'], ",
    ),
    "one twice": ([ROW, ROW], "row 2: repeats the instruction of row 1, 'Say hi'; keep one"),
    "two models": (
        [ROW, without(instruction="b", generator_2="other")],
        ": generator_2 is 'model' in one row and 'other' in another",
    ),
    "two baselines": (
        [ROW, without(instruction="b", generator_1="other")],
        ": generator_1 is 'base' in one row and 'other' in another",
    ),
    "no rows": ([], ": holds no rows"),
    "numbers": ([1], "row 1: not a JSON object"),
    "nothing judged": ([without(preference=None)], ": holds 1 row, and none with a preference"),
}


@pytest.mark.parametrize("mistake", BAD_ANNOTATIONS)
def test_a_mistake_in_annotations_is_named_by_its_row(mistake, tmp_path):
    rows, sentence = BAD_ANNOTATIONS[mistake]
    with pytest.raises(InputFileError) as caught:
        read_annotations(write(tmp_path / "a.json", rows), "--annotations")
    assert sentence in str(caught.value)
    assert "a.json" in str(caught.value)


@pytest.mark.parametrize("read", [read_annotations, read_outputs, read_instructions])
def test_what_is_no_file_of_rows_is_named(read, tmp_path):
    (tmp_path / "empty.json").write_text("")
    (tmp_path / "blank.jsonl").write_text(" \n\n")
    (tmp_path / "broken.json").write_text('[{"instruction": ')
    (tmp_path / "broken.jsonl").write_text('{"instruction": "a", "output": "b"}\n{"in')
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "plain.json.gz").write_text("[]")
    (tmp_path / "cut.json.gz").write_bytes(gzip.compress(b"[1, 2, 3]" * 50)[:-9])
    (tmp_path / "folder").mkdir()
    for name, sentence in (
        ("empty.json", "--flag {}: the file is empty"),
        ("blank.jsonl", "--flag {}: the file is empty"),
        ("broken.json", "{}: not valid JSON: "),
        ("bytes.json", "--flag {}: not a text file in UTF-8"),
        ("plain.json.gz", "--flag {}: can't be unpacked"),
        ("cut.json.gz", "--flag {}: can't be unpacked"),
        ("folder", "--flag {}: is a folder; name a JSON or JSONL file whose rows have"),
        ("nothere.json", "--flag {}: no such file"),
        ("nothere.json.gz", "--flag {}: no such file"),
    ):
        with pytest.raises(InputFileError) as caught:
            read(tmp_path / name, "--flag")
        assert str(caught.value).startswith(sentence.format(tmp_path / name)), name
    if read is not read_annotations:
        with pytest.raises(InputFileError, match=r"broken\.jsonl:2: not valid JSON"):
            read(tmp_path / "broken.jsonl", "--flag")


def test_instructions_may_have_any_of_four_names_and_keep_their_subset(tmp_path):
    rows = [{"prompt": "a", "dataset": "koala"}, {"query": "b"}, {"question": "c"}]
    found = read_instructions(write(tmp_path / "i.json", rows), "--prompts")
    assert [(o.instruction, o.dataset) for o in found] == [("a", "koala"), ("b", None), ("c", None)]
    for row, sentence in (
        (
            {"text": "a"},
            "has no prompt, its columns are text; name a JSON or JSONL file whose rows have a column instruction, prompt",
        ),
        ({"instruction": " "}, "'instruction' is empty"),
        ({"instruction": "a", "dataset": 3}, "column 'dataset' holds 3, which is not a text"),
    ):
        with pytest.raises(InputFileError, match=sentence):
            read_instructions(write(tmp_path / "i.json", [row]), "--prompts")


def test_answers_without_a_generator_are_called_after_their_file(tmp_path):
    rows = [{"instruction": "a", "output": "b"}]
    assert read_outputs(write(tmp_path / "mine.json", rows), "MODEL") == [Output("a", "b", "mine")]
    mixed = [rows[0], {"instruction": "c", "output": "d", "generator": "other"}]
    with pytest.raises(InputFileError, match="holds answers of 2 generators"):
        read_outputs(write(tmp_path / "mine.json", mixed), "MODEL")
    with pytest.raises(InputFileError, match="row 1: has no column 'output'"):
        read_outputs(write(tmp_path / "mine.json", [{"instruction": "a"}]), "MODEL")


def test_what_is_written_is_read_back_and_has_the_columns_of_alpaca_eval(tmp_path):
    annotations = [
        Annotation("q\n", "a", "base", "b", "model", 1.5, "judge", "koala", 1.0, 2.0),
        Annotation("ü", "a", "base", "b", "model", 2.0, "judge"),
    ]
    write_annotations(tmp_path / "a.json", annotations)
    written = json.loads((tmp_path / "a.json").read_text())
    columns = {"instruction", "output_1", "generator_1", "output_2", "generator_2", "preference"}
    assert set(written[1]) == columns | {"annotator"}
    assert set(written[0]) == columns | {"annotator", "dataset", "baseline_first", "model_first"}
    read, _ = read_annotations(tmp_path / "a.json", "--annotations")
    assert read == annotations
    outputs = [Output("q", "a", "model", "koala"), Output("r", "", "model")]
    write_outputs(tmp_path / "o.json", outputs)
    assert read_outputs(tmp_path / "o.json", "MODEL") == outputs
    write_leaderboard(tmp_path / "l.csv", "a, b", {"win_rate": 12.5, "standard_error": None})
    with (tmp_path / "l.csv").open() as stream:
        assert list(csv.reader(stream)) == [
            ["", "win_rate", "standard_error"],
            ["a, b", "12.5", ""],
        ]


# ---------------------------------------------------------------- difficulties


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("d.json", '{"b": 2, "a": 1.5}'),
        ("d.json", '{"1": 2, "0": 1.5}'),
        ("d.csv", ",instruction_difficulty\n1,2\n0,1.5\n"),
        ("d.csv", "instruction,difficulty\nb,2.0\na,1.5\n"),
        # as the hub's df_gamed.csv, which has a row for each of several models
        ("d.csv", "preference,index,instruction_difficulty\n1,0,1.5\n2,1,2\n1,0,1.5\n"),
    ],
)
def test_difficulties_come_by_text_or_by_number_in_the_order_of_the_instructions(
    name, text, tmp_path
):
    (tmp_path / name).write_text(text)
    assert read_difficulties(tmp_path / name, ["a", "b"], "--d") == [1.5, 2.0]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "neither a JSON object nor a CSV file with two columns"),
        ("index\n0\n", "neither a JSON object nor a CSV file with two columns"),
        ("i,d\n0,1\n", "has no difficulty for 2 of the 2 instructions, such as 'a'"),
        ("i,d\n0,1\n1,2\n2,3\n", "has no difficulty for 2 of the 2 instructions"),
        ("i,d\na,1\n", "has no difficulty for 1 of the 2 instructions, such as 'b'"),
        ("i,d\na,hard\nb,2\n", "d.csv:2: 'hard' is no difficulty"),
        ("i,d\na,nan\nb,2\n", "d.csv:2: 'nan' is no difficulty"),
        ("i,d\na\nb,2\n", "d.csv:2: None is no difficulty"),
        ("i,d\na,1\na,2\nb,1\n", "d.csv:3: 'a' has two difficulties, 1.0 and 2.0"),
        ('{"a": true, "b": 1}', "True is no difficulty"),
        ('{"a": 1,', "not valid JSON"),
    ],
)
def test_a_table_that_does_not_fit_is_named(text, sentence, tmp_path):
    (tmp_path / "d.csv").write_text(text)
    with pytest.raises(InputFileError) as caught:
        read_difficulties(tmp_path / "d.csv", ["a", "b"], "--d")
    assert sentence in str(caught.value)
    assert "d.csv" in str(caught.value)


def test_a_hub_that_is_away_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        InputFileError, match=r"^alpaca_eval_gpt4_baseline\.json of .* name files by"
    ):
        hub_baseline()
