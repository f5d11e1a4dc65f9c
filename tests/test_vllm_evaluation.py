"""Evaluations with the real vLLM engine: its greedy answers are transformers', and nothing is mixed or copied."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from language_self_play.arena.questions import held_out_problems
from language_self_play.chat import Chat
from language_self_play.cli import main
from language_self_play.config import GREEDY, Lora, Rollout
from language_self_play.config import Policy as PolicySection
from language_self_play.evaluate.generation import generation
from language_self_play.policy import Policy, add_adapter
from language_self_play.sampling.vllm import EngineProcess
from test_vllm import engine_processes

pytestmark = pytest.mark.slow

FLAGS = ["--method", "exact", "--max_tokens", "12"]


@pytest.fixture
def engine(vllm_python: str) -> list[str]:
    return ["--engine", "vllm", "--vllm.python", vllm_python, "--vllm.kv_cache_gib", "0.25"]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def questions() -> str:
    """60 of the arena's questions with keys, of all its tasks."""
    some = held_out_problems()[::15]
    rows = [{"question": query, "answer": problem.answer} for query, problem in some]
    assert len(rows) == 60
    Path("arena.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "arena.jsonl"


def accuracy(*arguments: str) -> int:
    return main(["eval", "accuracy", "arena", *arguments, *FLAGS])


def test_greedy_accuracy_is_transformers_answer_by_answer(questions: str, engine: list[str]):
    # The weights go straight from their folder: one for copies does not exist.
    nowhere = ["--vllm.transfer_folder", "nowhere"]
    for temperature in ("0", "0.01"):
        flags = [questions, "--temperature", temperature]
        assert accuracy(*flags, "--json", "ours.json") == 0
        assert accuracy(*flags, "--json", "theirs.json", *engine, *nowhere) == 0
        ours, theirs = (json.loads(Path(f"{name}.json").read_text()) for name in ("ours", "theirs"))
        assert ours["questions"] == theirs["questions"]
        assert (ours.pop("engine"), theirs.pop("engine")) == ("transformers", "vllm")
        assert ours == theirs
        right = [q["answers"][0]["right"] for q in theirs["questions"]]
        assert 50 < sum(right) < 60


def test_greedy_win_rates_are_transformers(questions: str, engine: list[str]):
    rows = [json.loads(line) for line in Path(questions).read_text().splitlines()]
    Path("p.json").write_text(json.dumps([{"instruction": row["question"]} for row in rows]))
    known = [
        {"instruction": r["question"], "output": r["answer"], "generator": "key"} for r in rows
    ]
    Path("keys.json").write_text(json.dumps(known))
    command = [
        "eval",
        "win-rate",
        "arena",
        "keys.json",
        "--prompts",
        "p.json",
        "--max-tokens",
        "12",
    ]
    command += ["--judge.kind", "arena", "--batch-size", "25"]
    assert main([*command, "--out", "ours"]) == 0
    assert main([*command, "--out", "theirs", *engine]) == 0
    for name in ("model_outputs.json", "annotations.json", "report.json"):
        assert Path("ours", name).read_text() == Path("theirs", name).read_text()
    assert [len(list(Path("theirs").glob(f"answers-{e}-*"))) for e in ("vllm", "transformers")] == [
        1,
        0,
    ]
    # A second time with the other engine: answers of its own.
    assert main([*command, "--out", "theirs"]) == 0
    assert [len(list(Path("theirs").glob(f"answers-{e}-*"))) for e in ("vllm", "transformers")] == [
        1,
        1,
    ]


def test_a_runs_engine_is_the_one_of_its_recipe_and_flags_lie_over_it(
    questions: str, vllm_python: str, capsys: pytest.CaptureFixture[str]
):
    flags = ["--steps", "1", "--threads", "1", "--log.progress", "none", "--eval.tasks", "[]"]
    named = ["--rollout.vllm.python", vllm_python, "--rollout.vllm.kv_cache_gib", "0.25"]
    assert main(["train", "arena-grpo", "--run", "r", *flags, *named]) == 0
    command = ["eval", "accuracy", "r", questions, *FLAGS, "--limit", "5", "--engine", "vllm"]
    assert main([*command, "--json", "a.json"]) == 0
    assert json.loads(Path("a.json").read_text())["engine"] == "vllm"
    capsys.readouterr()
    assert main([*command, "--vllm.python", "nowhere"]) == 2
    assert capsys.readouterr().err.startswith(
        "lsp: --vllm.python = 'nowhere': can't be run (No such file or directory); "
    )


def test_an_adapter_is_sampled_with_its_base(
    make_model: Callable[..., Any], endless_chat: Chat, tokenizer: Any, vllm_python: str
):
    model = make_model("llama", hidden=128)
    with torch.no_grad():
        for weight in model.parameters():
            weight *= 0.5 if weight.ndim == 2 else 1.0
    Policy(model, endless_chat).save(Path("base"))
    policy = Policy(
        model, endless_chat, adapter=add_adapter(model, "base", Lora(rank=4, alpha=64.0), 0)
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_B" in name:
                weight.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    policy.save_adapter(Path("adapter"))
    cpu, answers = torch.device("cpu"), {}
    for path in ("base", "adapter"):
        for name in ("transformers", "vllm"):
            vllm = {"python": vllm_python, "kv_cache_gib": 0.25}
            rollout = Rollout.model_validate({"engine": name, "vllm": vllm})
            section = PolicySection(path=path)
            with generation(section, rollout, cpu, "float32", 0) as (sampler, sampled):
                for step in range(2):  # what is fixed is not sent again
                    sampler.sync(sampled, step)
                    [group] = sampler.sample([[1, 20, 21, 2]], 1, "solver", GREEDY, 12)
                answers[path, name] = group.completions[0].tokens
    assert answers["base", "vllm"] == answers["base", "transformers"]
    assert answers["adapter", "vllm"] == answers["adapter", "transformers"]
    assert answers["adapter", "vllm"] != answers["base", "vllm"]


def test_after_ctrl_c_no_engine_is_left_and_only_the_same_one_goes_on(
    questions: str,
    engine: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    flags = [questions, "--temperature", "1.0", "--json", "a.json"]
    assert accuracy(*flags, *engine, "--json", "whole.json") == 0
    interrupting, asking = [False], EngineProcess._ask

    def interrupted(self: EngineProcess, request: dict[str, Any]) -> dict[str, Any]:
        if interrupting[0] and request["do"] == "sample" and len(request["prompts"]) == 60 - 32:
            raise KeyboardInterrupt
        return asking(self, request)

    monkeypatch.setattr(EngineProcess, "_ask", interrupted)
    interrupting[0] = True
    assert accuracy(*flags, *engine) == 130
    assert engine_processes() == []
    assert len(Path("a.json.part").read_text().splitlines()) == 1 + 32
    interrupting[0] = False
    capsys.readouterr()
    assert accuracy(*flags) == 2
    assert capsys.readouterr().err == (
        "lsp: a.json.part: holds answers that came from vllm, and those of transformers are not mixed"
        " with them; go on by --engine vllm, remove it, or write to another file\n"
    )
    assert accuracy(*flags, *engine) == 0
    assert "32 of 60 questions were answered before" in capsys.readouterr().err
    assert Path("a.json").read_bytes() == Path("whole.json").read_bytes()


# ---------------------------------------------------------------- mistakes

BAD = {
    "no such engine": (["--engine", "vlm"], "argument --engine: invalid choice: 'vlm'"),
    "vLLM's settings alone": (["--vllm.python", "x"], "--vllm.python: is a setting of vLLM; add"),
    "no vLLM here": (
        ["--engine", "vllm"],
        f"--vllm.python (unset, so {sys.executable}): it has no vllm",
    ),
    "no such Python": (
        ["--engine", "vllm", "--vllm.python", "nowhere"],
        "--vllm.python = 'nowhere': can't be run (No such file or directory)",
    ),
    "an empty file": (
        ["--engine", "vllm", "--vllm.python", "./empty"],
        "--vllm.python = './empty': can't be run (Permission denied)",
    ),
    "a typing error": (
        ["--engine", "vllm", "--vllm.pyton", "x"],
        "--vllm.pyton: no such setting; did you mean --vllm.python?",
    ),
    "no number": (
        ["--engine", "vllm", "--vllm.kv_cache_gib", "x"],
        "--vllm.kv_cache_gib = 'x': must be",
    ),
    "a setting of training": (
        ["--engine", "vllm", "--vllm.sleep", "false"],
        "--vllm.sleep: has no effect where nothing learns",
    ),
    "too cold": (
        ["--engine", "vllm", "--temperature", "0.001"],
        "--temperature 0.001: vLLM samples at 0.01 to 2.0, or greedily at 0; choose",
    ),
    "too hot": (["--engine", "vllm", "--temperature", "2.5"], "--temperature 2.5: vLLM samples at"),
    "no value": (["--engine", "vllm", "--vllm.python"], "--vllm.python: needs a value"),
    "two engines": (
        ["--engine", "vllm", "--vllm.server", "http://h:1", "--vllm.memory_fraction", "0.5"],
        "--vllm.memory_fraction: is for an engine that the run starts, and --vllm.server",
    ),
    "as in a recipe": (["--rollout.engine", "vllm"], "--rollout: an evaluation has --engine"),
    "no section": (["--rollout.vllm", "3"], "--rollout: an evaluation has --engine"),
}


@pytest.mark.parametrize("measure", ["accuracy", "win-rate"])
@pytest.mark.parametrize("what", BAD)
def test_a_mistake_is_one_sentence_before_anything_loads(
    what: str, measure: str, questions: str, capsys: pytest.CaptureFixture[str]
):
    flags, sentence = BAD[what]
    Path("empty").touch()
    command = ["eval", measure, "arena"]
    if measure == "accuracy":
        command += [questions, "--json", "a.json"]
    else:
        command += ["own-copy", "--prompts", questions, "--judge.kind", "arena", "--out", "out"]
    assert main([*command, *flags]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"lsp: {sentence}")
    assert not Path("out").exists()
    assert not Path("a.json.part").exists()


@pytest.mark.parametrize(
    "measure",
    [
        "accuracy arena empty.jsonl",
        "win-rate arena own-copy --prompts empty.jsonl --judge.kind arena",
        "alpaca arena --baseline own-copy --instructions empty.jsonl --judge.kind arena",
    ],
)
def test_a_server_that_is_away_is_told_by_the_flag_that_named_it_before_any_file_is_read(
    measure: str, capsys: Any
):
    Path("empty.jsonl").touch()
    command = ["eval", *measure.split(), "--engine", "vllm"]
    assert main([*command, "--vllm.server", "http://127.0.0.1:1"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line == (
        "lsp: --vllm.server = 'http://127.0.0.1:1': nothing answers there (Connection refused); start it"
        " by `lsp vllm-serve`, or correct the address (docs/vllm.md)"
    )


@pytest.mark.parametrize("flag", [["--engine", "vllm"], ["--vllm.python", "x"]])
def test_what_generates_nothing_takes_no_engine(
    flag: list[str], capsys: pytest.CaptureFixture[str]
):
    assert main(["eval", "accuracy", "arena", *flag]) == 2
    assert capsys.readouterr().err.startswith(f"lsp: {flag[0]}: has no effect on the arena's")
    assert main(["eval", "alpaca", "--annotations", "a.json", *flag]) == 2
    name = flag[0].split(".")[0]
    assert capsys.readouterr().err.startswith(f"lsp: {name}: is not used with --annotations")


def test_pickled_weights_are_not_given_to_the_engine(
    tiny_llama: Any, endless_chat: Chat, vllm_python: str, questions: str, capsys: Any
):
    Policy(tiny_llama, endless_chat).save(Path("m"))
    torch.save(tiny_llama.state_dict(), "m/pytorch_model.bin")
    Path("m/model.safetensors").unlink()
    flags = ["--engine", "vllm", "--vllm.python", vllm_python]
    assert main(["eval", "accuracy", "m", questions, *flags]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "lsp: MODEL = 'm': can't be loaded: it has no file *.safetensors"
    )
