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
    BloomConfig,
    Gemma2Config,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MambaConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

from language_self_play import live_bytes, memory
from language_self_play.config import Config
from language_self_play.forward import ForwardPath, choose_path
from language_self_play.live_bytes import LiveBytes
from language_self_play.memory import Turn
from language_self_play.pretrained import resolve_model

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


# ---------------------------------------------------------------- a vLLM engine

# 2 · 300 · 64 embeddings; in each of 3 layers 2 · 64 · 64 + 2 · 64 · 32 attention, 3 · 64 · 160
# feed-forward, 2 · 64 norms; 64 of the last norm: 167,872 numbers.
ENGINE_WEIGHTS = 4 * 167_872
ON_ITS_WAY = memory.COPY_ON_ITS_WAY


def with_engine(folder: Path, vllm: dict[str, Any], **overrides: Any) -> memory.MemoryEstimate:
    config = config_of(folder, rollout={"engine": "vllm", "vllm": vllm}, **overrides)
    return memory.memory_estimate(config, [Turn(2, 9, 3, 7)], Turn(6, 50, 1, 5))


def test_an_engines_weights_cache_and_the_copy_on_its_way_are_parts_of_their_own(folder: Path):
    estimate = with_engine(folder, {"kv_cache_gib": 0.25})
    plain = memory.memory_estimate(config_of(folder), [Turn(2, 9, 3, 7)], Turn(6, 50, 1, 5))
    assert plain.phases["sampling"]
    assert estimate.phases["sampling"] == {}
    assert estimate.phases["sync"] == {ON_ITS_WAY: ENGINE_WEIGHTS}
    engine = {"vLLM: weights": ENGINE_WEIGHTS, "vLLM: keys and values": 256 * MIB}
    assert estimate.always == plain.always | engine
    assert estimate.elsewhere == {}
    assert with_engine(folder, {"kv_cache_gib": 0.25}, dtype="bfloat16").phases["sync"] == {
        ON_ITS_WAY: ENGINE_WEIGHTS // 2
    }


def test_without_a_size_the_engines_cache_is_what_its_share_of_memory_leaves(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(memory, "_total_memory", lambda device: 1000 * MIB)
    estimate = with_engine(folder, {"memory_fraction": 0.25})
    assert estimate.always["vLLM: keys and values"] == 250 * MIB - ENGINE_WEIGHTS


def test_weights_that_travel_over_a_disk_take_no_memory(folder: Path, tmp_path: Path):
    for name, there in ((str(tmp_path), False), ("/dev/shm/lsp", True)):
        estimate = with_engine(folder, {"kv_cache_gib": 0.25, "transfer_folder": name})
        assert (ON_ITS_WAY in estimate.phases["sync"]) is there


def test_a_servers_memory_is_not_the_runs(folder: Path):
    estimate = with_engine(folder, {"server": "http://localhost:1"})
    assert [part for part in estimate.always if part.startswith("vLLM")] == []
    assert estimate.phases["sync"] == {ON_ITS_WAY: ENGINE_WEIGHTS}


def test_on_a_cpu_a_tied_output_embedding_is_held_twice(folder: Path):
    config = AutoConfig.from_pretrained(folder)
    config.tie_word_embeddings = True
    config.save_pretrained(folder)
    estimate = with_engine(folder, {"kv_cache_gib": 0.25})
    # One embedding of 300 · 64 less is sent.
    assert estimate.phases["sync"] == {ON_ITS_WAY: ENGINE_WEIGHTS - 4 * 300 * 64}
    assert estimate.always["vLLM: weights"] == ENGINE_WEIGHTS


def test_with_an_adapter_the_engine_holds_both_and_writes_the_judges_replies(folder: Path):
    settings: dict[str, Any] = {"kv_cache_gib": 0.25}
    lora = {"path": str(folder), "lora": {"rank": 4}}
    writes = {"mode": "generate"}
    estimate = with_engine(folder, settings, policy=lora, self_reward=writes)
    # A and B of rank 4 in each layer: q, o 64 + 64; k, v 64 + 32; gate, up, down 64 + 160.
    adapter = 4 * 3 * 4 * (2 * 128 + 2 * 96 + 3 * 224)
    assert estimate.always["vLLM: weights"] == ENGINE_WEIGHTS + adapter
    assert estimate.phases["sync"] == {ON_ITS_WAY: ENGINE_WEIGHTS}
    assert estimate.phases["judging"] == {}
    assert with_engine(folder, settings, self_reward=writes).phases["judging"]
    assert with_engine(folder, settings, policy=lora, self_reward={"mode": "expected"}).phases[
        "judging"
    ]


@pytest.mark.parametrize(
    ("settings", "always", "sampling", "elsewhere"),
    [
        ({"sleep": True}, {}, {"weights": 100, "cache": 900}, {"asleep": 100, "copy": 200}),
        ({"sleep": False}, {"weights": 100, "cache": 900}, {}, {"copy": 200}),
        ({"devices": "1"}, {}, {}, {"weights": 100, "cache": 900, "copy": 200}),
        ({"server": "http://localhost:1"}, {}, {}, {"copy": 200}),
    ],
)
def test_on_gpus_an_engine_counts_where_it_is(
    settings: dict[str, Any],
    always: dict[str, int],
    sampling: dict[str, int],
    elsewhere: dict[str, int],
    folder: Path,
):
    names = {
        "weights": "vLLM: weights",
        "cache": "vLLM: keys and values",
        "copy": ON_ITS_WAY,
        "asleep": "vLLM: weights of the sleeping engine",
    }
    config = config_of(folder, rollout={"engine": "vllm", "vllm": settings})
    found: dict[str, int] = {"policy": 1}
    phases = {"sampling": {"keys and values": 5}, "learning": {"gradients": 7}}
    engine = memory.EngineMemory(weights=200, held=100, cache=900)
    there = engine.add_to(found, phases, config, torch.device("cuda"))
    assert found == {"policy": 1} | {names[k]: v for k, v in always.items()}
    assert phases["sampling"] == {names[k]: v for k, v in sampling.items()}
    assert phases["learning"] == {"gradients": 7}
    assert there == {names[k]: v for k, v in elsewhere.items()}


# ---------------------------------------------------------------- counting


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
    taken = memory._learning(real, config, list(real.parameters()), turn, ForwardPath())
    with FakeTensorMode(allow_non_fake_inputs=True):
        found = AutoConfig.from_pretrained(folder)
        fake = memory._fake_model(config, found, torch.float32, CPU)
        estimated = memory._learning(fake, config, list(fake.parameters()), turn, ForwardPath())
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
    parts = memory._learning(real, config, list(real.parameters()), turn, ForwardPath())
    largest = max(p.nbytes for p in real.parameters())
    # Gradients are added to those that are there: at least the largest one exists twice.
    assert sum(parts.values()) >= 4 * real.num_parameters() + largest
    assert all(p.grad is None for p in real.parameters())


def test_only_blocks_that_the_heap_holds_are_counted_as_its_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(live_bytes, "HEAP_BLOCK", 400)
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


def with_contest(folder: Path, judge: dict[str, Any]) -> memory.MemoryEstimate:
    contest = {"path": "prompts.jsonl", "judge": judge}
    return memory.memory_estimate(
        config_of(folder, eval={"win_rate": {"ours": contest}}),
        [Turn(2, 9, 3, 7)],
        evaluated=[Turn(20, 30, 1, 70)],
        compared={} if judge["kind"] == "python" else {"ours": Turn(40, 30, 1, 70)},
    )


def test_long_answers_of_an_evaluation_count_as_sampling_does(folder: Path):
    estimate = with_contest(folder, {"kind": "python", "function": "builtins:len"})
    # A token's keys and values are 768 bytes; 20 prompts of 30, and buffers of 128 for 70 tokens.
    assert estimate.phases["evaluating"]["keys and values"] == 768 * 20 * (30 + 128)
    assert not any("judge" in part for part in estimate.always)


def test_a_reward_model_that_compares_answers_counts_with_its_pass(folder: Path):
    judge = {"kind": "reward_model", "path": str(folder.parent / "reward")}
    estimate = with_contest(folder, judge)
    real = LlamaForSequenceClassification.from_pretrained(folder.parent / "reward")
    assert estimate.always["judge of eval.win_rate.ours"] == 4 * real.num_parameters()

    def taken(tokens: int) -> int:
        phases = with_contest(folder, judge | {"tokens_per_batch": tokens}).phases
        return phases["comparing"]["a pass of the reward model"]

    # Answers of 30 + 70 tokens to 20 prompts, and as many of the baseline.
    assert taken(3000) == pytest.approx(1.5 * taken(2000), rel=0.01)
    assert taken(9000) == taken(4000)
    elsewhere = with_contest(folder, judge | {"device": "cuda:1"})
    assert "judge of eval.win_rate.ours" not in elsewhere.always


def test_a_local_judge_of_pairs_counts_with_its_pass(folder: Path):
    estimate = with_contest(folder, {"kind": "local", "path": "arena"})
    real = LlamaForCausalLM.from_pretrained(resolve_model("arena"))
    assert estimate.always["judge of eval.win_rate.ours"] == 4 * real.num_parameters()
    # Read once: no keys and values.
    assert set(estimate.phases["comparing"]) <= {"a pass over the prompts", memory.LOST}
    assert estimate.phases["comparing"]["a pass over the prompts"] > 0


def test_a_judge_that_writes_needs_a_cache_for_all_its_replies(folder: Path):
    config = config_of(folder, algorithm="lsp", learner={"tokens_per_micro_batch": 1000})
    parts = memory.memory_estimate(
        config, [Turn(2, 9, 3, 7)], judging=Turn(groups=6, P=50, K=1, T=200)
    ).phases["judging"]
    # A token's keys and values are 768 bytes; 6 prompts of 50, 6 replies in buffers of 256.
    assert parts["keys and values"] == 768 * 6 * (50 + 256)


def test_a_judge_that_reads_keeps_no_keys_and_values(folder: Path):
    for mode in ("expected", "criteria"):
        config = config_of(folder, algorithm="lsp", self_reward={"mode": mode})
        parts = memory.memory_estimate(config, [Turn(2, 9, 3, 7)], Turn(6, 50, 1, 1))
        assert set(parts.phases["judging"]) <= {"a pass over the prompts", memory.LOST}


def test_a_judges_prompts_are_read_within_its_tokens(folder: Path):
    judging = Turn(groups=6, P=50, K=1, T=200)
    config = config_of(folder, algorithm="lsp", learner={"tokens_per_micro_batch": 120})
    parts = memory.memory_estimate(config, [Turn(2, 9, 3, 7)], judging).phases["judging"]
    # Two prompts of 50 tokens, not three, are within 120; see the test above.
    assert parts["keys and values"] == 768 * 2 * (50 + 256)


# ---------------------------------------------------------------- the path that learning will take


def small_model(name: str) -> PreTrainedConfig:
    shape = {"vocab_size": 300, "hidden_size": 64, "initializer_range": 0.2}
    match name:
        case "bloom":  # biases scores by distance, in attention of its own
            return BloomConfig(**shape, n_layer=3, n_head=4)
        case "mamba":  # no attention at all
            return MambaConfig(**shape, num_hidden_layers=2, state_size=4)
        case "qwen3_moe":  # experts, whose product torch knows the shape of in bfloat16 alone
            heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
            experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
            return Qwen3MoeConfig(**shape, **heads, **experts, num_hidden_layers=2)
        case _:
            config = LlamaConfig if name == "llama" else Gemma2Config
            heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
            return config(**shape, **heads, intermediate_size=160, num_hidden_layers=3)


@pytest.mark.filterwarnings("ignore:.* has a kind of attention that knows no shared prompts")
@pytest.mark.filterwarnings("ignore:.* gives no logits for hidden states alone")
@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3_moe", "bloom", "mamba"])
def test_what_shapes_tell_of_the_path_is_what_learning_takes(folder: Path, name: str):
    found = small_model(name)
    torch.manual_seed(0)
    taken = choose_path(AutoModelForCausalLM.from_config(found).eval())
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = memory._fake_model(config_of(folder), found, torch.float32, CPU)
        assert memory.static_path(fake) == taken
    assert taken.shared_prompt == (name not in ("bloom", "mamba"))


def test_without_shared_prompts_micro_batches_hold_each_prompt_once_a_completion(folder: Path):
    config = config_of(folder, learner={"tokens_per_micro_batch": 100})
    turn = Turn(groups=4, P=9, K=3, T=7)
    # Shared: 9 + 3 · 7 = 30 tokens a group, three groups in 100. Whole: 3 · (9 + 7) = 48, two.
    assert memory.largest_micro_batch(turn, config) == (3, 3)
    assert memory.largest_micro_batch(turn, config, shared_prompt=False) == (2, 3)
    # A group of 48 tokens in 40: 40 // 16 = 2 completions at once.
    small = config_of(folder, learner={"tokens_per_micro_batch": 40})
    assert memory.largest_micro_batch(turn, small, shared_prompt=False) == (1, 2)


def test_the_estimate_follows_a_model_that_knows_no_shared_prompts(tmp_path: Path):
    torch.manual_seed(0)
    real = AutoModelForCausalLM.from_config(small_model("bloom")).eval()
    real.save_pretrained(tmp_path / "bloom")
    config = config_of(tmp_path / "bloom")
    # The prompt is long enough that sharing it would be faster, too.
    turn = Turn(groups=1, P=20, K=3, T=7)
    estimate = memory.memory_estimate(config, [turn])
    assert not estimate.shared_prompt
    taken = memory._learning(
        real, config, list(real.parameters()), turn, ForwardPath(shared_prompt=False)
    )
    for part in ("kept by the forward pass of a micro-batch", "logits and backward pass"):
        assert estimate.phases["learning"][part] == pytest.approx(taken[part], rel=0.1)
    # Three rows that each keep 20 + 7 tokens: keys and values of 3 layers, 64 numbers of 4 bytes.
    assert estimate.phases["sampling"]["keys and values"] == 3 * 27 * 2 * 3 * 64 * 4


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
