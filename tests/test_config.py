"""Settings: what is accepted, written back, overridden; and one sentence for each mistake."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib

import pydantic
import pytest

from language_self_play.cli import main
from language_self_play.cli.overrides import parse_override, split_overrides
from language_self_play.config import Challenger, Config, Solver
from language_self_play.errors import ConfigError, InputFileError
from language_self_play.recipe_files import load_recipe, merge, recipe_names, recipe_text
from language_self_play.settings import fields, kinds

# Nothing can be trained with it, should a mistake go unnoticed.
VALID = """\
[policy]
path = "./no-such-model"

[reward.main]
kind = "arena"
"""
TABLE = {"policy": {"path": "m"}, "reward": {"main": {"kind": "arena"}}}


# ---------------------------------------------------------------- what is accepted


def data_for(algorithm):
    return {"data": {"path": "q.jsonl"}} if algorithm == "grpo" else {}


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_is_valid_and_survives_being_written_back(name):
    config = Config.from_recipe(name)
    assert Config.from_table(tomllib.loads(config.to_toml())) == config


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_says_in_its_first_line_what_it_is(name):
    assert recipe_text(name).splitlines()[0].startswith("# ")


def test_the_arenas_three_algorithms_ship_as_recipes():
    algorithms = {n: Config.from_recipe(n).algorithm for n in recipe_names() if "arena" in n}
    assert algorithms == {"arena": "lsp", "arena-zero": "lsp-zero", "arena-grpo": "grpo"}


def test_every_setting_survives_being_written_back():
    table = {
        "algorithm": "grpo",
        "steps": 7,
        "seed": 2**31 - 1,
        "device": "cuda:1",
        "threads": 3,
        "policy": {
            "path": "a b/é",
            "chat_template": "t.jinja",
            "chat_template_kwargs": {"enable_thinking": False, "deep": {"x": [1, 2]}},
        },
        "challenger": {
            "prompt": "p.txt",
            "task": ["riddles", "jokes"],
            "template": ['Q: {q}\n"""quoted"""\t\\', "{joke}"],
            "num_queries": 2,
            "alpha": 0,
            "top_k": 5,
        },
        "solver": {"system_prompt": "Be brief.\n", "truncated": "mask", "top_p": 0.5},
        "self_reward": {"mode": "criteria", "rubric": "r.txt", "weight": 0.5},
        "reward": {
            "a": {"kind": "arena", "weight": -2},
            "b": {"kind": "python", "function": "m:f"},
        },
        "learner": {"betas": [0.5, 0.75], "kl": "reward", "aggregation": "token_mean"},
        "data": {"path": "q.jsonl", "column": "instruction"},
        "eval": {"tasks": ["arena"], "every": 3},
        "log": {"progress": "none", "game_every_s": 0},
    }
    config = Config.from_table(table)
    assert config.challenger.template == ['Q: {q}\n"""quoted"""\t\\', "{joke}"]
    assert config.learner.betas == (0.5, 0.75)
    assert config.reward["a"].weight == -2.0
    assert Config.from_table(tomllib.loads(config.to_toml())) == config


def test_what_is_unset_is_left_out_when_written_back_and_every_default_is_written():
    table = tomllib.loads(Config.from_table(TABLE).to_toml())
    assert "threads" not in table
    assert table["policy"] == {"path": "m", "chat_template_kwargs": {}, "trust_remote_code": False}
    assert "system_prompt" not in table["solver"]
    assert table["data"] == {"split": "train"}
    assert table["steps"] == 1500
    assert table["reward"] == {"main": {"weight": 1.0, "kind": "arena"}}


def test_defaults_are_the_papers_where_it_gives_them():
    assert Challenger().num_queries == 8
    assert (Challenger().beta, Solver().beta) == (0.05, 0.05)
    assert Solver().system_prompt is None
    config = Config.from_table(TABLE)
    assert (config.algorithm, config.steps, config.self_reward.weight) == ("lsp", 1500, 1.0)
    assert (config.learner.aggregation, config.self_reward.mode) == ("sequence", "generate")


@pytest.mark.parametrize(
    ("algorithm", "learner", "lr"),
    [
        ("lsp", {}, 3e-6),
        ("lsp-zero", {}, 3e-6),
        ("grpo", {}, 1e-6),
        ("lsp", {"lr": 2e-4}, 2e-4),
        ("grpo", {"lr": 2e-4}, 2e-4),
    ],
)
def test_the_learning_rate_is_the_papers_for_the_algorithm_unless_it_is_set(algorithm, learner, lr):
    config = Config.from_table(
        TABLE | {"algorithm": algorithm, "learner": learner} | data_for(algorithm)
    )
    assert config.lr == lr


def test_a_configuration_is_frozen():
    config = Config.from_table(TABLE)
    with pytest.raises(pydantic.ValidationError):
        config.steps = 3
    with pytest.raises(pydantic.ValidationError):
        config.solver.beta = 0.0


@pytest.mark.parametrize(
    ("algorithm", "solver_beta", "challenger_beta", "needed"),
    [
        ("lsp", 0.0, 0.0, True),  # the judge is the reference
        ("lsp-zero", 0.0, 0.0, False),
        ("lsp-zero", 0.1, 0.0, True),
        ("lsp-zero", 0.0, 0.1, True),
        ("grpo", 0.0, 0.1, False),  # there is no Challenger
        ("grpo", 0.1, 0.0, True),
    ],
)
def test_a_reference_is_needed_for_a_kl_term_or_a_judge_only(
    algorithm, solver_beta, challenger_beta, needed
):
    config = Config.from_table(
        TABLE
        | {
            "algorithm": algorithm,
            "solver": {"beta": solver_beta},
            "challenger": {"beta": challenger_beta},
        }
        | data_for(algorithm)
    )
    assert config.needs_reference is needed


# ---------------------------------------------------------------- merging and flags


def test_merge_lays_leaves_over_a_table_and_changes_neither():
    below = {"steps": 1, "solver": {"beta": 0.1, "top_k": 3}, "reward": {"a": {"kind": "arena"}}}
    above = {"steps": 2, "solver": {"beta": 0.2}, "reward": {"b": {"kind": "python"}}}
    kept = json.loads(json.dumps([below, above]))
    assert merge(below, above) == {
        "steps": 2,
        "solver": {"beta": 0.2, "top_k": 3},
        "reward": {"a": {"kind": "arena"}, "b": {"kind": "python"}},
    }
    assert [below, above] == kept


def test_merge_replaces_lists_whole_and_a_leaf_by_a_table():
    assert merge({"x": [1, 2]}, {"x": [3]}) == {"x": [3]}
    assert merge({"x": 1}, {"x": {"y": 2}}) == {"x": {"y": 2}}
    assert merge({"x": {"y": 2}}, {"x": 1}) == {"x": 1}


@pytest.mark.parametrize(
    ("name", "value", "table"),
    [
        ("steps", "5", {"steps": 5}),
        ("learner.lr", "1e-4", {"learner": {"lr": 1e-4}}),
        ("algorithm", "grpo", {"algorithm": "grpo"}),
        ("policy.path", "123", {"policy": {"path": "123"}}),
        ("policy.path", "true", {"policy": {"path": "true"}}),
        ("solver.system_prompt", "[be brief]", {"solver": {"system_prompt": "[be brief]"}}),
        ("data.column", "1", {"data": {"column": "1"}}),
        ("eval.tasks", '["arena"]', {"eval": {"tasks": ["arena"]}}),
        ("challenger.template", "{query}", {"challenger": {"template": "{query}"}}),
        ("challenger.task", '["a", "b"]', {"challenger": {"task": ["a", "b"]}}),
        ("challenger.task", "write a poem", {"challenger": {"task": "write a poem"}}),
        ("reward.main.weight", "-0.5", {"reward": {"main": {"weight": -0.5}}}),
        ("reward.main.kind", "python", {"reward": {"main": {"kind": "python"}}}),
        (
            "policy.chat_template_kwargs.enable_thinking",
            "false",
            {"policy": {"chat_template_kwargs": {"enable_thinking": False}}},
        ),
    ],
)
def test_a_flag_is_a_toml_value_or_text_where_text_is_wanted(name, value, table):
    assert parse_override(name, value) == table


@pytest.mark.parametrize("task", ["42", "true", "1979-05-27"])
def test_a_task_given_as_a_flag_is_text_even_if_it_looks_like_another_toml_value(task):
    config = Config.from_table(merge(TABLE, parse_override("challenger.task", task)))
    assert config.challenger.task == task


def test_flags_are_taken_out_of_the_command_line_in_either_spelling():
    own, table = split_overrides(
        [
            "arena",
            "--steps",
            "3",
            "--run",
            "DIR",
            "--solver.beta=0.5",
            "--dry-run",
            "--policy.path",
            "a=b",
            "--solver.system_prompt=x = y",
            "--steps",
            "4",
        ],
        {"--run", "--dry-run"},
    )
    assert own == ["arena", "--run", "DIR", "--dry-run"]
    assert table == {
        "steps": 4,
        "solver": {"beta": 0.5, "system_prompt": "x = y"},
        "policy": {"path": "a=b"},
    }


def test_a_negative_value_is_a_value_and_not_a_flag():
    assert split_overrides(["--reward.main.weight", "-1"], set()) == (
        [],
        {"reward": {"main": {"weight": -1}}},
    )


def test_overrides_win_over_the_recipe():
    config = Config.from_recipe("arena", steps=5, solver={"beta": 0.5})
    shipped = Config.from_recipe("arena")
    assert (config.steps, config.solver.beta) == (5, 0.5)
    assert config.solver.group_size == shipped.solver.group_size
    assert config.challenger == shipped.challenger


# ---------------------------------------------------------------- what is listed


# Recipes, flags and run folders of users hold these names.
RELIED_ON = {
    *["algorithm", "steps", "seed", "device", "threads"],
    *["policy.path", "policy.chat_template", "policy.chat_template_kwargs"],
    *[
        "challenger.temperature",
        "challenger.top_p",
        "challenger.top_k",
        "challenger.max_tokens",
        "challenger.beta",
        "challenger.prompt",
        "challenger.task",
        "challenger.template",
        "challenger.num_queries",
        "challenger.alpha",
    ],
    *[
        "solver.temperature",
        "solver.top_p",
        "solver.top_k",
        "solver.max_tokens",
        "solver.beta",
        "solver.group_size",
        "solver.system_prompt",
    ],
    *["self_reward.mode", "self_reward.weight", "self_reward.rubric"],
    *["reward.NAME.weight"],
    *["learner.lr", "learner.kl", "learner.aggregation", "learner.tokens_per_micro_batch"],
    *["checkpoint.every", "checkpoint.keep_last"],
    *["eval.every"],
}


def test_the_settings_that_users_rely_on_are_there_under_their_names():
    names = [(field.name, field.kind) for field in fields(Config)]
    assert len(names) == len(set(names))
    assert {name for name, _ in names} >= RELIED_ON


def test_every_setting_has_a_meaning():
    assert [field.name for field in fields(Config) if len(field.description) < 10] == []


@pytest.mark.parametrize(
    ("name", "kind", "default"),
    [
        ("steps", "int", 1500),
        ("threads", "int", None),
        ("policy.path", "text", None),
        ("policy.chat_template_kwargs", "table", {}),
        ("challenger.task", "text | list of text", ""),
        ("solver.temperature", "float", 1.0),
        ("solver.truncated", '"keep" | "mask" | "penalize"', "keep"),
        ("learner.betas", "list of float", (0.9, 0.999)),
        ("reward.NAME.function", "text", None),
    ],
)
def test_types_are_named_as_a_person_would(name, kind, default):
    [field] = [field for field in fields(Config) if field.name == name]
    assert (field.type, field.default) == (kind, default)
    assert field.required == (name in ("policy.path", "reward.NAME.function"))


def test_each_reward_kind_says_what_it_is():
    assert kinds(Config)["arena"] == "1 for the one right answer to an arena query, 0 otherwise."
    assert set(kinds(Config)) >= {"arena", "python"}


# ---------------------------------------------------------------- mistakes in a file

# (TOML, how the one sentence begins). The whole file is given, or what comes before or after VALID.
MISTAKES = {
    "text for int": ('steps = "many"\n' + VALID, "steps = 'many': "),
    "fraction for int": ("steps = 1.5\n" + VALID, "steps = 1.5: "),
    "boolean for int": ("steps = true\n" + VALID, "steps = True: "),
    "boolean for float": (VALID + "[learner]\nlr = true\n", "learner.lr = True: "),
    "list for int": ("steps = [1]\n" + VALID, "steps = [1]: "),
    "int for text": ("device = 3\n" + VALID, "device = 3: "),
    "text for float": (VALID + '[learner]\nlr = "fast"\n', "learner.lr = 'fast': "),
    "text for list": (VALID + '[eval]\ntasks = "arena"\n', "eval.tasks = 'arena': "),
    "int for text or list": (VALID + "[challenger]\ntask = 3\n", "challenger.task = 3: "),
    "list of int for texts": (VALID + "[challenger]\ntask = [3]\n", "challenger.task"),
    "list too short": (VALID + "[learner]\nbetas = [0.9]\n", "learner.betas"),
    "text for section": ('solver = "x"\n' + VALID, "solver = 'x': "),
    "text for reward": (
        '[policy]\npath = "m"\n[reward]\nmain = "arena"\n',
        "reward.main = 'arena': ",
    ),
    "int for rewards": ('reward = 3\n[policy]\npath = "m"\n', "reward = 3: "),
    "zero steps": ("steps = 0\n" + VALID, "steps = 0: "),
    "negative seed": ("seed = -1\n" + VALID, "seed = -1: "),
    "seed too large": ("seed = 2147483648\n" + VALID, "seed = 2147483648: "),
    "one query": (VALID + "[challenger]\nnum_queries = 1\n", "challenger.num_queries = 1: "),
    "one answer": (VALID + "[solver]\ngroup_size = 1\n", "solver.group_size = 1: "),
    "temperature zero": (VALID + "[solver]\ntemperature = 0\n", "solver.temperature = 0: "),
    "top_p zero": (VALID + "[solver]\ntop_p = 0.0\n", "solver.top_p = 0.0: "),
    "top_p above 1": (VALID + "[challenger]\ntop_p = 1.5\n", "challenger.top_p = 1.5: "),
    "negative top_k": (VALID + "[solver]\ntop_k = -1\n", "solver.top_k = -1: "),
    "negative beta": (VALID + "[solver]\nbeta = -0.1\n", "solver.beta = -0.1: "),
    "negative alpha": (VALID + "[challenger]\nalpha = -1\n", "challenger.alpha = -1: "),
    "moment decay of 1": (VALID + "[learner]\nbetas = [1.0, 0.9]\n", "learner.betas"),
    "nan": (VALID + "[solver]\ntemperature = nan\n", "solver.temperature = nan: "),
    "inf": (VALID + "[learner]\nlr = inf\n", "learner.lr = inf: "),
    "minus inf": (VALID + "weight = -inf\n", "reward.main.weight = -inf: "),
    "nan for int": ("steps = nan\n" + VALID, "steps = nan: "),
    "unknown algorithm": ('algorithm = "ppo"\n' + VALID, "algorithm = 'ppo': "),
    "unknown kl": (VALID + '[learner]\nkl = "k4"\n', "learner.kl = 'k4': "),
    "unknown engine": (
        VALID + '[rollout]\nengine = "abacus"\n',
        "rollout.engine = 'abacus': must ",
    ),
    "a nucleus with vllm": (
        VALID + '[rollout]\nengine = "vllm"\n[solver]\ntop_p = 0.9\n',
        "solver.top_p = 0.9, solver.top_k = 0: vLLM gives log-probs of the distribution",
    ),
    "top_k with vllm": (
        VALID + '[rollout]\nengine = "vllm"\n[challenger]\ntop_k = 9\n',
        "challenger.top_p = 1.0, challenger.top_k = 9: ",
    ),
    "too cold for vllm": (
        VALID + '[rollout]\nengine = "vllm"\n[solver]\ntemperature = 0.005\n',
        "solver.temperature = 0.005: vLLM samples at 0.01 to 2.0 only",
    ),
    "too hot for vllm": (
        VALID + '[rollout]\nengine = "vllm"\n[challenger]\ntemperature = 2.5\n',
        "challenger.temperature = 2.5: ",
    ),
    "a question set too cold for vllm": (
        VALID + '[rollout]\nengine = "vllm"\n[eval.accuracy.s]\npath = "q"\ntemperature = 0.001\n',
        "eval.accuracy.s.temperature = 0.001: ",
    ),
    "an adapter too wide for vllm": (
        VALID.replace("[reward", "[policy.lora]\nrank = 513\n[reward")
        + '[rollout]\nengine = "vllm"\n',
        "policy.lora.rank = 513: vLLM takes at most 512;",
    ),
    "a win rate too cold for vllm": (
        VALID
        + '[rollout]\nengine = "vllm"\n[eval.win_rate.s]\npath = "q"\ntemperature = 0.001\n'
        + "[eval.win_rate.s.judge]\nmodel = 'm'\n",
        "eval.win_rate.s.temperature = 0.001: vLLM samples at 0.01 to 2.0, or greedily at 0;",
    ),
    "a judge too cold for vllm": (
        VALID.replace("[reward", "[policy.lora]\n[reward")
        + '[rollout]\nengine = "vllm"\n[self_reward]\ntemperature = 0.001\n',
        "self_reward.temperature = 0.001: ",
    ),
    "a misspelt setting of vllm": (
        VALID + "[rollout.vllm]\npyhton = 'x'\n",
        "rollout.vllm.pyhton: no such setting; did you mean rollout.vllm.python?",
    ),
    "no memory for vllm": (
        VALID + "[rollout.vllm]\nkv_cache_gib = 0\n",
        "rollout.vllm.kv_cache_gib = 0: ",
    ),
    "data for a game that poses its own": (VALID + '[data]\npath = "q.jsonl"\n', "data.path = "),
    "unknown evaluation": (VALID + '[eval]\ntasks = ["x"]\n', "eval.tasks.0 = 'x': "),
    "unknown section": (
        VALID + "[solvr]\nbeta = 1\n",
        "solvr: no such setting; did you mean solver?",
    ),
    "unknown setting": (
        VALID + "[solver]\ngroup_siz = 4\n",
        "solver.group_siz: no such setting; did you mean solver.group_size?",
    ),
    "setting of another section": (
        "lr = 1e-4\n" + VALID,
        "lr: no such setting; did you mean learner.lr?",
    ),
    "setting like nothing": (
        "zzzzz = 1\n" + VALID,
        "zzzzz: no such setting; `lsp config` lists every setting",
    ),
    "unknown setting of a reward": (
        VALID + "wieght = 1\n",
        "reward.main.wieght: no such setting; did you mean reward.main.weight?",
    ),
    "unknown reward kind": (
        '[policy]\npath = "m"\n[reward.main]\nkind = "magic"\n',
        "reward.main.kind: 'magic' is unknown; one of arena, ",
    ),
    "reward without kind": (
        '[policy]\npath = "m"\n[reward.main]\nweight = 2\n',
        "reward.main.kind: missing; one of arena, ",
    ),
    "python reward without function": (
        '[policy]\npath = "m"\n[reward.main]\nkind = "python"\n',
        "reward.main.function: missing; ",
    ),
    "no reward": ('[policy]\npath = "m"\n', "reward: no reward is configured; "),
    "no policy": ('[reward.main]\nkind = "arena"\n', "policy: missing; "),
    "no policy.path": ('[policy]\n[reward.main]\nkind = "arena"\n', "policy.path: missing; "),
    "empty policy.path": ('[policy]\npath = ""\n[reward.main]\nkind = "arena"\n', "policy.path"),
    "grpo without data": ('algorithm = "grpo"\n' + VALID, "data.path: "),
    "more tasks than templates": (
        VALID + '[challenger]\ntask = ["a", "b"]\ntemplate = ["x"]\n',
        "challenger.template: 1 given for 2 challenger.task; ",
    ),
    "no tasks at all": (VALID + "[challenger]\ntask = []\n", "challenger.task = []: "),
    "0 bytes": ("", "config.toml: the file is empty; "),
    "white space": (" \n\n", "config.toml: the file is empty; "),
    "comments only": ("# nothing\n", "policy: missing; "),
    "broken TOML": ("steps = \n" + VALID, "config.toml: not valid TOML: "),
    "a key twice": ("steps = 1\nsteps = 2\n" + VALID, "config.toml: not valid TOML: "),
    "JSON": ('{"steps": 3}', "config.toml: not valid TOML: "),
    "zero bytes": (b"\0\0\0", "config.toml: not valid TOML: "),
    "a binary file": (b"\x89PNG\r\n\x1a\n\xff\xfe", "config.toml: not a text file in UTF-8"),
}


def refusal(capsys, *arguments: str) -> str:
    """The sentence with which `lsp` refuses its arguments as bad input."""
    code = main(arguments)
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert code == 2, printed
    assert [line[:5] for line in lines] == ["lsp: "], lines
    return lines[0].removeprefix("lsp: ")


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_file_is_one_sentence_that_begins_with_its_name(mistake, tmp_path, capsys):
    text, sentence = MISTAKES[mistake]
    (tmp_path / "config.toml").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert refusal(capsys, "train", "config.toml").startswith(sentence)


def test_the_valid_part_of_these_mistakes_is_valid():
    assert Config.from_table(tomllib.loads(VALID)).policy.path == "./no-such-model"


@pytest.mark.parametrize("mistake", ["text for section", "text for reward", "int for rewards"])
def test_what_must_be_a_table_is_called_a_table(mistake):
    with pytest.raises(ConfigError) as refused:
        Config.from_table(tomllib.loads(MISTAKES[mistake][0]))
    assert "table" in str(refused.value)
    assert "instance of" not in str(refused.value)


def test_each_of_several_mistakes_has_its_sentence(tmp_path, capsys):
    (tmp_path / "config.toml").write_text(
        "steps = 0\n" + VALID + "[solver]\nbeta = -1\nmax_token = 3\n"
    )
    assert main(["train", "config.toml"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("lsp: steps = 0: ")
    assert lines[1].startswith("lsp: solver.beta = -1: ")
    assert lines[2] == (
        "lsp: solver.max_token: no such setting; did you mean solver.max_tokens? (in config.toml)"
    )


def test_a_mistake_names_the_file_that_makes_it_and_no_other(tmp_path, capsys):
    (tmp_path / "my.toml").write_text("steps = 0\n" + VALID)
    assert main(["train", "my.toml", "--seed", "x"]) == 2
    lines = sorted(capsys.readouterr().err.splitlines())
    assert [line.endswith(" (in my.toml)") for line in lines] == [False, True]
    assert [line.split(" = ")[0] for line in lines] == ["lsp: seed", "lsp: steps"]
    # A flag mends a file's mistake, and what flags and a shipped recipe make together is no file's.
    assert main(["train", "my.toml", "--steps", "x"]) == 2
    assert "my.toml" not in capsys.readouterr().err
    assert main(["train", "arena", "--algorithm", "grpo"]) == 2
    assert capsys.readouterr().err.rstrip().endswith("which poses its own")
    # A run's own settings, changed by hand.
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text("steps = 0\n" + VALID)
    assert main(["train", "--resume", "run"]) == 2
    assert capsys.readouterr().err.endswith(" (in run/config.toml)\n")


def test_whole_sentences_read_as_sentences():
    with pytest.raises(ConfigError) as refused:
        Config.from_table({"policy": {"path": "m"}})
    assert str(refused.value) == (
        "reward: no reward is configured; add a table such as [reward.main] with"
        ' kind = "python" and function = "module:function"'
    )
    with pytest.raises(ConfigError) as refused:
        Config.from_table(TABLE | {"algorithm": "grpo"})
    assert str(refused.value) == (
        'data.path: algorithm = "grpo" learns from a fixed set of queries; name a JSONL file,'
        ' or use "lsp", which poses its own'
    )
    with pytest.raises(ConfigError) as refused:
        Config.from_table(TABLE | {"policy": {}})
    assert str(refused.value) == (
        "policy.path: missing; it has no default"
        " (The model: a folder, a hub id, or `arena` for the built-in tiny model)"
    )


# ---------------------------------------------------------------- mistakes on the command line

COMMAND_LINES = {
    "no recipe": (["train"], "which RECIPE? "),
    "unknown recipe": (["train", "arean"], "arean: no such recipe or file; did you mean arena?"),
    "missing file": (["train", "nothere.toml"], "nothere.toml: no such file"),
    "mistyped file": (["train", "okk.toml"], "okk.toml: no such file; did you mean ok.toml?"),
    "mistyped name": (["train", "o.toml"], "o.toml: no such file; did you mean ok.toml?"),
    "no recipe's name": (
        ["train", "zzz"],
        "zzz: no such recipe or file; shipped recipes are arena,",
    ),
    "a folder as TOML": (["train", "folder.toml"], "folder.toml: is a folder; a file is needed"),
    "a folder": (["train", "folder"], "folder: is a folder; a file is needed"),
    "a name too long for the disk": (["train", "x" * 300], "x" * 300 + ": "),
    "a path too long for the disk": (["train", "x" * 300 + ".toml"], "x" * 300 + ".toml: "),
    "two recipes": (["train", "ok.toml", "b.toml"], "unrecognized arguments: b.toml"),
    "unknown short flag": (["train", "ok.toml", "-x"], "unrecognized arguments: -x"),
    "flag without value": (["train", "ok.toml", "--steps"], "--steps: needs a value"),
    "flag before a flag": (
        ["train", "ok.toml", "--steps", "--seed", "3"],
        "--steps: needs a value",
    ),
    "a table's flag without value": (
        ["train", "ok.toml", "--policy.lora"],
        "--policy.lora: needs a value; it is a table, whose settings are flags such as"
        " --policy.lora.rank 16",
    ),
    "a table as a switch": (
        ["train", "ok.toml", "--policy.lora", "true"],
        "policy.lora = True: must be a table, such as [policy.lora], or flags such as"
        " --policy.lora.rank 16",
    ),
    "bad value": (["train", "ok.toml", "--steps", "many"], "steps = 'many': "),
    "empty value": (["train", "ok.toml", "--steps="], "steps = '': "),
    "unknown setting": (
        ["train", "ok.toml", "--solver.group-size", "3"],
        "solver.group-size: no such setting; did you mean solver.group_size?",
    ),
    "a flag of another command": (
        ["train", "ok.toml", "--recipe", "arena"],
        "recipe: no such setting",
    ),
    "a Python name": (["train", "ok.toml", "--cls", "x"], "cls: no such setting"),
    "below a leaf": (["train", "ok.toml", "--steps.x", "3"], "steps = {'x': 3}: "),
    "unknown reward kind": (
        ["train", "ok.toml", "--reward.main.kind", "magic"],
        "reward.main.kind: 'magic' is unknown; one of arena, ",
    ),
    "--run without a folder": (["train", "ok.toml", "--run"], "argument --run: expected one"),
    "--run of nothing": (["train", "ok.toml", "--run", ""], "--run"),
    "--run of a used folder": (
        ["train", "ok.toml", "--run", "used"],
        "used: already holds a run; ",
    ),
    "--resume with --run": (
        ["train", "--resume", "used", "--run", "new"],
        "--resume takes its recipe and folder from the run; leave RECIPE and --run out",
    ),
    "--resume with a recipe": (
        ["train", "ok.toml", "--resume", "used"],
        "--resume takes its recipe and folder from the run; leave RECIPE and --run out",
    ),
    "--resume of nothing": (["train", "--resume", ""], "--resume"),
    "--resume of a missing folder": (
        ["train", "--resume", "nothere"],
        "nothere: no run here (there is no config.toml)",
    ),
    "--resume of a folder without a run": (
        ["train", "--resume", "folder"],
        "folder: no run here (there is no config.toml)",
    ),
    "--resume of a file": (
        ["train", "--resume", "ok.toml"],
        "ok.toml: no run here (there is no config.toml)",
    ),
    "--resume of a 0-byte config": (
        ["train", "--resume", "empty"],
        "empty/config.toml: holds no settings, as if the disk had lost them; put back a copy of it, or"
        " start a new run",
    ),
    "--resume of a broken config": (
        ["train", "--resume", "broken"],
        "broken/config.toml: not valid TOML: ",
    ),
    "--resume with another seed": (
        ["train", "--resume", "used", "--seed", "3"],
        "seed = 3: was 0 when the run began, and a resumed run may change only steps, ",
    ),
    "--resume with another reward": (
        ["train", "--resume", "used", "--reward.two.kind", "arena"],
        "reward.two",
    ),
    "--resume with an unknown setting": (
        ["train", "--resume", "used", "--solver.bta", "3"],
        "solver.bta: no such setting; did you mean solver.beta?",
    ),
    "unknown command": (["trian", "arena"], "'trian': no such command; did you mean train?"),
    "empty command": ([""], "'': no such command; "),
    "unknown measure": (
        ["eval", "acuracy", "arena"],
        "MEASURE = 'acuracy': no such measure; did you mean accuracy?",
    ),
    "no model to evaluate": (
        ["eval", "accuracy"],
        "the following arguments are required: MODEL (`lsp eval accuracy --help` shows how",
    ),
    "an empty model": (["eval", "accuracy", ""], "MODEL is empty; "),
    "a report without a folder": (
        ["eval", "accuracy", "arena", "--json", "no/where.json"],
        "--json no/where.json: there is no folder no",
    ),
    "a report where a folder lies": (
        ["eval", "accuracy", "arena", "--json", "folder"],
        "--json folder: is a folder; name a file",
    ),
    "no games": (["play", "arena", "--games", "0"], "--games 0: must be at least 1"),
    "games in words": (["play", "arena", "--games", "ten"], "argument --games: invalid int value"),
    "setting that starts like nothing": (["config", "zzz"], "zzz: no setting's name begins so"),
}


@pytest.mark.parametrize("mistake", COMMAND_LINES)
def test_a_mistake_on_the_command_line_is_one_sentence_that_begins_with_its_name(
    mistake, tmp_path, capsys
):
    (tmp_path / "ok.toml").write_text(VALID)
    for name in ("folder", "folder.toml", "used", "empty", "broken"):
        (tmp_path / name).mkdir()
    (tmp_path / "used" / "config.toml").write_text(VALID)
    (tmp_path / "empty" / "config.toml").write_text("")
    (tmp_path / "broken" / "config.toml").write_text("[")
    arguments, sentence = COMMAND_LINES[mistake]
    assert refusal(capsys, *arguments).startswith(sentence)


def test_an_unknown_flag_of_lsp_itself_is_named(capsys):
    assert "--verison" in refusal(capsys, "--verison")


def test_a_bad_command_line_writes_no_file(tmp_path, capsys):
    (tmp_path / "ok.toml").write_text(VALID)
    refusal(capsys, "train", "ok.toml", "--steps", "0")
    assert [path.name for path in tmp_path.iterdir()] == ["ok.toml"]


def test_from_python_the_same_mistakes_are_value_and_os_errors():
    with pytest.raises(ValueError, match=r"^steps = 0: "):
        Config.from_recipe("arena", steps=0)
    with pytest.raises(OSError, match="no such recipe or file; did you mean arena"):
        Config.from_recipe("arean")
    with pytest.raises(ValueError, match=r"^cls: no such setting"):
        Config.from_recipe("arena", cls=3)
    with pytest.raises(InputFileError, match="no such file"):
        load_recipe("nothere.toml")


def test_bad_configurations_are_refused_before_torch_is_imported(tmp_path):
    (tmp_path / "typo.toml").write_text(VALID + "[solvr]\n")
    (tmp_path / "nan.toml").write_text(VALID + "[learner]\nlr = nan\n")
    (tmp_path / "grpo.toml").write_text('algorithm = "grpo"\n' + VALID)
    code = """
import sys
from language_self_play.cli import main
for arguments in (["typo.toml"], ["nan.toml"], ["grpo.toml"], ["nothere.toml"], ["arean"], [],
                  ["typo.toml", "--dry-run"], ["--resume", "nothere"], ["arena", "--steps", "0"]):
    assert main(["train", *arguments]) == 2, arguments
    assert not {"torch", "transformers"} & set(sys.modules), arguments
"""
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert len(run.stderr.splitlines()) == 9
