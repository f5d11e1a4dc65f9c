"""The `lsp` command: quick to answer, exit codes, recipes, settings, models that aren't there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

import language_self_play
from language_self_play import errors
from language_self_play.cli import COMMANDS, main, naming_model
from language_self_play.cli.evaluate import MEASURES
from language_self_play.config import Config
from language_self_play.recipe_files import recipe_names, recipe_text
from language_self_play.settings import fields

MODULE = [sys.executable, "-m", "language_self_play"]
SCRIPT = [str(Path(sys.executable).with_name("lsp"))]

# What a shell gives a command: a buffered standard output in UTF-8.
ENVIRONMENT = {
    k: v for k, v in os.environ.items() if k not in ("PYTHONUNBUFFERED", "LSP_TRACEBACK")
}
ENVIRONMENT |= {"PYTHONIOENCODING": "utf-8"}


def lsp(*arguments, command=MODULE, **options):
    return subprocess.run(
        [*command, *arguments],
        **{"capture_output": True, "text": True, "timeout": 120, "env": ENVIRONMENT} | options,
    )


# ---------------------------------------------------------------- at once, without torch

ANSWERS_AT_ONCE = [
    ["--version"],
    ["--help"],
    [],
    *[[name, "--help"] for name in COMMANDS],
    *[["eval", measure, "--help"] for measure in MEASURES],
    ["recipes", "copy", "--help"],
]


@pytest.mark.parametrize("arguments", ANSWERS_AT_ONCE, ids=" ".join)
def test_versions_and_help_are_answered_without_importing_anything_heavy(arguments):
    imported = [sys.executable, "-X", "importtime", "-m", "language_self_play"]
    answer = lsp(*arguments, command=imported)
    assert answer.returncode == 0
    modules = {line.rsplit("|", 1)[-1].strip() for line in answer.stderr.splitlines()}
    assert "language_self_play.cli" in modules
    assert not modules & {"torch", "transformers", "pydantic", "tomli_w", "rich"}
    assert answer.stdout == f"{language_self_play.__version__}\n" or "usage: lsp" in answer.stdout


@pytest.mark.parametrize("arguments", [["recipes"], ["recipes", "show", "arena"], ["config"]])
def test_recipes_and_settings_are_shown_without_torch(arguments):
    imported = [sys.executable, "-X", "importtime", "-m", "language_self_play"]
    answer = lsp(*arguments, command=imported)
    assert answer.returncode == 0
    modules = {line.rsplit("|", 1)[-1].strip() for line in answer.stderr.splitlines()}
    assert "language_self_play.recipe_files" in modules
    assert not modules & {"torch", "transformers"}


def test_the_console_script_is_the_same_command():
    script, module = (lsp("--version", command=command) for command in (SCRIPT, MODULE))
    assert script.stdout == module.stdout == f"{language_self_play.__version__}\n"
    refused = lsp("nonsense", command=SCRIPT)
    assert refused.returncode == 2
    assert refused.stderr.startswith("lsp: 'nonsense': no such command; ")


def test_help_names_every_command_with_its_meaning():
    text = lsp("--help").stdout
    for name, (_, meaning) in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(meaning)}$", text, re.MULTILINE)
    assert "lsp train arena" in text


def test_every_flag_that_help_shows_for_train_is_explained():
    text = lsp("train", "--help").stdout
    for flag in ("--run DIR", "--resume DIR", "--dry-run"):
        assert flag in text
    assert "75 paused and resumable" in text


def test_a_ctrl_c_more_while_an_interrupted_command_ends_adds_nothing():
    code = """
import atexit, os, signal, sys
from language_self_play import cli
def interrupted(arguments):
    raise KeyboardInterrupt
cli._run = interrupted
atexit.register(os.kill, os.getpid(), signal.SIGINT)
sys.exit(cli.main())
"""
    done = lsp("-c", code, command=[sys.executable])
    assert (done.returncode, done.stderr) == (130, "\nlsp: interrupted\n")


def test_warnings_name_what_was_typed_however_they_are_made():
    class OfTwoWords(UserWarning):
        def __init__(self, one: str, other: str):
            super().__init__(f"{one} {other}")

    def as_typed(said: str) -> str:
        return said.replace("policy.path", "MODEL")

    with pytest.warns(OfTwoWords, match="^MODEL odd$"), errors.renaming(as_typed):
        warnings.warn(OfTwoWords("policy.path", "odd"), stacklevel=1)


# ---------------------------------------------------------------- exit codes


def test_lsp_alone_shows_its_help(capsys):
    assert main([]) == 0
    assert capsys.readouterr().out.startswith("usage: lsp")


@pytest.mark.parametrize(
    ("name", "kin", "code"),
    [
        ("ConfigError", ValueError, 2),
        ("InputFileError", OSError, 2),
        ("ModelError", ValueError, 2),
        ("RewardError", ValueError, 2),
        ("RunFolderError", OSError, 2),
        ("NonFiniteError", ArithmeticError, 3),
        ("Paused", InterruptedError, 75),
    ],
)
def test_each_error_is_its_standard_kin_and_has_its_exit_code(name, kin, code, monkeypatch, capsys):
    error = getattr(errors, name)
    assert issubclass(error, errors.LspError)
    assert issubclass(error, kin)
    assert run_command_that_raises(error("a sentence"), monkeypatch) == code
    assert capsys.readouterr().err == "lsp: a sentence\n"


def test_the_tree_in_the_docstring_of_errors_is_the_tree():
    drawn = {
        line.split("─ ")[1].split()[0]: line.split("exit code ")[1]
        for line in (errors.__doc__ or "").splitlines()
        if "─ " in line
    }
    assert drawn == {cls.__name__: str(cls.exit_code) for cls in errors.LspError.__subclasses__()}


def test_what_is_said_of_policy_path_names_the_argument_that_was_typed(monkeypatch, capsys):
    def speak(arguments):
        with naming_model():
            warnings.warn("policy.path = 'x': its context, not my.policy.path", stacklevel=1)
            raise errors.NonFiniteError("policy.path = 'x': no number")

    monkeypatch.setattr("language_self_play.cli.recipes.run", speak)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main(["recipes"]) == 3
    assert capsys.readouterr().err.splitlines() == [
        "lsp: warning: MODEL = 'x': its context, not my.policy.path",
        "lsp: MODEL = 'x': no number",
    ]


def test_an_interrupt_ends_with_130_and_no_traceback(monkeypatch, capsys):
    assert run_command_that_raises(KeyboardInterrupt(), monkeypatch) == 130
    assert capsys.readouterr().err == "\nlsp: interrupted\n"


def test_an_internal_error_is_one_sentence_and_exit_code_1(monkeypatch, capsys):
    monkeypatch.delenv("LSP_TRACEBACK", raising=False)
    assert run_command_that_raises(RuntimeError("the moon is full"), monkeypatch) == 1
    assert capsys.readouterr().err == (
        "lsp: internal error: RuntimeError: the moon is full. This is a bug;"
        " LSP_TRACEBACK=1 shows where, please report it\n"
    )


def test_the_traceback_of_an_internal_error_is_shown_on_request(monkeypatch, capsys):
    monkeypatch.setenv("LSP_TRACEBACK", "1")
    assert run_command_that_raises(RuntimeError("the moon is full"), monkeypatch) == 1
    assert capsys.readouterr().err.startswith("Traceback (most recent call last):")


def run_command_that_raises(error, monkeypatch):
    def fail(arguments):
        raise error

    monkeypatch.setattr("language_self_play.cli.recipes.run", fail)
    return main(["recipes"])


def test_help_is_filled_to_the_terminal_and_its_examples_are_left_as_they_are():
    said = lsp("train", "--help", env={**ENVIRONMENT, "COLUMNS": "60"}).stdout
    prose = said[said.index("RECIPE is") : said.index("positional")]
    assert max(map(len, prose.splitlines())) <= 60
    assert "  lsp train --resume runs/first                  go on where it stopped\n" in said


# ---------------------------------------------------------------- recipes


def test_recipes_lists_each_with_its_first_line(capsys):
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert main(["recipes", "list"]) == 0
    assert capsys.readouterr().out == listed
    lines = listed.splitlines()
    assert [line.split()[0] for line in lines] == recipe_names()
    assert lines[0].startswith("arena           Language Self-Play in the built-in arena: ")


def test_recipes_show_prints_the_recipe_as_it_is(capsys):
    assert main(["recipes", "show", "arena"]) == 0
    assert capsys.readouterr().out == recipe_text("arena")


def test_recipes_copy_writes_one_that_trains_as_the_shipped_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["recipes", "copy", "arena"]) == 0
    assert capsys.readouterr().out == "arena.toml written; run it by: lsp train arena.toml\n"
    assert Config.from_recipe("arena.toml") == Config.from_recipe("arena")
    assert main(["recipes", "copy", "arena", "mine.toml"]) == 0
    assert (tmp_path / "mine.toml").read_text("utf-8") == recipe_text("arena")


def test_recipes_copy_refuses_to_overwrite(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "arena.toml").write_text("mine")
    assert main(["recipes", "copy", "arena"]) == 2
    assert capsys.readouterr().err == "lsp: arena.toml: exists already; name another FILE\n"
    assert (tmp_path / "arena.toml").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["show", "nope"], "nope: no such recipe; shipped recipes are arena, "),
        (["copy", "arena-zeor"], "arena-zeor: no such recipe; did you mean arena-zero?"),
        (["copy", "arena", "no/where.toml"], "no/where.toml: can't be written (No such file"),
        (["copy", "arena", "."], ".: exists already; name another FILE"),
        (["show"], "the following arguments are required: NAME"),
        (["burn", "arena"], "argument list | show | copy: invalid choice: 'burn'"),
    ],
)
def test_recipes_refuses_in_one_sentence(arguments, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["recipes", *arguments]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"lsp: {sentence}")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- settings


def test_config_lists_every_setting_with_type_default_and_meaning(capsys):
    assert main(["config"]) == 0
    text = capsys.readouterr().out
    heads = [line.split("  (")[0] for line in text.splitlines() if not line.startswith((" ", "["))]
    assert heads == [field.name for field in fields(Config)]
    assert 'algorithm  ("lsp" | "lsp-zero" | "grpo"; "lsp")\n' in text
    assert "policy.path  (text; required)\n    The model: a folder, a hub id, or " in text
    assert "threads  (int; unset)\n" in text
    assert "solver.group_size  (int; 8)\n    G, answers to each query. Our choice.\n" in text
    assert '[reward.NAME] with kind = "arena"; NAME is yours to choose\n    1 for the one' in text


def test_config_shows_only_the_settings_that_begin_so(capsys):
    assert main(["config", "solver.t"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]
    assert [line.split()[0] for line in lines] == [
        "solver.temperature",
        "solver.top_p",
        "solver.top_k",
        "solver.truncated",
        "solver.truncation_penalty",
    ]


def test_config_as_json_is_one_object_a_setting(capsys):
    assert main(["config", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["name"] for row in rows] == [field.name for field in fields(Config)]
    [row] = [row for row in rows if row["name"] == "solver.group_size"]
    assert row == {
        "name": "solver.group_size",
        "type": "int",
        "default": 8,
        "required": False,
        "description": "G, answers to each query. Our choice.",
        "kind": None,
    }


# ---------------------------------------------------------------- output that can't be delivered


def test_a_reader_that_leaves_early_is_met_with_silence():
    with subprocess.Popen(
        [*MODULE, "config"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    ) as process:
        assert process.stdout.readline().startswith("algorithm")
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(120) == 0


@pytest.mark.parametrize("arguments", [["--help"], ["recipes"], ["config"], ["config", "seed"]])
def test_a_reader_that_has_left_is_met_with_silence(arguments):
    # What fits into the buffer of standard output is written when the command is over.
    reader, writer = os.pipe()
    os.close(reader)
    try:
        answer = lsp(*arguments, capture_output=False, stdout=writer, stderr=subprocess.PIPE)
    finally:
        os.close(writer)
    assert answer.stderr == ""
    assert answer.returncode == 0


def test_a_reader_of_a_plan_that_has_left_is_met_with_silence():
    reader, writer = os.pipe()
    os.close(reader)
    try:
        answer = lsp(
            *("train", "arena", "--device", "cpu", "--dry-run"),
            capture_output=False,
            stdout=writer,
            stderr=subprocess.PIPE,
        )
    finally:
        os.close(writer)
    assert (answer.returncode, answer.stderr) == (0, "")


def test_a_program_that_ends_itself_for_another_reason_keeps_its_code(monkeypatch):
    monkeypatch.setattr("language_self_play.cli._run", lambda _: sys.exit(7))
    with pytest.raises(SystemExit) as end:
        main(["config"])
    assert end.value.code == 7


def test_a_run_whose_output_nobody_reads_any_more_is_played_to_its_end(tmp_path):
    flags = "--steps=3 --threads=1 --eval.tasks=[] --device=cpu --log.game_every_s=0.001".split()
    with subprocess.Popen(
        [*MODULE, "train", "arena-zero", "--run", str(tmp_path / "run"), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    ) as process:
        assert process.stdout.readline().startswith("Loading torch")
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(120) == 0
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_terminal_without_greek_letters_still_gets_the_settings(encoding):
    answer = lsp("config", env=ENVIRONMENT | {"PYTHONIOENCODING": encoding}, encoding=encoding)
    assert answer.stderr == ""
    assert answer.returncode == 0
    assert "solver.group_size  (int; 8)\n" in answer.stdout


# ---------------------------------------------------------------- models that aren't there


@pytest.mark.parametrize("command", [["eval", "accuracy"], ["play"]], ids=" ".join)
@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("./nothere", "./nothere: no such folder"),
        ("runs/arena/model", "runs/arena/model: no such folder"),
        ("runs/arena", "runs/arena: no such folder"),  # nor is there a folder runs/
        ("file", "file: is a file; a model is a folder with config.json and safetensors"),
        ("empty", "empty: the folder holds no config.json, so it is no model"),
        (
            "outer",
            "outer: the folder holds no config.json, so it is no model; did you mean outer/model?",
        ),
    ],
)
def test_what_is_no_model_is_refused_in_one_sentence(
    command, model, sentence, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("no model")
    (tmp_path / "empty").mkdir()
    (tmp_path / "outer" / "model").mkdir(parents=True)
    (tmp_path / "outer" / "model" / "config.json").write_text("{}")
    assert main([*command, model]) == 2
    assert capsys.readouterr().err == f"lsp: {sentence}\n"


def make_run(folder):
    (folder / "checkpoints").mkdir(parents=True)
    table = '[policy]\npath = "arena"\n[reward.r]\nkind = "arena"\n'
    (folder / "config.toml").write_text(table)
    return folder


@pytest.fixture
def no_hub(monkeypatch):
    """Any look at the hub, even into its cache, fails the test."""
    for name in ("cached_file", "find_adapter_config_file"):
        monkeypatch.setattr(
            f"transformers.utils.{name}", lambda *_, **__: pytest.fail("the hub was asked")
        )


@pytest.mark.parametrize("command", [["eval", "accuracy"], ["play"], ["train"]], ids=" ".join)
@pytest.mark.parametrize(
    ("model", "hint"),
    [
        ("runs/arnea", "; did you mean runs/arena?"),
        ("runs/zzz", ""),
        ("kept/arnea", "; did you mean kept/arena?"),
        ("kept/zzz", ""),
        ("runs/arena/modle", "; did you mean runs/arena/model?"),
        ("./rnus", "; did you mean runs?"),
        ("minstral/", "; did you mean minstrel?"),
        ("minstrle", "; did you mean minstrel?"),
        ("arean", "; did you mean arena?"),
    ],
)
def test_a_mistyped_folder_is_told_with_the_nearest_and_no_hub_is_asked(
    command, model, hint, no_hub, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (make_run(tmp_path / "runs" / "arena") / "model").mkdir()
    make_run(tmp_path / "kept" / "arena")
    make_run(tmp_path / "minstrel")
    flag = ["arena", "--policy.path"] if command == ["train"] else []
    assert main([*command, *flag, model]) == 2
    assert capsys.readouterr().err == f"lsp: {model}: no such folder{hint}\n"


@pytest.mark.parametrize("model", ["gpt2", "meta-llama/Llama-3.2-1B", "minstrel-large/x"])
def test_a_hub_id_is_no_mistyped_folder_for_being_a_little_like_one(model, tmp_path, monkeypatch):
    from language_self_play.pretrained import resolve_model

    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "gpt2-arena")
    (tmp_path / "meta-llama" / "Llama-3.2-3B").mkdir(parents=True)  # beside it, but no run
    assert resolve_model(model) == model


def test_a_missing_policy_folder_is_told_before_a_hub_is_asked_about_a_reward(
    no_hub, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    reward = "--reward.answer.kind=reward_model --reward.answer.path=someone/a-reward-model"
    assert main(["train", "arena", "--policy.path", "./mdoel", *reward.split()]) == 2
    assert capsys.readouterr().err == "lsp: ./mdoel: no such folder\n"


@pytest.mark.parametrize("command", [["eval", "accuracy"], ["play"]], ids=" ".join)
def test_a_run_without_a_checkpoint_has_nothing_to_play_and_says_so(
    command, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run")
    assert main([*command, "run"]) == 2
    assert capsys.readouterr().err == (
        "lsp: run: has no model yet, as no checkpoint has been written;"
        " go on with the run by: lsp train --resume run\n"
    )


@pytest.mark.parametrize("command", [["eval", "accuracy"], ["play"]], ids=" ".join)
@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"model_type": "abacus"}', '{"model_type": 3}']
)
def test_a_damaged_model_folder_is_refused_in_one_sentence(
    command, content, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(content)
    assert main([*command, "./model"]) == 2
    # transformers may have had a word before.
    [line] = [s for s in capsys.readouterr().err.splitlines() if "[transformers]" not in s]
    assert line.startswith("lsp: MODEL = './model': can't be loaded: ")


def test_a_device_that_is_not_there_is_refused_in_one_sentence(capsys):
    assert main(["eval", "accuracy", "arena", "--device", "abacus"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("lsp: --device = 'abacus': can't be used here: ")


# ---------------------------------------------------------------- what `lsp play` plays


def test_play_refuses_a_recipe_without_rewards_or_plays_it_but_never_fails(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text('[policy]\npath = "m"\n[solver]\nmax_tokens = 9\n')
    assert main(["play", "./nothere", "--recipe", "mine.toml"]) == 2
    assert capsys.readouterr().err == "lsp: ./nothere: no such folder\n"


def test_play_takes_its_model_from_the_argument_alone(capsys):
    assert main(["play", "arena", "--policy.path", "./other"]) == 2
    assert capsys.readouterr().err == (
        "lsp: --policy.path ./other: the model to play is MODEL = 'arena'; name it there\n"
    )


def test_play_is_not_misled_by_a_config_toml_that_is_no_runs(tmp_path, monkeypatch):
    from language_self_play.cli.play import config_for

    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.toml").write_text("[tool]\nname = 'another program'\n")
    config = config_for("arena", None, {})
    assert config.policy.path == "arena"
    assert config.challenger == Config.from_recipe("arena").challenger


@pytest.mark.parametrize("model", ["run", "run/model"])
def test_play_takes_prompts_and_rewards_from_the_run_that_the_model_comes_from(
    model, tmp_path, monkeypatch
):
    from language_self_play.cli.play import config_for

    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints").mkdir()
    (tmp_path / "run" / "config.toml").write_text(
        'algorithm = "lsp-zero"\ndevice = "cuda"\n[policy]\npath = "m"\n[solver]\nmax_tokens = 9\n'
        '[challenger]\ntask = "riddles"\n[reward.r]\nkind = "arena"\n'
    )
    config = config_for(model, None, {"solver": {"temperature": 0.5}})
    assert config.policy.path == "run/model"
    assert config.algorithm == "lsp"
    assert config.device == "auto"  # of this machine, not of the one that trained it
    assert (config.solver.max_tokens, config.solver.temperature) == (9, 0.5)
    assert config.challenger.task == "riddles"
    assert list(config.reward) == ["r"]


def test_play_shows_a_model_without_run_or_recipe_with_no_reward():
    from language_self_play.cli.play import config_for, no_reward

    config = config_for("./some-model", None, {})
    [reward] = config.reward.values()
    assert reward.function == "language_self_play.cli.play:no_reward"
    assert no_reward(["q", "q"], ["a", "b"]) == [0.0, 0.0]


@pytest.mark.parametrize("recipe", ["arena", "arena-zero", "arena-grpo"])
def test_what_the_tiny_model_learned_can_be_played_whichever_recipe_taught_it(
    recipe, tmp_path, monkeypatch
):
    # Its context has 128 tokens: prompts must be those that it knows, not the long default ones.
    from language_self_play.arena.tiny_model import MAX_POSITIONS, build_tokenizer
    from language_self_play.chat import Chat
    from language_self_play.cli.play import config_for
    from language_self_play.game import challenger_prompts
    from language_self_play.prompts import judge_prompt, rubric_text

    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints").mkdir()
    (tmp_path / "run" / "config.toml").write_text(Config.from_recipe(recipe).to_toml(), "utf-8")
    config = config_for("run", None, {})
    tokenizer = build_tokenizer()
    chat = Chat(tokenizer, [tokenizer.eos_token_id], {})
    [prompt] = challenger_prompts(config)
    assert len(chat.encode(prompt.text)) < MAX_POSITIONS
    rubric = rubric_text(config.self_reward.rubric)
    assert len(chat.encode(judge_prompt(rubric, "27+48", "57"))) < MAX_POSITIONS


class ScriptedGame:
    """A game of a Challenger that poses the given queries and a Solver that always says 57."""

    def __init__(self, queries):
        from language_self_play.types import Completion, Group, Query

        self.queries = [Query(*query) for query in queries]
        self.in_arena = True
        self.config = Config.from_recipe("arena", solver={"group_size": 2})
        reply = Completion([], "57", [], "stop")
        chat = SimpleNamespace(encode=lambda query, system: [0])
        self.sampler = SimpleNamespace(
            chat=chat,
            context_length=128,
            sample=lambda prompts, n, *rest: [Group(p, [reply] * n) for p in prompts],
        )

    def sync(self, step):
        pass

    def pose(self, step):
        from language_self_play.types import Posed

        return Posed("challenger", [], 1.0, all_queries=self.queries)

    def reward(self, queries, answers):
        import torch

        from language_self_play.rewards.arena import ArenaVerifier

        return torch.tensor(ArenaVerifier()(queries, answers, [None] * len(queries)))

    def self_reward(self, queries, answers):
        import torch

        return torch.full((len(queries), len(answers[0])), 3.5)


def test_play_prints_valid_and_invalid_queries_in_order(capsys):
    from language_self_play.cli.play import watch

    watch(ScriptedGame([("27+48",), ("oops\x1b[2J", False, "truncated"), ("[red]1+1",)]), 3)
    legend, _, games = capsys.readouterr().out.partition("→ 57).\n")
    assert legend.startswith("query  →  best answer  |  worst answer, each with its")
    lines = games.splitlines()
    assert lines[0] == "   1  27+48  →  57 (R 1, R_Q 3.50)  |  57 (R 1, R_Q 3.50)   V 1.00"
    assert lines[1] == "   2  oops\\x1b[2J  invalid: truncated"
    assert lines[2].startswith("   3  [red]1+1  →  57 (R 0, R_Q 3.50)")
    assert len(lines) == 3


def test_answering_yourself_accepts_numbers_as_usual_and_keeps_the_score(monkeypatch, capsys):
    from language_self_play.cli.play import answer_yourself

    typed = iter(["75", "", "6"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    answer_yourself(ScriptedGame([("27+48",), ("1+1",)]), 2)
    out = capsys.readouterr().out
    # 75 is right, as 57 units first; the empty line skips 1+1; then 27+48 comes again.
    assert "1/2  27+48\n  the Solver says 57\n  rewards: you 1, the Solver 1\n" in out
    assert "2/2  27+48\n  the Solver says 57\n  rewards: you 0, the Solver 1\n" in out
    assert out.endswith("\nAfter 2 games: you 1, the Solver 2.\n")


def test_answering_yourself_ends_with_the_input(monkeypatch, capsys):
    from language_self_play.cli.play import answer_yourself

    def leave(prompt):
        raise EOFError

    monkeypatch.setattr("builtins.input", leave)
    answer_yourself(ScriptedGame([("27+48",)]), 3)
    assert "games:" not in capsys.readouterr().out
