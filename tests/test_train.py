"""The loop as a whole: on real models, interrupted, resumed, continued as a next stage."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib import resources
from pathlib import Path

import pytest

from language_self_play import Config, self_play
from language_self_play.errors import (
    ConfigError,
    ModelError,
    NonFiniteError,
    Paused,
    RunFolderError,
    ServiceError,
)
from language_self_play.recipe_files import load_recipe, merge
from language_self_play.run_folder import RunFolder

SMALL = {
    "steps": 4,
    "threads": 1,
    "challenger": {"num_queries": 6},
    "solver": {"group_size": 3},
    "eval": {"every": 2, "tasks": []},
    "checkpoint": {"every": 2, "keep_last": 9},
    "log": {"progress": "none"},
}


def small(recipe: str = "arena", **overrides) -> Config:
    return Config.from_table(merge(merge(load_recipe(recipe), SMALL), overrides))


def reproducible(record: dict) -> dict:
    return {k: v for k, v in record.items() if not k.startswith(("time/", "memory/"))}


def events(run: RunFolder) -> list[dict]:
    return [json.loads(line) for line in run.events_file.read_text().splitlines()]


def assert_same_run(one: RunFolder, other: RunFolder) -> None:
    assert list(map(reproducible, one.metrics())) == list(map(reproducible, other.metrics()))
    files = sorted(f.name for f in one.games_folder.iterdir())
    assert files == sorted(f.name for f in other.games_folder.iterdir())
    for name in files:
        assert (one.games_folder / name).read_bytes() == (other.games_folder / name).read_bytes()
    weights = "model.safetensors"
    assert (one.model_folder / weights).read_bytes() == (other.model_folder / weights).read_bytes()


@pytest.mark.parametrize("recipe", ["arena", "arena-zero", "arena-grpo"])
def test_every_algorithm_plays_and_records(recipe, tmp_path):
    run = self_play(small(recipe, eval={"tasks": ["arena"]}), tmp_path / "run")
    records = list(run.metrics())
    assert [r["step"] for r in records] == [0, 1, 2, 3, 4]
    assert [r["step"] for r in records if "eval/sampled_accuracy" in r] == [0, 2, 4]
    assert set(records[-1]) == {"step", *(k for k in records[-1] if k.startswith("eval/"))}
    assert ("quality/mean" in records[0]) == (recipe == "arena")
    assert ("queries/valid_fraction" in records[0]) == (recipe != "arena-grpo")
    assert records[0]["kl/solver"] == pytest.approx(0.0, abs=1e-6)  # version 0 is the reference
    assert records[3]["kl/solver"] > 0
    answered = [g for g in run.games(0) if g["valid"]]
    assert len(run.games(0)) == 6
    for game in answered:
        # A_Sol = (R + R_Q) - mean_G(R + R_Q).
        totals = [a["reward"] + a["quality"] for a in game["answers"]]
        assert len(totals) == 3
        for answer, total in zip(game["answers"], totals, strict=True):
            assert answer["advantage"] == pytest.approx(total - sum(totals) / 3, abs=1e-5)
        if recipe != "arena-grpo":
            # r = V_Q - V.
            value = sum(a["reward"] for a in game["answers"]) / 3
            quality = sum(a["quality"] for a in game["answers"]) / 3
            assert game["challenger_reward"] == pytest.approx(quality - value, abs=1e-5)


def test_a_resumed_run_is_the_uninterrupted_run_bit_for_bit(tmp_path):
    whole = self_play(small(), tmp_path / "whole")
    part = self_play(small(steps=2), tmp_path / "part")
    # As if it had been killed in the middle of step 3: a record and a game too many, half a line.
    with part.metrics_file.open("a") as file:
        file.write('{"step": 2, "loss": 1.0}\n{"step": 3, "lo')
    spoilt = part.games_folder / "step-000002.jsonl"
    spoilt.write_text('{"query": "spoilt", "answers": []}\n')
    resumed = self_play(part.resumed_config({"steps": 4}), tmp_path / "part", resume=True)
    assert_same_run(whole, resumed)


def test_what_a_recipe_leaves_open_is_written_as_it_was_resolved_and_kept(tmp_path, monkeypatch):
    import torch

    import language_self_play.game as game

    monkeypatch.setattr(game, "choose_device", lambda name: torch.device("cpu"))  # of auto
    run = self_play(small(steps=1, device="auto", dtype="auto", threads=None), tmp_path / "run")
    table = run.config()
    assert (table["device"], table["dtype"]) == ("cpu", "float32")
    assert table["threads"] == torch.get_num_threads()
    # Resumed where auto would be another device, it stays where it was ...
    asked = []
    monkeypatch.setattr(
        game, "choose_device", lambda name: asked.append(name) or torch.device("cpu")
    )
    self_play(run.resumed_config({"steps": 2}), run.folder, resume=True)
    self_play(run.resumed_config({"steps": 3, "device": "auto"}), run.folder, resume=True)
    assert asked == ["cpu", "cpu"]
    # ... and moves if it is told to.
    self_play(run.resumed_config({"steps": 4, "device": "cuda"}), run.folder, resume=True)
    assert asked[2:] == ["cuda"]


def test_a_run_of_a_device_that_is_not_here_says_how_to_move_it(tmp_path):
    run = self_play(small(steps=1, device="cpu"), tmp_path / "run")
    run.config_file.write_text(run.config_file.read_text().replace('"cpu"', '"cuda:77"'))
    with pytest.raises(
        ConfigError, match=r"^device = 'cuda:77': can't be used here: .*--device cpu"
    ):
        self_play(run.resumed_config({"steps": 2}), run.folder, resume=True)
    moved = run.resumed_config({"steps": 2, "device": "cpu"})
    self_play(moved, run.folder, resume=True)
    assert run.config()["device"] == "cpu"


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class MyConfig(LlamaConfig):
    model_type = "mine"

class MyModel(LlamaForCausalLM):
    config_class = MyConfig

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 0.5 * output.logits  # which a Llama of these weights does not
        return output
"""


@pytest.fixture
def own_code(tmp_path) -> Path:
    """A model that only its authors' code makes."""
    arena = resources.files("language_self_play") / "arena" / "model"
    folder = Path(shutil.copytree(str(arena), tmp_path / "mine"))
    (folder / "mine.py").write_text(OWN_CODE)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "mine",
        "architectures": ["MyModel"],
        "auto_map": {"AutoConfig": "mine.MyConfig", "AutoModelForCausalLM": "mine.MyModel"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("lora", [False, True])
def test_a_model_of_its_authors_code_resumes_bit_for_bit_and_goes_on_as_one(
    lora, own_code, tmp_path, monkeypatch
):
    import transformers.dynamic_module_utils as dynamic

    # Where transformers keeps the code that it runs, or else it lies in the user's cache.
    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    policy = {"path": str(own_code), "trust_remote_code": True}
    settings = {"policy": policy | ({"lora": {"rank": 4}} if lora else {})}
    whole = self_play(small("arena-zero", **settings), tmp_path / "whole")
    part = self_play(small("arena-zero", **settings), tmp_path / "part")
    shutil.rmtree(part.checkpoints_folder / "step-000004")  # as if killed while it was written
    resumed = self_play(part.resumed_config({}), part.folder, resume=True)
    assert_same_run(whole, resumed)
    # Its code is what played: from the same weights a plain Llama draws at half the temperature.
    plain = self_play(small("arena-zero", steps=1), tmp_path / "plain")
    entropy = [next(run.metrics())["entropy/challenger"] for run in (whole, plain)]
    assert entropy[0] > entropy[1] + 0.1
    # What it saved is whole: the next stage begins with it.
    next_stage = {"policy": policy | {"path": str(resumed.model_folder)}, "steps": 1}
    config = small("arena-zero", **next_stage)
    (own_code / "mine.py").unlink()
    run = self_play(config, tmp_path / "next")
    assert next(run.metrics())["kl/solver"] == pytest.approx(0.0, abs=1e-6)
    untrusted = small(steps=1, policy={"path": str(resumed.model_folder)})
    with pytest.raises(ModelError, match="trust_remote_code"):
        self_play(untrusted, tmp_path / "untrusted")


VARIANTS = {
    "lora": {"policy": {"lora": {"rank": 4}}},
    "bfloat16": {"dtype": "bfloat16"},
    "lora in bfloat16": {"dtype": "bfloat16", "policy": {"lora": {"rank": 4}}},
    "8-bit moments": {"learner": {"optimizer": "adamw_8bit"}},
    "fused": {"learner": {"optimizer": "adamw_fused"}},
    "schedule": {"learner": {"schedule": "cosine", "warmup_steps": 1}},
    "gradient checkpointing": {"learner": {"gradient_checkpointing": True}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_way_of_learning_resumes_bit_for_bit(variant, tmp_path):
    settings = VARIANTS[variant]
    whole = self_play(small(**settings), tmp_path / "whole")
    part = self_play(small(**settings), tmp_path / "part")
    shutil.rmtree(part.checkpoints_folder / "step-000004")  # as if killed while it was written
    resumed = self_play(part.resumed_config({}), part.folder, resume=True)
    assert [e["event"] for e in events(resumed)] == ["started", "finished", "resumed", "finished"]
    assert_same_run(whole, resumed)
    records = list(whole.metrics())
    assert records[0]["kl/solver"] == pytest.approx(0.0, abs=1e-6)
    assert records[3]["kl/solver"] > 0
    lora = "policy" in settings
    assert whole.adapter_folder.is_dir() == lora
    kept = {path.name for path in (whole.checkpoints_folder / "step-000002").iterdir()}
    trained = "adapter" if lora else "model"
    assert kept == {trained, "optimizer.safetensors", "state.json", "SHA256SUMS"}
    if variant == "schedule":
        # 3e-6 · (1/2, 1, 3/4, 1/4): u is 0, 1/3 and 2/3 after one step of warm-up.
        rates = [r["learning_rate"] for r in records[:4]]
        peak = small().lr
        assert rates == pytest.approx([peak / 2, peak, 0.75 * peak, 0.25 * peak])


def test_gradient_checkpointing_changes_no_result(tmp_path):
    plain = self_play(small(steps=2), tmp_path / "plain")
    again = small(steps=2, learner={"gradient_checkpointing": True})
    again = self_play(again, tmp_path / "again")
    one, other = (list(map(reproducible, run.metrics())) for run in (plain, again))
    for record, same in zip(one, other, strict=True):
        assert same == pytest.approx(record, rel=1e-4, abs=1e-6)


def test_a_run_is_resumed_from_python_by_the_configuration_that_began_it(tmp_path):
    left_open = small(steps=4).model_copy(update={"threads": None})
    whole = self_play(left_open, tmp_path / "whole")
    half = self_play(left_open.model_copy(update={"steps": 2}), tmp_path / "half")
    assert_same_run(whole, self_play(left_open, half.folder, resume=True))


@pytest.mark.parametrize("removed", ["reward", "policy"])
def test_what_a_resume_leaves_out_is_a_change(tmp_path, removed):
    second = {"reward": {"second": {"kind": "arena"}}} if removed == "reward" else {}
    second |= {"policy": {"lora": {"rank": 2}}} if removed == "policy" else {}
    run = RunFolder(tmp_path / "run")
    run.create(small(**second))
    with pytest.raises(ConfigError, match=rf"{removed}\.\w+.* = None: was"):
        run.refuse_changes(small())


def test_a_decaying_schedule_refuses_more_steps(tmp_path):
    schedule = {"schedule": "linear"}
    run = self_play(small(steps=2, learner=schedule), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"steps = 4: was 2 .* learner\.schedule = 'linear'"):
        run.resumed_config({"steps": 4})
    assert run.resumed_config({"log": {"progress": "none"}}).steps == 2


def test_a_run_pauses_when_a_service_is_away_and_goes_on_when_it_is_back(tmp_path, monkeypatch):
    from language_self_play.rewards.arena import ArenaVerifier

    whole = self_play(small(), tmp_path / "whole")
    answer, closed = ArenaVerifier.__call__, []
    calls = iter([True, True, True, False])

    def sometimes(self, queries, answers, keys):
        if not next(calls):
            raise ServiceError("reward.main: http://localhost:1 gave no answer in 6 attempts")
        return answer(self, queries, answers, keys)

    monkeypatch.setattr(ArenaVerifier, "__call__", sometimes)
    monkeypatch.setattr(ArenaVerifier, "close", lambda self: closed.append(1), raising=False)
    with pytest.raises(Paused, match=r"gave no answer in 6 attempts; 3 of 4 steps played; go on"):
        self_play(small(), tmp_path / "part")
    assert closed
    part = RunFolder(tmp_path / "part")
    assert (part.checkpoints_folder / "step-000003").is_dir()
    assert events(part)[-1]["reason"].startswith("reward.main: http://localhost:1")
    monkeypatch.setattr(ArenaVerifier, "__call__", answer)
    self_play(part.resumed_config({}), part.folder, resume=True)
    assert_same_run(whole, part)


def test_a_summed_reward_records_its_parts(tmp_path, length_reward):
    rewards = {"answer": {"weight": 2.0}, "length": {"weight": 0.1, **length_reward["length"]}}
    run = self_play(small(steps=1, reward=rewards), tmp_path / "run")
    record = next(run.metrics())
    total = 2 * record["reward/answer/mean"] + 0.1 * record["reward/length/mean"]
    assert record["reward/mean"] == pytest.approx(total)
    [answer, *_] = next(g for g in run.games(0) if g["valid"])["answers"]
    parts = answer["rewards"]
    assert answer["reward"] == pytest.approx(2 * parts["answer"] + 0.1 * parts["length"])


@pytest.mark.parametrize("objective", ["learnability", "spread", "uncertainty"])
def test_the_challengers_objective_is_what_it_learns_from(objective, tmp_path):
    run = self_play(
        small("arena-zero", steps=1, challenger={"objective": objective}), tmp_path / "run"
    )
    for game in run.games(0):
        if game["valid"]:
            p = sum(a["reward"] for a in game["answers"]) / 3
            expected = {
                "learnability": 4 * p * (1 - p),
                "spread": (p * (1 - p)) ** 0.5,
                "uncertainty": 1 - 2 * abs(p - 0.5),
            }[objective]
            assert game["challenger_reward"] == pytest.approx(expected, abs=1e-5)


def test_a_run_killed_between_a_record_and_its_checkpoint_loses_no_step(tmp_path, monkeypatch):
    import language_self_play.train as train

    whole = self_play(small(), tmp_path / "whole")
    save = train.save_checkpoint

    def die_at_step_4(run, policy, optimizer, step, keep_last, ranks):
        if step == 4:
            raise KeyboardInterrupt
        return save(run, policy, optimizer, step, keep_last, ranks)

    monkeypatch.setattr(train, "save_checkpoint", die_at_step_4)
    with pytest.raises(KeyboardInterrupt):
        self_play(small(), tmp_path / "part")
    monkeypatch.setattr(train, "save_checkpoint", save)
    part = RunFolder(tmp_path / "part")
    self_play(part.resumed_config({}), part.folder, resume=True)
    assert_same_run(whole, part)


def test_resume_from_python_refuses_another_run_too(tmp_path):
    run = self_play(small(steps=2), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"seed = 1: was 0 when the run began"):
        self_play(small(steps=4, seed=1), run.folder, resume=True)
    with pytest.raises(ConfigError, match=r"steps = 1: the run has played 2 steps already"):
        self_play(run.resumed_config({"steps": 1}), run.folder, resume=True)
    with pytest.raises(RunFolderError, match="no run here"):
        self_play(small(), tmp_path / "nothing", resume=True)


def test_the_next_stage_starts_from_a_saved_model_as_its_own_reference(tmp_path):
    first = self_play(small("arena-grpo", steps=2, learner={"lr": 1e-3}), tmp_path / "grpo")
    policy = {"path": str(first.model_folder)}
    second = self_play(small(steps=2, policy=policy), tmp_path / "lsp")
    assert next(second.metrics())["kl/solver"] == pytest.approx(0.0, abs=1e-6)


def test_resume_refuses_a_changed_reference(tmp_path):
    first = self_play(small("arena-grpo", steps=2, learner={"lr": 1e-3}), tmp_path / "first")
    run = self_play(small(steps=2, policy={"path": str(first.model_folder)}), tmp_path / "run")
    other = self_play(small("arena-grpo", steps=2, seed=1), tmp_path / "other")
    weights = "model.safetensors"
    (first.model_folder / weights).write_bytes((other.model_folder / weights).read_bytes())
    with pytest.raises(RunFolderError, match="reference model has changed"):
        self_play(run.resumed_config({"steps": 4}), run.folder, resume=True)


def test_a_used_folder_is_refused_before_anything_is_loaded(tmp_path):
    run = self_play(small(steps=1), tmp_path / "run")
    before = run.metrics_file.read_bytes()
    with pytest.raises(RunFolderError, match="already holds a run"):
        self_play(small(steps=1), tmp_path / "run")
    assert run.metrics_file.read_bytes() == before


def test_a_reward_that_is_not_finite_names_query_and_answer(tmp_path, monkeypatch):
    (tmp_path / "bad_reward.py").write_text(
        "def reward(queries, answers):\n    return [float('nan')] * len(queries)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    reward = {"answer": {"kind": "python", "function": "bad_reward:reward"}}
    table = {**small().model_dump(), "reward": reward}
    with pytest.raises(
        NonFiniteError,
        match=r"reward\.answer\.function = 'bad_reward:reward': returned nan for query",
    ):
        self_play(Config.from_table(table), tmp_path / "run")


def test_truncated_sampling_warns_once_that_the_gradient_is_biased(tmp_path):
    with pytest.warns(UserWarning, match=r"solver\.top_p = 0\.9 .* biased") as warned:
        self_play(small(steps=2, solver={"top_p": 0.9}), tmp_path / "run")
    assert len(warned) == 1


@pytest.fixture
def length_reward(tmp_path, monkeypatch):
    """A reward that varies on any text."""
    (tmp_path / "length_reward.py").write_text(
        "def reward(queries, answers):\n    return [len(a) / 20 for a in answers]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return {"length": {"kind": "python", "function": "length_reward:reward"}}


def test_tinychat_plays_through_its_chat_template(test_data, tmp_path, length_reward):
    (tmp_path / "prompt.txt").write_text("Ask me something")
    (tmp_path / "rubric.txt").write_text("{query} {answer}")
    table = {
        **SMALL,
        "policy": {"path": str(test_data / "models" / "tinychat-626k")},
        "challenger": {"num_queries": 4, "max_tokens": 80, "prompt": str(tmp_path / "prompt.txt")},
        "solver": {"group_size": 4, "max_tokens": 60},
        "self_reward": {"rubric": str(tmp_path / "rubric.txt"), "max_tokens": 5},
        "reward": length_reward,
        "learner": {"lr": 1e-3},
    }
    run = self_play(Config.from_table(table), tmp_path / "run")
    records = list(run.metrics())
    assert len(records) == 4
    assert records[3]["kl/solver"] > 0
    games = [g for g in run.games(0) if g["valid"]]
    assert any(answer["finish_reason"] == "stop" for game in games for answer in game["answers"])
    # The newline that ends a turn is a stop token, and no part of a text.
    assert not any("\n" in answer["text"] for game in games for answer in game["answers"])


def test_stories_need_a_chat_template_and_then_play(test_data, tmp_path, length_reward):
    table = {
        **SMALL,
        "algorithm": "lsp-zero",
        "policy": {"path": str(test_data / "models" / "stories260K")},
        "reward": length_reward,
        # Stories don't end within so few tokens: a query has to be allowed to be long.
        "challenger": {"num_queries": 4, "max_tokens": 450},
        "solver": {"group_size": 2, "max_tokens": 24},
        "learner": {"lr": 1e-3},
    }
    with pytest.raises(ModelError, match=r"has no chat template.*policy\.chat_template a Jinja"):
        self_play(Config.from_table(table), tmp_path / "refused")
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }} {% endfor %}")
    table["policy"] = {**table["policy"], "chat_template": str(template)}
    # The default challenger prompt takes more than this model's 512 tokens.
    with pytest.raises(ConfigError, match=r"challenger\.prompt: takes \d+ tokens"):
        self_play(Config.from_table(table), tmp_path / "too-long")
    (tmp_path / "prompt.txt").write_text("Once upon a time")
    table["challenger"] = {**table["challenger"], "prompt": str(tmp_path / "prompt.txt")}
    run = self_play(Config.from_table(table), tmp_path / "run")
    assert list(run.metrics())[3]["kl/solver"] > 0


@pytest.mark.slow
def test_python_users_need_five_lines(tmp_path):
    program = (
        "from language_self_play import Config, self_play\n"
        "config = Config.from_recipe('arena', steps=2, threads=1)\n"
        "run = self_play(config)\n"
        "print(run.folder, len(list(run.metrics())))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert result.stdout.splitlines()[-1] == f"{Path('runs/lsp')} 3"


def start(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "language_self_play", *arguments],
        cwd=cwd,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for_steps(run: RunFolder, number: int, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while len(list(run.metrics())) < number:
        assert time.monotonic() < deadline, "the run did not get going"
        time.sleep(0.02)


FLAGS = (
    "--steps=8 --threads=1 --challenger.num_queries=6 --solver.group_size=3 --checkpoint.every=3"
    " --eval.every=4"
).split()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> RunFolder:
    folder = tmp_path_factory.mktemp("uninterrupted")
    process = start("train", "arena", "--run", "whole", *FLAGS, cwd=folder)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return RunFolder(folder / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_run_goes_on_to_the_same_end(how, uninterrupted, tmp_path):
    process = start("train", "arena", "--run", "stopped", *FLAGS, cwd=tmp_path)
    run = RunFolder(tmp_path / "stopped")
    wait_for_steps(run, 4)
    process.send_signal(how)
    _, errors = process.communicate(timeout=120)
    if how == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 75
        assert "go on with: lsp train --resume stopped" in errors
        assert "Traceback" not in errors
    resumed = start("train", "--resume", "stopped", cwd=tmp_path)
    _, errors = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, errors
    assert_same_run(uninterrupted, run)
    events = [json.loads(line)["event"] for line in run.events_file.read_text().splitlines()]
    assert events[0] == "started"
    assert events[-2:] == ["resumed", "finished"]


@pytest.mark.slow
def test_resuming_a_finished_run_says_so_and_changes_nothing(uninterrupted):
    before = uninterrupted.events_file.read_text()
    process = start("train", "--resume", str(uninterrupted.folder), cwd=uninterrupted.folder.parent)
    said, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    assert said.startswith("All 8 steps are played; --steps N plays on")
    assert "Held-out accuracy" in said
    assert uninterrupted.events_file.read_text() == before
