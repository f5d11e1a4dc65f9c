"""The real vLLM engine, in a process of its own: its tokens and log-probs are the policy's.

Above all: after every update. vLLM's own reload of weights leaves two things behind on a CPU, the prefix
cache and the packed weights of an output embedding that is tied to the input's; without what
sampling/vllm_worker.py does about them, tests of this file fail.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.testing import assert_close

from language_self_play import Config, self_play
from language_self_play.chat import Chat
from language_self_play.cli import main
from language_self_play.config import Rollout, Sampling
from language_self_play.errors import (
    ConfigError,
    InputFileError,
    MemoryLimitError,
    Paused,
    ServiceError,
)
from language_self_play.forward import completion_logprobs
from language_self_play.packing import micro_batches
from language_self_play.policy import Policy, add_adapter
from language_self_play.recipe_files import load_recipe, merge
from language_self_play.run_folder import RunFolder
from language_self_play.sampling.vllm import EngineDied, EngineProcess, VllmSampler, check_vllm
from language_self_play.types import Group, Groups

pytestmark = pytest.mark.slow

LOGPROB_TOLERANCE = 1e-5
# vLLM's prefix cache keeps blocks of 128 tokens on a CPU: the second prompt fills two.
PROMPTS = [[1, 20, 21, 2], [4 + (7 * i) % 90 for i in range(300)]]
GREEDY = Sampling.model_construct(temperature=0.0, top_p=1.0, top_k=0)
CONTEXT = 512
HIDDEN = 128  # heads of 32, which vLLM has kernels for


def settings(python: str, **overrides: Any) -> dict[str, Any]:
    vllm = {"python": python, "kv_cache_gib": 0.25, "timeout_s": 300.0}
    return {"engine": "vllm", "batch_size": 64, "vllm": vllm | overrides}


def engine_config(make_config: Callable[..., Config], python: str, **overrides: Any) -> Config:
    return make_config(threads=1, rollout=settings(python), **overrides)


def calm(model: Any) -> Any:
    """The model with smaller matrices: at this width its logits would lose digits of float32."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight *= 0.5
    return model


def update(weights: dict[str, Tensor], seed: int, size: float = 0.03) -> None:
    """An update that changes every matrix by about a third."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in weights.values():
            weight += size * torch.randn(weight.shape, generator=generator)


def greedy(model: Any, prompt: list[int], length: int) -> list[int]:
    """transformers' greedy tokens, one full forward pass for each."""
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(length):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def trainer_logprobs(model: Any, groups: list[Group], temperature: float) -> Tensor:
    """The trainer's log-probs of the same tokens, in the same order."""
    size = len(groups), len(groups[0].completions)
    solved = Groups("solver", groups, temperature, torch.zeros(size))
    [batch] = micro_batches(solved, 1_000_000, 0, model.device)
    with torch.no_grad():
        logprobs = completion_logprobs(model, batch, temperature).flatten(0, 1)
    mask, order = batch.mask_BKT.flatten(0, 1), batch.index_BK.flatten().argsort()
    return torch.cat([logprobs[row][mask[row]] for row in order])


def logprobs_of(groups: list[Group]) -> Tensor:
    return torch.tensor([p for g in groups for c in g.completions for p in c.logprobs])


def tokens_of(groups: list[Group]) -> list[list[list[int]]]:
    return [[c.tokens for c in g.completions] for g in groups]


def assert_is_the_policy(sampler: VllmSampler, model: Any, sample: Callable[..., Any]) -> None:
    """Greedy tokens are transformers', and sampled tokens' log-probs the trainer's."""
    groups = sample(PROMPTS, 1, "solver", GREEDY, 12)
    assert [c.tokens for g in groups for c in g.completions] == [
        greedy(model, prompt, 12) for prompt in PROMPTS
    ]
    groups = sample(PROMPTS, 3, "solver", Sampling(temperature=0.8), 12)
    logprobs = logprobs_of(groups)
    assert len(logprobs) == 2 * 3 * 12
    assert logprobs.std() > 0.3
    assert_close(logprobs, trainer_logprobs(model, groups, 0.8), rtol=0, atol=LOGPROB_TOLERANCE)
    assert sampler.version == sampler.step


def engine_processes() -> list[int]:
    """Our own living engines."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rsplit(")", 1)[1].split()[1])
            command = stat.with_name("cmdline").read_text()
        except OSError:
            continue
        if parent == os.getpid() and "vllm_worker.py" in command:
            found.append(int(stat.parent.name))
    return found


@pytest.fixture(autouse=True)
def _no_engine_is_left() -> Iterator[None]:
    """But `served`, which began before a test does."""
    before = engine_processes()
    yield
    assert set(engine_processes()) <= set(before)


@pytest.fixture(scope="module")
def served(
    make_model: Callable[..., Any],
    make_config: Callable[..., Config],
    endless_chat: Chat,
    vllm_python: str,
) -> Iterator[VllmSampler]:
    """An engine that follows a Llama whose embeddings are tied; its completions end at limits only."""
    model = calm(make_model("llama", tied=True, context=CONTEXT, hidden=HIDDEN))
    sampler = VllmSampler(Policy(model, endless_chat), engine_config(make_config, vllm_python))
    sampler.sync(model, 0)
    yield sampler
    sampler.close()


# ---------------------------------------------------------------- the policy's tokens


def test_after_each_of_three_updates_the_engine_is_the_policy(served: VllmSampler):
    model = served.policy.model
    for step in range(4):
        if step:
            update(dict(model.named_parameters()), step)
            served.sync(model, step)
        assert_is_the_policy(served, model, served.sample)


def test_weights_that_were_not_sent_are_seen_in_the_log_probs(served: VllmSampler):
    model = served.policy.model
    groups = served.sample(PROMPTS, 3, "solver", Sampling(), 12)
    update(dict(model.named_parameters()), 9)
    stale = (logprobs_of(groups) - trainer_logprobs(model, groups, 1.0)).abs().mean().item()
    # Bound of the default configuration: 0.1.
    assert stale > 0.1
    served.sync(model, served.step + 1)


@pytest.mark.parametrize("architecture", ["qwen2", "gemma3"])
def test_other_architectures_follow_too(
    make_model: Callable[..., Any],
    make_config: Callable[..., Config],
    endless_chat: Chat,
    vllm_python: str,
    architecture: str,
):
    tied = architecture == "gemma3"
    model = calm(make_model(architecture, context=CONTEXT, hidden=HIDDEN, tied=tied))
    sampler = VllmSampler(Policy(model, endless_chat), engine_config(make_config, vllm_python))
    try:
        for step in range(2):
            sampler.sync(model, step)
            assert_is_the_policy(sampler, model, sampler.sample)
            update(dict(model.named_parameters()), step)
    finally:
        sampler.close()


def test_completions_differ_by_place_completion_step_and_role_and_come_again(served: VllmSampler):
    model, step = served.policy.model, served.step
    drawn: dict[tuple[int, str], Any] = {}
    for at in (step, step + 1):
        for role in ("challenger", "solver"):
            served.step = at
            groups = served.sample([[1, 20, 2]] * 2, 3, role, Sampling(), 12)
            drawn[at, role] = tokens_of(groups)
    flat = [tuple(c) for played in drawn.values() for group in played for c in group]
    assert len(set(flat)) == len(flat) == 2 * 2 * 2 * 3
    served.sync(model, step)
    again = served.sample([[1, 20, 2]] * 2, 3, "solver", Sampling(), 12)
    assert tokens_of(again) == drawn[step, "solver"]


def test_any_stop_token_ends_a_completion_and_stays_out_of_its_text(
    served: VllmSampler, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
):
    free = tokens_of(served.sample([[1, 20, 2]], 40, "solver", Sampling(temperature=2.0), 12))
    counts = torch.tensor(free).flatten().bincount()
    one, other = counts.topk(2).indices.tolist()
    monkeypatch.setattr(served, "chat", Chat(tokenizer, [one, other], {}))
    [group] = served.sample([[1, 20, 2]], 40, "solver", Sampling(temperature=2.0), 12)
    stopped_by = {c.tokens[-1] for c in group.completions if c.finish_reason == "stop"}
    assert stopped_by == {one, other}
    for completion in group.completions:
        assert not {one, other} & set(completion.tokens[:-1])
        stopped = completion.finish_reason == "stop"
        assert (completion.tokens[-1] in (one, other)) is stopped
        assert stopped or len(completion.tokens) == 12
        assert tokenizer.decode(completion.tokens[: -1 if stopped else None]) == completion.text
        assert len(completion.logprobs) == len(completion.tokens)


def test_a_completion_ends_at_its_limit_or_where_the_context_does(served: VllmSampler):
    long = [4 + i % 90 for i in range(CONTEXT - 5)]
    groups = served.sample([long, [1, 20, 2]], 2, "solver", Sampling(), 12)
    assert [[len(c.tokens) for c in g.completions] for g in groups] == [[5, 5], [12, 12]]
    assert {c.finish_reason for g in groups for c in g.completions} == {"length"}
    assert [g.prompt for g in groups] == [long, [1, 20, 2]]


def test_more_prompt_tokens_than_one_pass_holds_change_no_draw(
    served: VllmSampler, make_config: Callable[..., Config], vllm_python: str
):
    prompts = [[4 + (7 * i + j) % 90 for i in range(300)] for j in range(20)]
    # 60 prompts of 300 tokens in a batch of 64: 18,000 tokens, where vLLM's passes have 4,096.
    groups = served.sample(prompts, 3, "solver", Sampling(), 12)
    assert {len(c.tokens) for g in groups for c in g.completions} == {12}
    assert (
        tokens_of(served.sample(prompts[:1], 3, "solver", Sampling(), 12)) == tokens_of(groups)[:1]
    )
    # Keys and values of 8 blocks of 128 tokens, 2 · 2 · 2 · 32 · 4 bytes each: rows wait for one another.
    small = settings(vllm_python, kv_cache_gib=8 * 128 * 1024 / 2**30)
    config = engine_config(make_config, vllm_python).model_copy(
        update={"rollout": Rollout.model_validate(small)}
    )
    sampler = VllmSampler(served.policy, config)
    try:
        sampler.sync(served.policy.model, served.step)
        assert tokens_of(
            sampler.sample(PROMPTS[:1] * 4, 4, "solver", Sampling(), 140)
        ) == tokens_of(served.sample(PROMPTS[:1] * 4, 4, "solver", Sampling(), 140))
    finally:
        sampler.close()


def test_the_first_tokens_of_a_group_are_independent_draws_from_the_softmax(served: VllmSampler):
    num_groups, n = 250, 40
    prompt = [1, 20, 21, 2]
    groups = served.sample([prompt] * num_groups, n, "solver", Sampling(), 1)
    drawn_KN = torch.tensor(tokens_of(groups)).squeeze(-1)
    with torch.no_grad():
        p_V = served.policy.model(torch.tensor([prompt])).logits[0, -1].double().softmax(-1)
    counts_V = torch.bincount(drawn_KN.flatten(), minlength=len(p_V)).double()
    expected_V = num_groups * n * p_V
    often = expected_V >= 5
    assert often.sum() > 10
    # Pearson's statistic has mean df and variance 2 df; four deviations are 1 in 10,000.
    df = int(often.sum())
    rest = counts_V[~often].sum(), expected_V[~often].sum()
    chi_squared = ((counts_V - expected_V) ** 2 / expected_V)[often].sum() + (
        rest[0] - rest[1]
    ) ** 2 / rest[1]
    assert chi_squared < df + 4 * (2 * df) ** 0.5
    # Completions whose generators have neighbouring seeds: of a group's n (n - 1) / 2 pairs Σ p² agree.
    agree = (drawn_KN[:, :, None] == drawn_KN[:, None, :]).double().sum((1, 2)) - n
    share = agree / (n * (n - 1))
    error = share.std() / num_groups**0.5
    assert abs(share.mean() - (p_V**2).sum()) < 4 * error


def test_no_prompts_no_groups(served: VllmSampler):
    assert served.sample([], 3, "solver", Sampling(), 12) == []


def test_after_a_rest_it_samples_the_same(served: VllmSampler):
    before = tokens_of(served.sample(PROMPTS, 2, "solver", Sampling(), 8))
    served.rest()
    served.sync(served.policy.model, served.step)
    assert tokens_of(served.sample(PROMPTS, 2, "solver", Sampling(), 8)) == before


def test_with_lora_the_adapter_follows_and_the_engine_without_it_stays_the_reference(
    make_model: Callable[..., Any],
    make_config: Callable[..., Config],
    endless_chat: Chat,
    vllm_python: str,
):
    config = engine_config(make_config, vllm_python, policy={"lora": {"rank": 4, "alpha": 8.0}})
    assert config.policy.lora is not None
    model = calm(make_model("llama", context=CONTEXT, hidden=HIDDEN))
    policy = Policy(model, endless_chat, adapter=add_adapter(model, "x", config.policy.lora, 0))
    sampler = VllmSampler(policy, config)
    trained = {n: w for n, w in model.named_parameters() if w.requires_grad}
    assert trained
    played = []
    try:
        for step in range(4):
            if step:
                update(trained, step)
            sampler.sync(model, step)
            assert_is_the_policy(sampler, model, sampler.sample)
            with policy.as_reference() as reference:
                assert_is_the_policy(sampler, reference, sampler.sample_reference)
            played.append(logprobs_of(sampler.sample(PROMPTS[:1], 1, "solver", GREEDY, 1)).item())
    finally:
        sampler.close()
    assert len(set(played)) == 4


# ---------------------------------------------------------------- whole runs

RUN = {
    "steps": 2,
    "threads": 1,
    "challenger": {"num_queries": 6},
    "solver": {"group_size": 3},
    "eval": {"tasks": [], "every": 100},
    "checkpoint": {"every": 1, "keep_last": 9},
    "log": {"progress": "none"},
}


def arena(python: str | None, **overrides: Any) -> Config:
    rollout = {"rollout": settings(python)} if python else {}
    return Config.from_table(merge(merge(merge(load_recipe("arena"), RUN), rollout), overrides))


def events(run: RunFolder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.events_file.read_text().splitlines()]


def test_either_engine_learns_the_arena(tmp_path: Path, vllm_python: str):
    learning: dict[str, Any] = {
        "steps": 24,
        "challenger": {"num_queries": 16},
        "solver": {"group_size": 8},
        "learner": {"lr": 3e-4},
        "eval": {"tasks": ["arena"]},
        "checkpoint": {"every": 100},
    }
    gains = []
    for engine in (None, vllm_python):
        run = self_play(arena(engine, **learning), tmp_path / str(bool(engine)))
        records = list(run.metrics())
        accuracies = [r["eval/sampled_accuracy"] for r in (records[0], records[-1])]
        gains.append(accuracies[1] - accuracies[0])
        assert [r["step"] for r in records] == list(range(25))
        differences = [r["sync/logprob_difference"] for r in records[:-1]]
        assert max(differences) < LOGPROB_TOLERANCE
        assert [g["version"] for s in range(24) for g in run.games(s)[:1]] == list(range(24))
    assert min(gains) > 0.1
    # Over 49 seeds: 0.671 … 0.785 with transformers, 0.640 … 0.782 with vLLM, from 0.566.
    assert abs(gains[0] - gains[1]) < 0.1


def test_a_lora_run_in_which_the_engine_is_the_judge_too_comes_out_the_same_again(
    tmp_path: Path, vllm_python: str
):
    config = arena(
        vllm_python,
        policy={"lora": {"rank": 4}},
        self_reward={"mode": "generate", "max_tokens": 6},
        learner={"lr": 1e-2},
    )
    runs = [self_play(config, tmp_path / name) for name in ("one", "other")]
    played = [[run.games(step) for step in range(2)] for run in runs]
    assert played[0] == played[1]
    for record in runs[0].metrics():
        assert record["sync/logprob_difference"] < LOGPROB_TOLERANCE


# ---------------------------------------------------------------- what goes wrong


def test_an_engine_that_dies_is_started_again_once_a_step(served: VllmSampler):
    def kill() -> None:
        [process] = engine_processes()
        os.kill(process, signal.SIGKILL)

    model = served.policy.model
    served.sync(model, 5)
    before = tokens_of(served.sample(PROMPTS, 2, "solver", Sampling(), 8))
    kill()
    with pytest.warns(UserWarning, match="step 5: the vLLM engine died and was started again: sig"):
        again = tokens_of(served.sample(PROMPTS, 2, "solver", Sampling(), 8))
    assert again == before
    assert len(served.trouble) == 1
    served.trouble.clear()
    kill()
    with pytest.raises(ServiceError, match="the vLLM engine died twice in step 5: signal SIGKILL"):
        served.sample(PROMPTS, 2, "solver", Sampling(), 8)


def test_an_engine_that_dies_while_the_policy_learns_is_started_by_the_next_step(
    served: VllmSampler,
):
    model = served.policy.model
    served.sync(model, 6)
    before = tokens_of(served.sample(PROMPTS, 2, "solver", Sampling(), 8))
    [process] = engine_processes()
    os.kill(process, signal.SIGKILL)
    with pytest.warns(UserWarning, match="step 6: the vLLM engine died, and is started again for"):
        served.rest()
    assert engine_processes() == []
    served.sync(model, 6)
    again = tokens_of(served.sample(PROMPTS, 2, "solver", Sampling(), 8))
    served.close()
    assert again == before


def test_an_engine_that_died_of_new_weights_is_started_with_them_and_sent_them_no_more(
    served: VllmSampler, monkeypatch: pytest.MonkeyPatch
):
    asked, asking = [], EngineProcess._ask

    def dying(self: EngineProcess, request: dict[str, Any]) -> dict[str, Any]:
        asked.append(request["do"])
        if request["do"] == "load":
            self.process.kill()
        return asking(self, request)

    model = served.policy.model
    served.sync(model, 3)
    with monkeypatch.context() as patch:
        patch.setattr(EngineProcess, "_ask", dying)
        update(dict(model.named_parameters()), 3)
        with pytest.warns(UserWarning, match="step 4: the vLLM engine died and was started again"):
            served.sync(model, 4)
    assert asked == ["load", "start"]
    assert_is_the_policy(served, model, served.sample)
    update(dict(model.named_parameters()), 4)
    served.sync(model, 5)  # the next step's are sent
    assert_is_the_policy(served, model, served.sample)
    served.close()  # the next test starts one


@pytest.fixture
def wide(
    make_config: Callable[..., Config], endless_chat: Chat, vllm_python: str
) -> Iterator[VllmSampler]:
    """An engine of batches of 64 whose logits take most of its memory: 64 rows are 12.8 MB, float32."""
    config = transformers.LlamaConfig(
        vocab_size=50_000,
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=256,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    chat = Chat(endless_chat.tokenizer, [config.vocab_size], {})
    sampler = VllmSampler(Policy(model, chat), engine_config(make_config, vllm_python))
    sampler.sync(model, 5)
    yield sampler
    sampler.close()


def test_an_engine_without_memory_goes_on_with_half_its_batch(
    wide: VllmSampler, monkeypatch: pytest.MonkeyPatch
):
    asking, first = EngineProcess._ask, wide._engine

    def bounded(self: EngineProcess, request: dict[str, Any]) -> dict[str, Any]:
        """The first engine may grow by 8 MiB."""
        if self is first:
            status = Path(f"/proc/{self.process.pid}/status").read_text()
            size = 1024 * int(status.split("VmSize:")[1].split()[0]) + 8 * 2**20
            resource.prlimit(self.process.pid, resource.RLIMIT_AS, (size, size))
        return asking(self, request)

    # What an engine does but once is done, and its draws are seen.
    before = tokens_of(wide.sample([[1, 2, 3]], 2, "solver", Sampling(), 3))
    monkeypatch.setattr(EngineProcess, "_ask", bounded)
    with pytest.warns(
        UserWarning,
        match="step 5: the vLLM engine ran out of memory and was started again with 32 sequences: .*"
        "DefaultCPUAllocator: can't allocate memory",
    ):
        [group] = wide.sample([[1, 2, 3]], 64, "solver", Sampling(), 3)
    assert len(group.completions) == 64
    assert tokens_of([group])[0][:2] == before[0]
    assert wide.batch_size == 32
    assert len(wide.trouble) == 1


def test_at_most_twice_in_a_step_is_a_batch_halved(
    served: VllmSampler, monkeypatch: pytest.MonkeyPatch
):
    asking = EngineProcess._ask
    words = (  # vLLM's own, when it starts on a GPU
        "RuntimeError: CUDA out of memory occurred when warming up sampler with 64 dummy requests."
        " Please try lowering `max_num_seqs` or `gpu_memory_utilization` when initializing the engine."
    )

    def short_of_memory(self: EngineProcess, request: dict[str, Any]) -> dict[str, Any]:
        raise EngineDied(words)

    served.trouble.clear()
    served.sync(served.policy.model, 5)
    assert served.batch_size == 64
    with monkeypatch.context() as patch:
        patch.setattr(EngineProcess, "_ask", short_of_memory)
        with (
            pytest.warns(UserWarning, match="started again with (32|16) sequences"),
            pytest.raises(
                MemoryLimitError,
                match=r"^step 5: the vLLM engine has no memory left for 16 sequences at once .*; lower"
                r" rollout\.batch_size or rollout\.vllm\.context, or",
            ),
        ):
            served.sample([[1, 2, 3]], 100, "solver", Sampling(), 3)
    assert EngineProcess._ask is asking
    # 64 → 32 → 16 took two engines; the next step may have two more.
    assert served.batch_size == 16
    assert len(served.trouble) == 2
    served.trouble.clear()
    served.sync(served.policy.model, 6)
    [group] = served.sample([[1, 2, 3]], 64, "solver", Sampling(), 3)
    assert len(group.completions) == 64
    served.batch_size = 64
    served.close()  # the next test starts one


def test_a_run_records_the_engines_smaller_batch_and_resumes_with_it(
    tmp_path: Path, vllm_python: str, monkeypatch: pytest.MonkeyPatch
):
    asked, asking, sizes = [0], EngineProcess._ask, []

    def short_of_memory(self: EngineProcess, request: dict[str, Any]) -> dict[str, Any]:
        asked[0] += request["do"] == "sample"
        if request["do"] == "start":
            sizes.append(request["settings"]["max_num_seqs"])
        if asked[0] == 2 and request["do"] == "sample" and len(sizes) == 1:
            # Words of vLLM's own, from a GPU's allocator.
            raise EngineDied("OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.")
        return asking(self, request)

    whole = self_play(arena(vllm_python), tmp_path / "whole")
    monkeypatch.setattr(EngineProcess, "_ask", short_of_memory)
    with pytest.warns(UserWarning, match="step 0: the vLLM engine ran out of memory"):
        run = self_play(arena(vllm_python), tmp_path / "run")
    # Of step 0 the Solver's 18 answers or fewer are asked for: their half, not that of 64.
    answers = sum(len(game["answers"]) for game in run.games(0))
    assert sizes == [64, answers // 2]
    sizes.clear()
    records = list(run.metrics())
    assert [r["memory/rollout_batch_size"] for r in records[:2]] == [answers // 2] * 2
    assert [e["event"] for e in events(run)][:3] == ["started", "out_of_memory", "engine_restarted"]
    assert [run.games(s) for s in range(2)] == [whole.games(s) for s in range(2)]
    asked[0] = 9
    more = arena(vllm_python, steps=3)
    self_play(more, run.folder, resume=True)
    assert sizes == [answers // 2]


def test_a_run_whose_engine_dies_again_and_again_pauses_and_resumes_as_if_it_never_had(
    tmp_path: Path, vllm_python: str, monkeypatch: pytest.MonkeyPatch
):
    config = arena(vllm_python)
    whole = self_play(config, tmp_path / "whole")
    asked, ask = [0], EngineProcess._ask
    # Step 0 asks for start, challenger, solver (killed: start, solver again) and sleep; step 1 for a
    # load (killed: start again, killed).
    deadly = {3, 7, 8}

    def dying(self: EngineProcess, request: dict[str, Any]) -> dict[str, Any]:
        asked[0] += 1
        if asked[0] in deadly:
            self.process.kill()
        return ask(self, request)

    monkeypatch.setattr(EngineProcess, "_ask", dying)
    with (
        pytest.warns(UserWarning, match="the vLLM engine died and was started again"),
        pytest.raises(
            Paused, match=r"engine died twice in step 1: .*; 1 of 2 steps played; go on with"
        ),
    ):
        self_play(config, tmp_path / "hit")
    hit = RunFolder(tmp_path / "hit")
    assert [e["event"] for e in events(hit)] == ["started", "engine_restarted", "paused"]
    monkeypatch.undo()
    self_play(config, tmp_path / "hit", resume=True)
    assert [hit.games(s) for s in range(2)] == [whole.games(s) for s in range(2)]
    weights = "model.safetensors"
    assert (hit.model_folder / weights).read_bytes() == (whole.model_folder / weights).read_bytes()


def test_an_engine_that_cannot_start_says_why(tmp_path: Path, vllm_python: str):
    config = arena(vllm_python, rollout={"vllm": {"kv_cache_gib": 1e-6}})
    with pytest.raises(
        ConfigError, match=r"rollout\.vllm: the engine did not start: .*cache blocks"
    ):
        self_play(config, tmp_path / "run")


def test_a_killed_run_takes_its_engine_along(tmp_path: Path, vllm_python: str):
    # The kill may come while weights are on their way, whose folder then stays.
    config = arena(vllm_python, steps=1000, rollout={"vllm": {"transfer_folder": str(tmp_path)}})
    (tmp_path / "run.toml").write_text(config.to_toml())
    command = [sys.executable, "-m", "language_self_play", "train", "run.toml", "--run", "run"]
    run = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert metrics.exists()
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    engines = [c for c in children if "vllm_worker" in Path(f"/proc/{c}/cmdline").read_text()]
    assert len(engines) == 1
    run.kill()
    run.wait()
    while Path(f"/proc/{engines[0]}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{engines[0]}").exists()


def test_the_weights_on_their_way_need_room(
    make_disk: Callable[[int], Path], tmp_path: Path, vllm_python: str
):
    disk = make_disk(64 * 1024)
    config = arena(vllm_python, rollout={"vllm": {"transfer_folder": str(disk)}})
    with pytest.raises(InputFileError, match=r"^rollout\.vllm\.transfer_folder: .* no space left"):
        self_play(config, tmp_path / "run")
    assert list(disk.iterdir()) == []


@pytest.mark.parametrize("what", ["missing", "folder", "empty", "no vllm", "not a python"])
def test_a_python_that_will_not_do_is_one_sentence(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "python"
    expected = {
        "missing": "can't be run (No such file or directory)",
        "folder": "can't be run (Permission denied)",
        "empty": "can't be run (Permission denied)",
        "no vllm": "it has no vllm",
        "not a python": "it is no Python",
    }[what]
    if what == "folder":
        file.mkdir()
    elif what == "empty":
        file.touch()
    elif what == "no vllm":
        file.symlink_to(sys.executable)
    elif what == "not a python":
        file.write_text("#!/bin/sh\nexit 1\n")
        file.chmod(0o755)
    python = str(file)
    arguments = ["train", "arena", "--run", str(tmp_path / "run"), "--rollout.engine", "vllm"]
    assert main([*arguments, "--rollout.vllm.python", python]) == 2
    error = capsys.readouterr().err.strip()
    assert f"rollout.vllm.python = {python!r}: {expected}; " in error
    assert "\n" not in error
    assert not (tmp_path / "run").exists()


def test_a_version_that_is_not_tested_is_warned_of(
    make_config: Callable[..., Config], tmp_path: Path
):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 0.99.1\n")
    python.chmod(0o755)
    config = make_config(rollout=settings(str(python)))
    with pytest.warns(UserWarning, match=r"has vLLM 0\.99\.1; tested is 0\.32"):
        check_vllm(config)
