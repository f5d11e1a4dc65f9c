"""`lsp train --dry-run`: arithmetic and memory of a run from its configuration, no weights needed."""

from __future__ import annotations

import json

import pytest

from language_self_play.cli import main
from language_self_play.config import Config

RECIPE = """\
steps = 30
[policy]
path = "./model"
[challenger]
prompt = "arena"
template = "{query}"
num_queries = 32
max_tokens = 20
[solver]
group_size = 8
max_tokens = 12
[self_reward]
mode = "expected"
rubric = "arena"
[reward.answer]
kind = "arena"
"""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """The arena's tokenizer and config, without weights."""
    from language_self_play.arena.tiny_model import build_config, build_tokenizer

    folder = tmp_path_factory.mktemp("plan") / "model"
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder)
    build_config(tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def here(model_folder, tmp_path, monkeypatch):
    """A folder with the recipe and a model without weights, as the current one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    (tmp_path / "model").mkdir()
    for file in model_folder.iterdir():
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    return tmp_path


def batch(**overrides):
    from language_self_play.plan import batch_arithmetic, longest_turns

    config = Config.from_recipe("recipe.toml", **overrides)
    return batch_arithmetic(config, longest_turns(config))


def memory(**overrides):
    from language_self_play.memory import memory_estimate
    from language_self_play.plan import judge_turn, longest_turns

    config = Config.from_recipe("recipe.toml", device="cpu", **overrides)
    return memory_estimate(config, list(longest_turns(config).values()), judge_turn(config))


@pytest.mark.usefixtures("here")
def test_a_step_is_counted_in_queries_answers_and_micro_batches():
    plan = batch()
    assert plan["queries (N)"] == 32
    assert plan["answers (N x G)"] == 256  # 32 · 8
    assert plan["challenger prompt, tokens"] == 3  # <|user|>, "Pose one task.", <|assistant|>
    assert plan["optimizer steps of the run"] == 30
    assert plan["micro-batches, at most"] == 2  # one for each role


@pytest.mark.usefixtures("here")
def test_grpo_has_no_challenger_to_count(here):
    (here / "q.jsonl").write_text('{"prompt": "1+1"}\n')
    plan = batch(algorithm="grpo", data={"path": "q.jsonl"})
    assert "challenger prompt, tokens" not in plan
    assert plan["micro-batches, at most"] == 1


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("budget", [16_384, 500, 116, 40])
def test_tokens_and_micro_batches_are_no_less_than_those_of_the_longest_possible_step(budget):
    import torch

    from language_self_play.chat import load_chat
    from language_self_play.packing import micro_batches
    from language_self_play.types import Completion, Group, Groups

    config = Config.from_recipe("recipe.toml", learner={"tokens_per_micro_batch": budget})
    plan = batch(learner={"tokens_per_micro_batch": budget})
    # Queries of 20 tokens, their stop token included, so that the Solver is asked 19 of them.
    prompt = load_chat(config.policy).encode("7" * 19)
    answers = [Completion([5] * 12, "", [0.0] * 12, "length")] * 8
    queries = [Completion([5] * 20, "", [0.0] * 20, "stop")] * 32
    solved = Groups("solver", [Group(prompt, answers)] * 32, 1.0, torch.zeros(32, 8))
    posed = Groups("challenger", [Group([1, 6, 2], queries)], 1.0, torch.zeros(32))
    batches = [
        b
        for groups in (solved, posed)
        for b in micro_batches(groups, budget, 0, torch.device("cpu"))
    ]
    assert plan["micro-batches, at most"] >= len(batches)
    assert plan["tokens learned from, at most"] >= 32 * (len(prompt) + 8 * 12) + 3 + 32 * 20


@pytest.mark.usefixtures("here")
def test_a_model_that_knows_no_shared_prompts_counts_them_once_a_completion(here, capsys):
    from transformers import BloomConfig

    assert main(["train", "recipe.toml", "--dry-run", "--device=cpu"]) == 0
    shared = " ".join(capsys.readouterr().out.split())
    assert "knows no shared prompts" not in shared
    for file in (here / "model").glob("config.json"):
        file.unlink()
    BloomConfig(vocab_size=107, hidden_size=16, n_layer=2, n_head=2).save_pretrained(here / "model")
    assert main(["train", "recipe.toml", "--dry-run", "--device=cpu"]) == 0
    whole = " ".join(capsys.readouterr().out.split())
    assert "knows no shared prompts: a prompt is computed" in whole
    # 256 answers of 12 tokens and their prompts of 22, 32 queries of 20 and their prompt of 3.
    assert f"tokens learned from, at most │ {256 * (12 + 22) + 32 * (20 + 3):,} │" in whole
    assert f"tokens learned from, at most │ {256 * 12 + 32 * 22 + 32 * 20 + 3:,} │" in shared


# 683,904 parameters (see test_arena_tiny_model); in bytes of float32.
WEIGHTS = 4 * 683_904
CACHE = "keys and values"
KEPT = "kept by the forward pass of a micro-batch"


@pytest.mark.usefixtures("here")
def test_memory_is_estimated_by_part():
    estimate = memory()
    assert estimate.always == {
        "policy": WEIGHTS,
        "reference": WEIGHTS,
        "float32 masters of the weights": 0,
        "AdamW's moments": 2 * WEIGHTS,
    }
    assert set(estimate.phases) == {"sampling", "judging", "learning", "reward", "update", "saving"}
    assert estimate.phases["learning"]["gradients"] == WEIGHTS
    # Keys and values of a token: 2 · 4 layers · 4 heads · 32 · 4 bytes = 4,096. 32 prompts of
    # 3 + 20 - 1 tokens exist once; 256 rows have buffers of 128 tokens for their 12.
    assert estimate.phases["sampling"][CACHE] == (32 * 22 + 256 * 128) * 4096
    passing = max(sum(parts.values()) for parts in estimate.phases.values())
    assert estimate.peak == 4 * WEIGHTS + passing


@pytest.mark.usefixtures("here")
def test_bfloat16_halves_the_weights_and_adds_float32_masters():
    estimate = memory(dtype="bfloat16")
    assert estimate.always["policy"] == estimate.always["reference"] == WEIGHTS // 2
    assert estimate.always["float32 masters of the weights"] == WEIGHTS
    assert estimate.phases["sampling"][CACHE] == (32 * 22 + 256 * 128) * 2048


@pytest.mark.usefixtures("here")
def test_an_adapter_needs_no_second_copy_and_few_gradients():
    estimate = memory(policy={"path": "./model", "lora": {"rank": 4}})
    assert estimate.always["reference"] == 0
    # A and B of rank 4 in each of 4 layers: 4 projections of 128 · 128, 3 of the feed-forward.
    assert estimate.phases["learning"]["gradients"] < WEIGHTS / 10
    assert estimate.always["AdamW's moments"] == 2 * estimate.phases["learning"]["gradients"]
    [copy] = estimate.phases["saving"].values()
    assert copy == estimate.always["policy"]
    assert estimate.always["policy"] == WEIGHTS + estimate.phases["learning"]["gradients"]


@pytest.mark.usefixtures("here")
def test_eight_bit_moments_checkpointed_layers_and_small_micro_batches_take_less():
    whole = memory()
    moments = memory(learner={"optimizer": "adamw_8bit"}).always["AdamW's moments"]
    assert moments == pytest.approx(whole.always["AdamW's moments"] / 4, rel=0.02)
    kept = whole.phases["learning"][KEPT]
    again = memory(learner={"gradient_checkpointing": True}).phases["learning"]
    assert again[KEPT] < 0.2 * kept
    small = memory(learner={"tokens_per_micro_batch": 500}).phases["learning"]
    assert small[KEPT] < 0.2 * kept


def judging(**overrides):
    from language_self_play.plan import judge_turn

    return judge_turn(Config.from_recipe("recipe.toml", **overrides))


@pytest.mark.usefixtures("here")
def test_the_judge_is_asked_about_each_answer_at_its_longest():
    from language_self_play.chat import load_chat
    from language_self_play.rewards.self_reward import JudgeQuestions

    config = Config.from_recipe("recipe.toml")
    questions = JudgeQuestions(config.self_reward, load_chat(config.policy), 512)
    [asked] = questions.prompts([("7" * 20, "7" * 12)])
    assert judging() == (256, len(asked), 1, 1)  # 32 · 8 pairs
    written = judging(self_reward={"mode": "generate", "max_tokens": 9})
    # What all its prompts begin with is computed once: <|user|> and the words before the query.
    one, other = questions.prompts([("1", ""), ("2", "")])
    common = [a == b for a, b in zip(one, other, strict=True)].index(False)
    assert common > 0
    assert written == (256, len(asked) - common, 1, 9)
    assert judging(algorithm="lsp-zero") is None


def test_a_local_judge_of_pairs_is_asked_about_both_answers_within_its_rubric(here):
    from language_self_play.chat import load_chat
    from language_self_play.plan import checked
    from language_self_play.rewards.self_reward import JudgeQuestions

    settings = json.loads((here / "model" / "config.json").read_text())
    (here / "model" / "config.json").write_text(
        json.dumps(settings | {"max_position_embeddings": 2048})
    )
    (here / "p.jsonl").write_text('{"instruction": "12+3"}\n{"instruction": "7+8"}\n')
    contest = {"path": "p.jsonl", "max_tokens": 90, "judge": {"kind": "local", "path": "model"}}
    config = Config.from_recipe("recipe.toml", eval={"win_rate": {"ours": contest}})
    found = checked(config)
    chat = load_chat(config.policy)
    prompt = len(chat.encode("12+3"))
    assert found.evaluated == [(2, prompt, 1, 90)]
    default = config.self_reward.model_copy(update={"mode": "expected", "rubric": "default"})
    [around] = JudgeQuestions(default, chat, 2048).prompts([("", "")])
    assert len(around) > 500
    assert found.compared == {"ours": (4, len(around) + prompt + 90, 1, 1)}


def test_a_judge_of_criteria_is_asked_once_for_each(here, monkeypatch):
    from language_self_play.rewards import self_reward

    config = json.loads((here / "model" / "config.json").read_text())
    (here / "model" / "config.json").write_text(
        json.dumps(config | {"max_position_embeddings": 1024})
    )
    # The arena's rubric has no criteria, and its tokenizer no yes and no.
    monkeypatch.setattr(self_reward, "rubric_criteria", lambda rubric: ["a", "b", "c"])
    monkeypatch.setattr(self_reward, "_next_tokens", lambda *args: [1, 2, 3, 4])
    assert judging(self_reward={"mode": "criteria"})[0] == 256 * 3


@pytest.mark.usefixtures("here")
def test_a_run_without_kl_and_judge_has_no_reference_in_memory():
    zero = {"beta": 0.0}
    assert memory(algorithm="lsp-zero", solver=zero, challenger=zero).always["reference"] == 0


def test_a_dry_run_prints_both_tables_loads_no_weights_and_writes_nothing(here, capsys):
    before = sorted(here.rglob("*"))
    assert main(["train", "recipe.toml", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "answers (N x G)" in out
    assert "256" in out
    assert "keys and values" in out
    assert "logits and backward pass" in out
    assert "No weights were loaded." in out
    assert sorted(here.rglob("*")) == before


# What a run would refuse only after minutes of loading, or at its first step.
@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (["--solver.system_prompt", "Be brief."], "solver.system_prompt"),
        (["--challenger.prompt", "default"], "challenger.prompt"),
        (["--challenger.prompt", "nothere.txt"], "challenger.prompt = 'nothere.txt': no such"),
        (["--self_reward.rubric", "nothere.txt"], "self_reward.rubric = 'nothere.txt': no such"),
        (["--self_reward.rubric", "recipe.toml"], "self_reward.rubric"),
        (["--self_reward.mode", "criteria"], "self_reward.mode"),
        (["--self_reward.rubric", "default"], "self_reward.rubric"),
        (["--policy.chat_template", "nothere.jinja"], "policy.chat_template = 'nothere.jinja'"),
        (["--policy.path", "./nothere"], "./nothere: no such folder"),
        (["--device", "abacus"], "device = 'abacus'"),
        (["--reward.mine.kind", "python", "--reward.mine.function", "nothere:f"], "reward.mine"),
        (["--reward.mine.kind", "python", "--reward.mine.function", "json"], "reward.mine"),
        (["--reward.mine.kind", "python", "--reward.mine.function", "json:no"], "reward.mine"),
        (
            ["--algorithm", "grpo", "--data.path", "nothere.jsonl"],
            "data.path = 'nothere.jsonl': no such file",
        ),
        (["--algorithm", "grpo", "--data.path", "recipe.toml"], "recipe.toml:1: not a JSON object"),
    ],
)
@pytest.mark.usefixtures("here")
def test_a_dry_run_finds_what_would_stop_a_run(flags, name, capsys):
    assert main(["train", "recipe.toml", "--dry-run", *flags]) == 2
    [line] = [s for s in capsys.readouterr().err.splitlines() if "[transformers]" not in s]
    assert line.startswith(f"lsp: {name}")


@pytest.mark.parametrize("model_type", ["abacus", "t5"])
def test_a_dry_run_refuses_a_model_that_is_no_language_model_it_knows(model_type, here, capsys):
    (here / "model" / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert main(["train", "recipe.toml", "--dry-run"]) == 2
    [line] = [s for s in capsys.readouterr().err.splitlines() if "[transformers]" not in s]
    assert line.startswith("lsp: policy.path = './model': ")
