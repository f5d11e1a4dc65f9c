"""Hundreds of bad configurations, made from the tree of settings: each is one sentence and exit code 2."""

from __future__ import annotations

import json
import math
import re
import shutil
import struct
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tomli_w

from language_self_play.cli import main
from language_self_play.config import Config
from language_self_play.recipe_files import merge
from language_self_play.settings import FieldInfo, fields, kinds

VALID: dict[str, Any] = {
    "algorithm": "lsp-zero",
    "steps": 2,
    "device": "cpu",
    "threads": 1,
    "policy": {"path": "arena", "lora": {}},
    "challenger": {"prompt": "arena", "num_queries": 4, "max_tokens": 16},
    "solver": {"group_size": 3, "max_tokens": 8},
    "reward": {"main": {"kind": "arena"}},
    "log": {"progress": "none"},
}
# What a reward of each kind needs beside its kind.
PARTS: dict[str, dict[str, Any]] = {
    "arena": {},
    "python": {"function": "math:fsum"},
    "reward_model": {"path": "./no-such-model"},
    "verifier": {"method": "regex", "pattern": "(.)"},
    "majority": {},
    "judge": {"base_url": "http://localhost:9/v1", "model": "m"},
}


def valid_for(kind: str | None) -> dict[str, Any]:
    kind = kind or "arena"
    return VALID | {"reward": {"main": {"kind": kind, **PARTS[kind]}}}


def prompt_set(**settings: Any) -> dict[str, Any]:
    judge = {"kind": "python", "function": "math:fsum"}
    return {"eval": {"win_rate": {"main": {"path": "p.jsonl", "judge": judge, **settings}}}}


def changed(field: str, value: Any, kind: str | None = None) -> dict[str, Any]:
    """The valid table with one setting, by its dotted name, changed."""
    table: Any = value
    for name in reversed(field.split(".")):
        table = {name: table}
    valid = valid_for(kind)
    if field.startswith("eval.accuracy."):
        valid = valid | {"eval": {"accuracy": {"main": {"path": "questions.jsonl"}}}}
    if field.startswith("eval.win_rate."):
        valid = valid | prompt_set()
    if field.startswith("eval.harness."):
        valid = valid | {"eval": {"harness": {"tasks": ["ifeval"]}}}
    return merge(valid, table)


# ---------------------------------------------------------------- from the tree of settings

WRONG_TYPES: dict[str, list[Any]] = {
    "int": ["many", 1.5, True, [1]],
    "float": ["fast", True, [0.5], math.nan, math.inf],
    "true | false": [1, "yes", "true"],
    "table": [3, "x"],
    "text": [3, ["x"]],
    "text | list of text": [3, [3]],
    "list of float": [0.5, "x", [0.5], [0.5, 0.5, 0.5]],
}
# Words of the machinery, which mean nothing to a user.
JARGON = r"Traceback|internal error|instance of|<class|object at 0x|validation error|NoneType"
LONGEST = 1000
MAY_BE_NEGATIVE = {"reward.NAME.weight"}


def wrong_values(field: FieldInfo) -> list[Any]:
    if field.type.startswith('"'):
        return ["nonsense", "", 3, [field.type.split('"')[1]]]
    if field.type == "list of text":
        return ["ifeval", 3, [3], [""]]
    if field.type.startswith("list of") and field.type not in WRONG_TYPES:
        return ["arena", 3, ["nonsense"]]
    values = list(WRONG_TYPES[field.type])
    if field.type in ("int", "float") and field.name not in MAY_BE_NEGATIVE:
        values.append(-1)
    return values


def setting_cases() -> Iterator[tuple[str, dict[str, Any], str]]:
    """(what, the whole table, the name that its sentence must begin with)."""
    for field in fields(Config):
        name = field.name.replace("NAME", "main")
        of_kind = f" of {field.kind}" if field.kind else ""
        for value in wrong_values(field):
            yield f"{name}{of_kind} = {value!r}", changed(name, value, field.kind), name
        typed = f"{name}{name[-1]}"  # the last key pressed twice
        yield f"{typed}{of_kind}", changed(typed, 1, field.kind), typed


SETTINGS = list(setting_cases())


def question_set(**settings: Any) -> dict[str, Any]:
    return {"eval": {"accuracy": {"main": {"path": "questions.jsonl", **settings}}}}


CONFLICTS: dict[str, tuple[dict[str, Any], str]] = {
    "grpo without queries": ({"algorithm": "grpo"}, "data.path"),
    "queries in a game that poses its own": ({"data": {"path": "arena"}}, "data.path"),
    "a key without a column": (
        {"reward": {"main": {"kind": "verifier", "method": "exact"}}},
        "reward.main",
    ),
    "regex without a pattern": (
        {"reward": {"main": {"kind": "majority", "method": "regex"}}},
        "reward.main",
    ),
    "a pattern without regex": (
        {"reward": {"main": {"kind": "majority", "method": "exact", "pattern": "(.)"}}},
        "reward.main",
    ),
    "a pattern without a group": (
        {"reward": {"main": {"kind": "majority", "method": "regex", "pattern": "."}}},
        "reward.main",
    ),
    "a broken pattern": (
        {"reward": {"main": {"kind": "majority", "method": "regex", "pattern": "(("}}},
        "reward.main",
    ),
    "a prompt without the question": (question_set(prompt="Think."), "eval.accuracy.main"),
    "pass@8 of 4 answers": (
        question_set(num_answers=4, pass_at=[1, 8], temperature=1.0),
        "eval.accuracy.main",
    ),
    "several answers, all the same": (question_set(num_answers=4), "eval.accuracy.main"),
    "a set's regex without a pattern": (question_set(method="regex"), "eval.accuracy.main"),
    "a set's name that no metric can hold": (
        {"eval": {"accuracy": {"a/b": {"path": "q.jsonl"}}}},
        "eval.accuracy",
    ),
    "a win rate named as a question set": (
        merge(question_set(), prompt_set()),
        "eval.win_rate.main",
    ),
    "a win rate named as lm-eval's tasks": (
        {"eval": {"win_rate": {"harness": prompt_set()["eval"]["win_rate"]["main"]}}},
        "eval.win_rate.harness",
    ),
    "a judge of nothing": (prompt_set(judge={}), "eval.win_rate.main.judge"),
    "no tasks of lm-eval": ({"eval": {"harness": {"tasks": []}}}, "eval.harness.tasks"),
    "warm-up as long as the run": ({"learner": {"warmup_steps": 2}}, "learner.warmup_steps"),
    "two tasks, three templates": (
        {"challenger": {"task": ["a", "b"], "template": ["1", "2", "3"]}},
        "challenger.template",
    ),
    "no task": ({"challenger": {"task": []}}, "challenger.task"),
    "a decay of 1": ({"learner": {"betas": [0.9, 1.0]}}, "learner.betas"),
    "a kind that is none": ({"reward": {"main": {"kind": "magic"}}}, "reward.main.kind"),
    "a seed beyond 31 bits": ({"seed": 2**31}, "seed"),
    "one query": ({"challenger": {"num_queries": 1}}, "challenger.num_queries"),
    "one answer": ({"solver": {"group_size": 1}}, "solver.group_size"),
    "a nucleus above 1": ({"solver": {"top_p": 1.1}}, "solver.top_p"),
    "a nucleus of nothing": ({"challenger": {"top_p": 0}}, "challenger.top_p"),
    "temperature 0": ({"solver": {"temperature": 0}}, "solver.temperature"),
    **{
        f"text for section {section}": ({section: "x"}, section)
        for section in ("policy", "challenger", "solver", "reward", "learner", "guard", "log")
    },
    **{
        f"{name} = 0": (changed(name, 0), name)
        for name in (
            *("steps", "threads", "eval.every", "checkpoint.every", "checkpoint.keep_last"),
            *("checkpoint.keep_every", "guard.max_skipped", "rollout.batch_size"),
            *("learner.lr", "learner.max_grad_norm", "policy.lora.rank", "solver.max_tokens"),
        )
    },
}


class Refusal(NamedTuple):
    sentences: list[str]
    said_before: str


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for variable in ("OPENAI_API_KEY", "LSP_TRACEBACK"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def no_weights(monkeypatch):
    """Any attempt to load weights fails the test."""
    import transformers

    def load(*_: Any, **__: Any) -> Any:
        pytest.fail("weights were loaded")

    for loader in ("AutoModelForCausalLM", "AutoModelForSequenceClassification"):
        monkeypatch.setattr(getattr(transformers, loader), "from_pretrained", load)


def refused(capsys, *arguments: str) -> Refusal:
    """What `lsp` says when it refuses its arguments as bad input: sentences, and nothing else."""
    code = main(arguments)
    printed = capsys.readouterr()
    # transformers may have a word of its own, and we say when the hub is asked.
    lines = [
        line
        for line in printed.err.splitlines()
        if "[transformers]" not in line and not line.endswith("so the hub is asked")
    ]
    assert code == 2, printed
    assert lines, "nothing is said"
    for line in lines:
        assert re.match(r"lsp: \S", line), line
        assert not re.search(JARGON, line), line
        assert len(line) < LONGEST, line
    return Refusal([line.removeprefix("lsp: ") for line in lines], printed.out)


def test_there_are_at_least_200_cases_and_every_setting_is_among_them():
    assert len(SETTINGS) + len(CONFLICTS) >= 200
    assert set(kinds(Config)) == set(PARTS)
    names = {name for _, _, name in SETTINGS}
    assert {field.name.replace("NAME", "main") for field in fields(Config)} <= names


@pytest.mark.parametrize("kind", PARTS)
def test_what_these_cases_change_is_valid(kind):
    Config.from_table(valid_for(kind))


def of_settings(capsys, table: dict[str, Any]) -> str:
    """The one sentence about `table`, said before anything is imported or written for it."""
    Path("bad.toml").write_text(tomli_w.dumps(table))
    sentences, said_before = refused(capsys, "train", "bad.toml")
    assert said_before == ""
    assert [path.name for path in Path().iterdir()] == ["bad.toml"]
    [sentence] = sentences
    return sentence


@pytest.mark.parametrize(("table", "name"), [c[1:] for c in SETTINGS], ids=[c[0] for c in SETTINGS])
def test_a_bad_setting_is_one_sentence_that_begins_with_its_name(table, name, capsys):
    sentence = of_settings(capsys, table)
    assert re.match(rf"{re.escape(name)}(\.\d+)?( = |: )\S", sentence), sentence


@pytest.mark.parametrize("conflict", CONFLICTS)
def test_what_does_not_go_together_is_one_sentence_that_begins_with_its_name(conflict, capsys):
    changes, name = CONFLICTS[conflict]
    sentence = of_settings(capsys, merge(VALID, changes))
    assert re.match(rf"{re.escape(name)}(\.\d+)?( = |: )\S", sentence), sentence


@pytest.mark.parametrize("section", ["policy", "reward"])
def test_what_lacks_is_one_sentence_that_begins_with_its_name(section, capsys):
    table = {name: value for name, value in VALID.items() if name != section}
    assert of_settings(capsys, table).startswith(f"{section}: ")


# ---------------------------------------------------------------- files

BROKEN_TOML = {
    "empty": b"",
    "blank": b" \n\n",
    "no value": b"steps = \n",
    "an open table": b"[policy",
    "a table twice": b"[policy]\n[policy]\n",
    "a key twice": b"steps = 1\nsteps = 2\n",
    "an open text": b'device = "cpu\n',
    "JSON": b'{"steps": 2}',
    "YAML": b"steps: 2\n",
    "NUL bytes": b"\0" * 64,
    "an image": b"\x89PNG\r\n\x1a\n\xff\xfe",
    "UTF-16": "steps = 2\n".encode("utf-16"),
    "Latin-1": 'device = "é"\n'.encode("latin-1"),
}


@pytest.mark.parametrize("command", ["train", "resume"])
@pytest.mark.parametrize("contents", BROKEN_TOML)
def test_broken_toml_is_one_sentence_that_begins_with_its_file(command, contents, capsys):
    Path("run").mkdir()
    Path("run/config.toml").write_bytes(BROKEN_TOML[contents])
    arguments = ["run/config.toml"] if command == "train" else ["--resume", "run"]
    [sentence], said_before = refused(capsys, "train", *arguments)
    assert sentence.startswith("run/config.toml: ")
    assert said_before == ""


def a_folder(path: Path) -> None:
    path.mkdir()


def a_dangling_link(path: Path) -> None:
    path.symlink_to("nowhere")


UNREADABLE: dict[str, Callable[[Path], Any]] = {
    "missing": lambda path: None,
    "a folder": a_folder,
    "no text": lambda path: path.write_bytes(b"\xff\xfe\x00"),
    "a dangling link": a_dangling_link,
}
GRPO = {"algorithm": "grpo"}
LSP = {"algorithm": "lsp"}
JUDGE = {"reward": {"main": {"kind": "judge", "api_key_env": "SOME_KEY", **PARTS["judge"]}}}
# Setting -> what else its file is read for, and a name that is taken for a file.
FILES: dict[str, tuple[dict[str, Any], str]] = {
    "challenger.prompt": ({}, "prompt.txt"),
    "self_reward.rubric": (LSP, "rubric.txt"),
    "policy.chat_template": ({}, "chat.jinja"),
    "data.path": (GRPO, "queries.jsonl"),
    "reward.main.prompt": (JUDGE, "judge.txt"),
}


def of_files(capsys, changes: dict[str, Any]) -> str:
    """The one sentence about a file that a setting names."""
    table = {**VALID, "policy": {"path": "arena"}}
    if "reward" in changes:
        table.pop("reward")
    Path("bad.toml").write_text(tomli_w.dumps(merge(table, changes)))
    [sentence], _ = refused(capsys, "train", "bad.toml", "--run", "run")
    assert not Path("run", "config.toml").exists()
    return sentence


@pytest.mark.parametrize("setting", FILES)
@pytest.mark.parametrize("what", UNREADABLE)
def test_an_unreadable_file_is_one_sentence_that_names_setting_and_file(
    setting, what, no_weights, monkeypatch, capsys
):
    monkeypatch.setenv("SOME_KEY", "k")
    changes, file = FILES[setting]
    UNREADABLE[what](Path(file))
    nested: Any = file
    for name in reversed(setting.split(".")):
        nested = {name: nested}
    sentence = of_files(capsys, merge(changes, nested))
    if setting == "data.path" and what == "a folder":
        assert file in sentence  # any folder may hold a data set
    else:
        assert sentence.startswith(f"{setting} = {file!r}: "), sentence


QUERIES: dict[str, tuple[str, bytes | str, dict[str, Any]]] = {
    "nothing": ("q.jsonl", b"", {}),
    "no JSON": ("q.jsonl", b"what is 2+2?\n", {}),
    "half a line": ("q.jsonl", b'{"prompt": "a"}\n{"prompt": "b', {}),
    "a number": ("q.jsonl", b"3\n", {}),
    "a list": ("q.jsonl", b'["a"]\n', {}),
    "no column": ("q.jsonl", b'{"text": "a"}\n', {}),
    "another column": ("q.jsonl", b'{"prompt": "a"}\n', {"column": "promt"}),
    "a number as text": ("q.jsonl", b'{"prompt": 3}\n', {}),
    "an empty query": ("q.jsonl", b'{"prompt": " "}\n', {}),
    "a null": ("q.jsonl", b'{"prompt": null}\n', {}),
    "half a character": ("q.jsonl", b'{"prompt": "\\ud800"}\n', {}),
    "a deep row": ("q.jsonl", b"[" * 100_000, {}),
    "no key": ("q.jsonl", b'{"prompt": "a"}\n', {"answer_column": "key"}),
    "a null as key": ("q.jsonl", b'{"prompt": "a", "key": null}\n', {"answer_column": "key"}),
    "a split": ("q.jsonl", b'{"prompt": "a"}\n', {"split": "test"}),
    "a subset": ("q.jsonl", b'{"prompt": "a"}\n', {"subset": "main"}),
    "half an array": ("q.json", b'[{"prompt": "a"}', {}),
    "an array of numbers": ("q.json", b"[1, 2]", {}),
    "an empty array": ("q.json", b"[]", {}),
    "no archive": ("q.jsonl.gz", b'{"prompt": "a"}\n', {}),
    "half an archive": ("q.jsonl.gz", b"\x1f\x8b\x08\x00\x00", {}),
    "no Parquet": ("q.parquet", b"PAR1", {}),
    "no table": ("q.csv", b"", {}),
}


@pytest.mark.parametrize("what", QUERIES)
def test_bad_queries_are_one_sentence_that_names_the_file(what, no_weights, capsys):
    file, contents, section = QUERIES[what]
    Path(file).write_bytes(contents)
    sentence = of_files(capsys, GRPO | {"data": {"path": file, **section}})
    assert file in sentence
    if what in ("half a line", "a number", "no column"):
        assert sentence.startswith(f"{file}:{2 if what == 'half a line' else 1}: ")


RUBRICS = {
    "self_reward.rubric": (LSP, "no place for the query: {answer}"),
    "reward.main.prompt": (JUDGE, "no place for the answer: {query} {max_score}"),
}


@pytest.mark.parametrize("setting", RUBRICS)
def test_a_text_without_its_placeholders_is_one_sentence(setting, no_weights, monkeypatch, capsys):
    monkeypatch.setenv("SOME_KEY", "k")
    changes, text = RUBRICS[setting]
    Path("text.txt").write_text(text)
    nested: Any = "text.txt"
    for name in reversed(setting.split(".")):
        nested = {name: nested}
    sentence = of_files(capsys, merge(changes, nested))
    assert sentence.startswith(f"{setting} = 'text.txt': the text has no {{")


FUNCTIONS = {
    "no colon": ("mine", ""),
    "no module": ("no_such_module_anywhere:reward", ""),
    "no function": ("mine:nothing", "reward = len"),
    "no callable": ("mine:reward", "reward = 3"),
    "broken syntax": ("mine:reward", "def reward("),
    "raises when imported": ("mine:reward", "1 / 0"),
    "imports what is missing": ("mine:reward", "import no_such_module_anywhere"),
    "raises": ("mine:reward", "def reward(q, a): raise KeyError('x')"),
    "takes one list": ("mine:reward", "def reward(q): return [1.0]"),
    "returns nothing": ("mine:reward", "def reward(q, a): pass"),
    "returns a text": ("mine:reward", "def reward(q, a): return 'good'"),
    "returns texts": ("mine:reward", "def reward(q, a): return ['1.0'] * len(a)"),
    "returns a number": ("mine:reward", "def reward(q, a): return 1.0"),
    "returns too many": ("mine:reward", "def reward(q, a): return [1.0] * 9"),
    "returns lists": ("mine:reward", "def reward(q, a): return [[1.0, 2.0]] * len(a)"),
    "returns complex numbers": ("mine:reward", "def reward(q, a): return [1j] * len(a)"),
    "returns huge integers": ("mine:reward", "def reward(q, a): return [10 ** 400] * len(a)"),
}


@pytest.mark.parametrize("what", FUNCTIONS)
def test_a_bad_reward_function_is_one_sentence_that_begins_with_its_name(
    what, no_weights, monkeypatch, capsys
):
    import sys

    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    function, code = FUNCTIONS[what]
    Path("mine.py").write_text(code)
    try:
        changes = {"reward": {"main": {"kind": "python", "function": function}}}
        assert of_files(capsys, changes).startswith("reward.main")
    finally:
        sys.modules.pop("mine", None)


def judge(**changes: str) -> dict[str, Any]:
    return merge(JUDGE, {"reward": {"main": changes}})


SERVICES: dict[str, tuple[dict[str, Any], str]] = {
    "no key": (
        judge(api_key_env="NO_SUCH_KEY", base_url="https://judge.invalid/v1"),
        "reward.main.api_key_env = 'NO_SUCH_KEY': ",
    ),
    "an address without a scheme": (judge(base_url="localhost"), "reward.main.base_url = "),
    "an address of a file": (judge(base_url="file:///tmp"), "reward.main.base_url = "),
    "a password in the address": (
        judge(base_url="http://me:pass@localhost"),
        "reward.main.base_url: ",
    ),
    "a key that holds a line's end": (judge(api_key_env="BROKEN_KEY"), "reward.main.api_key_env"),
}


@pytest.mark.parametrize("what", SERVICES)
def test_a_judge_that_can_not_be_asked_is_one_sentence(what, no_weights, monkeypatch, capsys):
    monkeypatch.setenv("SOME_KEY", "k")
    monkeypatch.setenv("BROKEN_KEY", "sk-secret\n1")
    changes, sentence = SERVICES[what]
    said = of_files(capsys, changes)
    assert said.startswith(sentence)
    assert "pass@" not in said
    assert "sk-secret" not in said


# ---------------------------------------------------------------- models


def edit_json(file: str, **changes: Any) -> Callable[[Path], None]:
    def edit(model: Path) -> None:
        table = json.loads((model / file).read_text())
        table = {k: v for k, v in (table | changes).items() if v is not None}
        (model / file).write_text(json.dumps(table))

    return edit


def write(file: str, contents: bytes | str) -> Callable[[Path], Any]:
    return lambda model: (model / file).write_bytes(
        contents if isinstance(contents, bytes) else contents.encode()
    )


def halve(file: str) -> Callable[[Path], None]:
    def cut(model: Path) -> None:
        contents = (model / file).read_bytes()
        (model / file).write_bytes(contents[: len(contents) // 2])

    return cut


def remove(*files: str) -> Callable[[Path], None]:
    def unlink(model: Path) -> None:
        for file in files:
            (model / file).unlink()

    return unlink


def without_stop_token(model: Path) -> None:
    edit_json("generation_config.json", eos_token_id=None)(model)
    edit_json("tokenizer_config.json", eos_token=None)(model)
    edit_json("config.json", eos_token_id=None)(model)


MODELS: dict[str, Callable[[Path], Any]] = {
    "no config": remove("config.json"),
    "an empty config": write("config.json", ""),
    "half a config": halve("config.json"),
    "a config that is a list": write("config.json", "[]"),
    "a config without a type": write("config.json", "{}"),
    "a config of an unknown type": edit_json("config.json", model_type="abacus"),
    "a config in binary": write("config.json", b"\xff\xfe\0"),
    "half a tokenizer": halve("tokenizer.json"),
    "an empty tokenizer": write("tokenizer.json", ""),
    "a tokenizer that is none": write("tokenizer.json", "{}"),
    "a tokenizer in binary": write("tokenizer.json", b"\xff\xfe\0"),
    "half a tokenizer config": halve("tokenizer_config.json"),
    "no chat template": remove("chat_template.jinja"),
    "half a chat template": write("chat_template.jinja", "{% for m in messages"),
    "a chat template that refuses": write("chat_template.jinja", "{{ raise_exception('no') }}"),
    "a chat template of another's variables": write("chat_template.jinja", "{{ a.b.c }}"),
    "half a generation config": halve("generation_config.json"),
    "no stop token": without_stop_token,
    "a context too short": edit_json("config.json", max_position_embeddings=2),
}


@pytest.fixture
def model(tmp_path):
    """The arena's model, in a folder that may be broken."""
    place = tmp_path / "model"
    shutil.copytree(str(resources.files("language_self_play") / "arena" / "model"), place)
    return place


@pytest.mark.parametrize("what", MODELS)
def test_a_broken_model_folder_is_one_sentence_before_weights_load(what, model, no_weights, capsys):
    MODELS[what](model)
    sentence = of_files(capsys, {"policy": {"path": "./model"}})
    if what == "a context too short":
        assert sentence.startswith("challenger.prompt: takes ")
    else:
        assert "./model" in sentence or "model/" in sentence, sentence


def safetensors(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def fewer_embeddings(model: Path) -> None:
    """A model whose vocabulary has one token less than its tokenizer."""
    import transformers

    policy = transformers.AutoModelForCausalLM.from_pretrained(model)
    policy.resize_token_embeddings(len(transformers.AutoTokenizer.from_pretrained(model)) - 1)
    policy.save_pretrained(model)


def without_tensors(model: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors")
    weights.pop(sorted(weights)[3])
    save_file(weights, model / "model.safetensors", {"format": "pt"})


def of_another_shape(model: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = {
        k: v[..., :-1].contiguous() for k, v in load_file(model / "model.safetensors").items()
    }
    save_file(weights, model / "model.safetensors", {"format": "pt"})


def pickled(model: Path) -> None:
    """Weights as torch.save writes them: a pickle, which could run anything."""
    import torch
    from safetensors.torch import load_file

    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()


WEIGHTS: dict[str, Callable[[Path], Any]] = {
    "half of them": halve("model.safetensors"),
    "0 bytes": write("model.safetensors", b""),
    "zeros": write("model.safetensors", bytes(4096)),
    "a text": write("model.safetensors", "version https://git-lfs.github.com/spec/v1\n"),
    "a header beyond the file": write("model.safetensors", struct.pack("<Q", 1 << 40) + b"{}"),
    "a header that is no JSON": write("model.safetensors", safetensors(b"{]" * 8)),
    "a tensor beyond the file": write(
        "model.safetensors",
        safetensors(
            json.dumps({"w": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}).encode()
        ),
    ),
    "another shape": of_another_shape,
    "no weights": remove("model.safetensors"),
    "a pickle": pickled,
    "a vocabulary smaller than the tokenizer's": fewer_embeddings,
}


@pytest.mark.parametrize("what", WEIGHTS)
def test_broken_weights_are_one_sentence_that_names_the_folder(what, model, capsys):
    WEIGHTS[what](model)
    capsys.readouterr()  # of writing them
    sentence = of_files(capsys, {"policy": {"path": "./model"}})
    assert sentence.startswith("policy.path = './model': "), sentence


# transformers draws what lacks at random and only warns: such a run would train noise.
LACKING = {
    "no tensors": write("model.safetensors", safetensors(b"{}      ")),
    "a tensor lacks": without_tensors,
}


@pytest.mark.parametrize("what", LACKING)
def test_weights_that_lack_are_one_sentence_that_names_the_folder(what, model, capsys):
    LACKING[what](model)
    sentence = of_files(capsys, {"policy": {"path": "./model"}})
    assert sentence.startswith("policy.path = './model': "), sentence


def test_a_tokenizer_without_a_pad_token_plays(model, capsys):
    edit_json("tokenizer_config.json", pad_token=None)(model)
    Path("good.toml").write_text(tomli_w.dumps(VALID | {"policy": {"path": "./model"}, "steps": 1}))
    assert main(["train", "good.toml", "--run", "run"]) == 0
    assert "nan" not in Path("run/metrics.jsonl").read_text().lower()


@pytest.mark.parametrize("path", ["./nothere", "a/b/c", "bad.toml", "empty", ".", "/", "~/x"])
def test_a_path_that_leads_to_no_model_is_one_sentence(path, no_weights, capsys):
    Path("empty").mkdir()
    assert of_files(capsys, {"policy": {"path": path}}).startswith(f"{path}: ")


# ---------------------------------------------------------------- command lines

# Arguments, and what the sentence names.
COMMANDS: dict[str, tuple[str, ...]] = {
    "train": ("RECIPE",),
    "train nothere": ("nothere",),
    "train nothere.toml": ("nothere.toml",),
    "train goood.toml": ("goood.toml", "good.toml"),
    "train arean": ("arean", "arena"),
    "train folder": ("folder",),
    "train good.toml more.toml": ("more.toml",),
    "train good.toml --run file": ("file",),
    "train good.toml --run used": ("used", "--resume"),
    "train good.toml --run=": ("--run",),
    "train good.toml --steps": ("--steps",),
    "train good.toml --steps --seed 1": ("--steps",),
    "train good.toml --stesp 3": ("stesp", "steps"),
    "train good.toml --steps 1e3": ("steps",),
    "train good.toml --solver 3": ("solver",),
    "train good.toml --solver.beta=x": ("solver.beta",),
    "train good.toml --reward.main x": ("reward.main",),
    "train good.toml --eval.tasks arena": ("eval.tasks",),
    "train good.toml --learner.betas x": ("learner.betas",),
    "train good.toml --device abacus": ("device",),
    "train good.toml --device cuda:99": ("device",),
    "train good.toml -h3": ("--help",),
    "train --resume": ("--resume",),
    "train --resume=": ("--resume",),
    "train --resume nothere": ("nothere",),
    "train --resume empty": ("empty/config.toml",),
    "train --resume used --take-ovr": ("--take-ovr", "--take-over"),
    "train --resume file": ("file",),
    "train --resume folder": ("folder",),
    "train --resume used --run new": ("--run",),
    "train good.toml --resume used": ("--resume",),
    "train --resume used --seed 3": ("seed",),
    "train --resume used --solver.beta 0.5": ("solver.beta",),
    "train --resume used --policy.path other": ("policy.path",),
    "train --resume used --algorithm lsp": ("algorithm",),
    "train --resume used --steps 0": ("steps",),
    "train --resume used --checkpoint.every 0": ("checkpoint.every",),
    "train --resume decaying --steps 9": ("learner.schedule",),
    "eval": ("MEASURE",),
    "eval nonsense": ("nonsense",),
    "eval accuracy": ("MODEL",),
    "eval accuracy ./nothere": ("./nothere",),
    "eval accuracy file": ("file",),
    "eval accuracy arena --json no/where.json": ("no/where.json",),
    "play": ("MODEL",),
    "eval accuracy used": ("used", "--resume"),
    "play used": ("used", "--resume"),
    "play ./nothere": ("./nothere",),
    "play runs/uesd": ("runs/uesd", "runs/used"),
    "play decayign": ("decayign", "decaying"),
    "play arena --games 0": ("--games",),
    "play arena --games x": ("--games",),
    "play arena --recipe nothere": ("nothere",),
    "push used": ("REPO_ID",),
    "push used not-a-repo!": ("not-a-repo!",),
    "push used me/model": ("used",),
    "push folder me/model": ("folder",),
    "push nothere me/model": ("nothere",),
    "recipes show nothere": ("nothere",),
    "recipes copy nothere": ("nothere",),
    "recipes nonsense": ("nonsense",),
    "config nonsense": ("nonsense",),
    "tarin good.toml": ("tarin", "train"),
    "--nonsense": ("--nonsense",),
}


@pytest.mark.parametrize("line", COMMANDS)
def test_a_bad_command_line_is_one_sentence_that_names_the_mistake(line, no_weights, capsys):
    Path("folder").mkdir()
    Path("file").write_text("nothing")
    Path("good.toml").write_text(tomli_w.dumps(VALID))
    for run, table in {
        "used": VALID,
        "decaying": merge(VALID, {"learner": {"schedule": "linear"}}),
    }.items():
        (Path(run) / "checkpoints").mkdir(parents=True)
        (Path(run) / "config.toml").write_text(tomli_w.dumps(table))
    shutil.copytree("used", "runs/used")
    Path("empty").mkdir()
    Path("empty/config.toml").write_text("")
    before = sorted(Path().rglob("*"))
    [sentence], _ = refused(capsys, *line.split())
    for name in COMMANDS[line]:
        assert name in sentence
    assert sorted(Path().rglob("*")) == before


def test_a_run_folder_below_a_file_is_one_sentence(capsys):
    Path("file").write_text("nothing")
    Path("good.toml").write_text(tomli_w.dumps(VALID))
    [sentence], _ = refused(capsys, "train", "good.toml", "--run", "file/below")
    assert sentence.startswith("file/below")


def test_each_of_many_mistakes_has_its_own_sentence(capsys):
    changes = {
        "steps": 0,
        "sead": 1,
        "solver": {"group_size": 1, "beta": "x"},
        "learner": {"kl": "k9", "lrr": 1.0},
        "guard": {"max_skipped": -1},
    }
    Path("bad.toml").write_text(tomli_w.dumps(merge(VALID, changes)))
    sentences, _ = refused(capsys, "train", "bad.toml")
    assert [re.split(r" = |: ", s)[0] for s in sorted(sentences)] == [
        *("guard.max_skipped", "learner.kl", "learner.lrr", "sead"),
        *("solver.beta", "solver.group_size", "steps"),
    ]
