"""The memory estimate against what real passes and real runs take."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from language_self_play import memory
from language_self_play.config import Config
from language_self_play.memory import LiveBytes, Turn

MIB = 2**20
BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "memory.py"
CPU = torch.device("cpu")


def config_of(folder: Path, **overrides: Any) -> Config:
    table: dict[str, Any] = {
        "algorithm": "lsp-zero",
        "device": "cpu",
        "dtype": "float32",
        "policy": {"path": str(folder)},
        "reward": {"main": {"kind": "python", "function": "builtins:len"}},
        "learner": {"tokens_per_micro_batch": 100},
    }
    return Config.from_table({**table, **overrides})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_labels=1,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "reward")
    return tmp_path / "model"


def test_live_bytes_count_what_is_alive_and_no_views_and_no_known_tensors():
    known = torch.zeros(1000)
    with LiveBytes([known]) as count:
        a = known + 1  # 4,000 bytes
        b = a.view(10, 100).t()
        c = known[10:]
        assert (count.now, count.most) == (4000, 4000)
        d = a * 2
        assert (count.now, count.most) == (8000, 8000)
        del a, d
        assert (count.now, count.most) == (4000, 8000)  # b still holds a's
        del b, c
        assert (count.now, count.most) == (0, 8000)


def test_tied_weights_are_counted_once(folder: Path):
    found = AutoConfig.from_pretrained(folder)
    found.tie_word_embeddings = True
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = memory._fake_model(config_of(folder), found, torch.float32, CPU)
    assert fake.lm_head.weight is fake.model.embed_tokens.weight
    real = LlamaForCausalLM(found)
    assert sum(p.nbytes for p in fake.parameters()) == 4 * real.num_parameters()


@pytest.mark.parametrize("again", [False, True])
def test_what_fake_passes_take_is_what_real_ones_take(folder: Path, again: bool):
    learner = {"tokens_per_micro_batch": 100, "gradient_checkpointing": again}
    config = config_of(folder, learner=learner)
    turn = Turn(groups=2, P=9, K=3, T=7)
    real = AutoModelForCausalLM.from_pretrained(folder).eval()
    taken = memory._learning(real, config, list(real.parameters()), turn)
    with FakeTensorMode(allow_non_fake_inputs=True):
        found = AutoConfig.from_pretrained(folder)
        fake = memory._fake_model(config, found, torch.float32, CPU)
        estimated = memory._learning(fake, config, list(fake.parameters()), turn)
        reading = memory._reading(fake, 2, 9)
    assert estimated["gradients"] == taken["gradients"] == 4 * real.num_parameters()
    # The attention kernel keeps its masks in other forms on tensors without numbers.
    for part in ("kept by the forward pass of a micro-batch", "logits and backward pass"):
        assert estimated[part] == pytest.approx(taken[part], rel=0.1)
    cache, beside, _ = reading
    # Two rows of 9 tokens: keys and values, 3 layers, 2 heads of 16, 4 bytes.
    assert cache == 2 * 9 * 2 * 3 * 2 * 16 * 4
    assert beside == pytest.approx(memory._reading(real, 2, 9)[1], rel=0.1)


def test_backward_passes_are_counted_beside_the_gradients_of_earlier_ones(folder: Path):
    config = config_of(folder)
    real = AutoModelForCausalLM.from_pretrained(folder).eval()
    turn = Turn(groups=1, P=3, K=2, T=2)
    parts = memory._learning(real, config, list(real.parameters()), turn)
    largest = max(p.nbytes for p in real.parameters())
    # Gradients are added to those that are there: at least the largest one exists twice.
    assert sum(parts.values()) >= 4 * real.num_parameters() + largest
    assert all(p.grad is None for p in real.parameters())


def test_only_blocks_that_the_heap_holds_are_counted_as_its_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "HEAP_BLOCK", 400)
    with LiveBytes([]) as count:
        tensors = [torch.zeros(100), torch.zeros(101)]  # 400 and 404 bytes
        del tensors
    assert (count.most, count.most_in_heap) == (804, 400)


def test_on_the_cpu_the_heap_loses_of_passes_but_not_of_gradients_unless_told_otherwise(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    config, turns = config_of(folder), [Turn(2, 9, 3, 7)]
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    whole = memory.memory_estimate(config, turns).phases["learning"]
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "131072")
    without = memory.memory_estimate(config, turns).phases["learning"]
    passing = sum(without.values()) - without["gradients"]  # all of it in small blocks
    assert whole == {**without, "lost in the C library's heap": passing // 2}


def test_a_reward_model_on_the_same_device_counts_with_its_pass_and_elsewhere_not(folder: Path):
    section = {"kind": "reward_model", "path": str(folder.parent / "reward")}
    turns = [Turn(2, 9, 3, 7)]
    here = memory.memory_estimate(config_of(folder, reward={"rm": section}), turns)
    real = LlamaForSequenceClassification.from_pretrained(folder.parent / "reward")
    assert here.always["reward model 'rm'"] == 4 * real.num_parameters()
    assert here.phases["reward"]["a pass of the reward model"] > 6 * 16 * 160 * 4
    there = memory.memory_estimate(
        config_of(folder, reward={"rm": {**section, "device": "cuda:1"}}), turns
    )
    assert "reward model 'rm'" not in there.always
    assert there.phases["reward"].get("a pass of the reward model", 0) == 0


def test_a_judge_that_writes_needs_a_cache_for_all_its_replies(folder: Path):
    config = config_of(folder, algorithm="lsp")
    parts = memory.memory_estimate(
        config, [Turn(2, 9, 3, 7)], judging=Turn(groups=6, P=50, K=1, T=200)
    ).phases["judging"]
    # A token's keys and values are 768 bytes; 6 prompts of 50, 6 replies in buffers of 256.
    assert parts["keys and values"] == 768 * 6 * (50 + 256)


def test_a_draw_for_many_rows_behind_short_prompts_takes_its_logits_three_times(folder: Path):
    config = config_of(folder)
    [beside] = [
        size
        for part, size in memory.memory_estimate(config, [Turn(100, 1, 2, 7)])
        .phases["sampling"]
        .items()
        if part.endswith("the draw of a token")
    ]
    # 200 rows of 300 tokens, 4 bytes: the last logits and these, and their probabilities; then the sums
    # of a block of 512 in float64, which a larger vocabulary would hide.
    assert 3 * 200 * 300 * 4 <= beside < 12 * 200 * 300 * 4


def test_the_update_on_the_cpu_takes_two_copies_of_the_largest_weight_and_fused_none(folder: Path):
    # The largest weight of these is that of 300 tokens, 64 numbers of 4 bytes each.
    turns = [Turn(1, 10, 2, 7)]
    for name, size in (("adamw", 2 * 300 * 64 * 4), ("adamw_fused", 0)):
        config = config_of(folder, learner={"optimizer": name})
        assert memory.memory_estimate(config, turns).phases["update"]["AdamW at work"] == size


@pytest.mark.slow
@pytest.mark.parametrize("case", ["bfloat16", "lsp-zero"])
def test_the_estimate_is_within_a_fifth_of_what_a_run_takes(case: str):
    spec = importlib.util.spec_from_file_location("memory_benchmark", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    estimate, measured = benchmark.run(case)
    assert measured > 300 * MIB
    assert 0.8 < estimate / measured < 1.2
