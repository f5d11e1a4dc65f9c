"""How much memory a run will take, by phase and part, from its configuration alone. Loads no weights.

What stays is arithmetic: weights, masters, moments, gradients. What passes is found by running the
model's own passes, forward and backward, on fake tensors, which have shapes and types but no numbers,
and counting the bytes that are alive: right for every architecture, attention kernel and adapter.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
)

from language_self_play.config import Config, RewardModelReward
from language_self_play.evaluate.pair_judges import local_judge_config
from language_self_play.forward import (
    ForwardPath,
    checkpointed_layers,
    logprobs_of_states,
    states,
)
from language_self_play.lean_decoder import lean_decoder
from language_self_play.live_bytes import FullBatch, LiveBytes, counting
from language_self_play.logprobs import draw_tokens, token_logprobs
from language_self_play.optimizer import Optimizer, working_copies
from language_self_play.packing import MicroBatch, completions_at_once
from language_self_play.policy import add_adapter
from language_self_play.pretrained import (
    choose_device,
    choose_dtype,
    load_model_config,
    read,
    resolve_model,
    vocabulary_size,
)
from language_self_play.sampling.vllm import SHARED_MEMORY
from language_self_play.shared_prompt import PIECE, attention_to_shared_prompts, layer_windows

FLOAT32_BYTES = 4
# AdamW's two moments, bytes a weight. Of 8 bits: and a float32 scale for each block of 256.
MOMENT_BYTES = {"adamw": 8.0, "adamw_fused": 8.0, "adamw_8bit": 2 + 8 / 256}
# On the CPU glibc keeps freed blocks of up to 32 MiB in its heap, where small objects that live on hold
# them apart, so not all is used again. What is lost, as a part of the blocks that a pass takes and gives
# back; with adapters more, whose small tensors lie between the others. Nothing is lost where the variable
# below returns blocks at once. Measured: benchmarks/RESULTS.md.
HEAP_LOSS, HEAP_LOSS_OF_ADAPTERS = 0.5, 1.0
BLOCKS_ARE_RETURNED = "MALLOC_MMAP_THRESHOLD_"
LOST = "lost in the C library's heap"
COPY_ON_ITS_WAY = "vLLM: a copy of the weights on its way, in shared memory"


class Turn(NamedTuple):
    """The longest that one role can play: `groups` prompts of P tokens, K completions of T."""

    groups: int
    P: int
    K: int
    T: int


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by part: what is there always, and beside it in each phase, one phase at a time."""

    device: str
    always: dict[str, int]
    phases: dict[str, dict[str, int]]
    shared_prompt: bool = True  # a prompt exists once for all its completions
    elsewhere: dict[str, int] = field(default_factory=dict)  # an engine's, not of this device

    @property
    def peak(self) -> int:
        passing = max(sum(parts.values()) for parts in self.phases.values())
        return sum(self.always.values()) + passing


def memory_estimate(
    config: Config,
    turns: list[Turn],
    judging: Turn | None = None,
    evaluated: Sequence[Turn] = (),
    compared: Mapping[str, Turn] = {},
) -> MemoryEstimate:
    """Memory of the policy's device for a step in which every completion is as long as it may be.

    `judging` is what the reference is asked as judge: of each pair, a prompt and a reply. `evaluated` are
    the answers that evaluations take, `compared` what the judge of each eval.win_rate is asked that has weights
    here. Not counted: lm-eval's passes, and other programs' models.
    Raises ModelError for a model that can't be had.
    """
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    model_config = load_model_config(config.policy.path, config.policy.trust_remote_code)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = _fake_model(config, model_config, dtype, device)
        weights = sum(p.nbytes for p in model.parameters())
        # The kind of AdamW makes no difference to the masters and gradients that are wanted here.
        optimizer = Optimizer(model, config.learner.model_copy(update={"optimizer": "adamw"}))
        trained = list(optimizer.weights.values())
        masters = [w for n, w in optimizer.weights.items() if w is not optimizer.parameters[n]]
        num_trained = sum(w.numel() for w in trained)
        path = static_path(model)
        shared = path.shared_prompt
        phases = {
            "sampling": _largest([_sampling(model, config, turn, shared) for turn in turns]),
            "judging": {} if judging is None else _judging(model, config, judging, shared),
            "learning": _largest([_learning(model, config, trained, turn, path) for turn in turns]),
        }
        engine = EngineMemory.of(config, model) if config.rollout.engine == "vllm" else None
        models, phases["reward"] = _reward_models(config, device, turns)
        if evaluated:
            answers = [_sampling(model, config, turn, shared) for turn in evaluated]
            phases["evaluating"] = _largest(answers)
            judges, phases["comparing"] = _judges_of_pairs(config, device, compared)
            models |= judges
    gradients = FLOAT32_BYTES * num_trained
    phases["update"] = {
        "gradients": gradients,
        "AdamW at work": sum(w.nbytes for w in working_copies(config.learner.optimizer, trained)),
    }
    full = config.policy.lora is None
    merged = (
        0 if full or device.type != "cpu" else weights
    )  # from a GPU it goes to the CPU's memory
    phases["saving"] = {"a copy with the adapter merged in": merged}
    always = {
        "policy": weights,
        "reference": weights if config.needs_reference and full else 0,
        "float32 masters of the weights": sum(w.nbytes for w in masters),
        "AdamW's moments": int(MOMENT_BYTES[config.learner.optimizer] * num_trained),
        **models,
    }
    elsewhere = {} if engine is None else engine.add_to(always, phases, config, device)
    return MemoryEstimate(str(device), always, phases, shared, elsewhere)


def largest_micro_batch(turn: Turn, config: Config, shared_prompt: bool = True) -> tuple[int, int]:
    """(B, K) of the largest micro-batch that packing makes of the turn; see packing.py."""
    budget = config.learner.tokens_per_micro_batch
    K = min(turn.K, completions_at_once(budget, turn.P, turn.T, shared_prompt))
    slices = turn.groups * -(-turn.K // K)
    tokens = (1 if shared_prompt else K) * turn.P + K * turn.T
    return min(slices, max(1, budget // tokens)), K


# ---------------------------------------------------------------- a vLLM engine


class EngineMemory(NamedTuple):
    """What a vLLM engine takes beside what its process takes without a model."""

    weights: int  # as they are sent
    held: int  # as the engine holds them, on each of its devices
    cache: int

    @classmethod
    def of(cls, config: Config, model: PreTrainedModel) -> EngineMemory:
        """Of fake tensors. On CPUs an output embedding that is tied to the input's is packed, a copy."""
        settings, on_cpu = config.rollout.vllm, model.device.type == "cpu"
        base = {p for name, p in model.named_parameters() if ".lora_" not in name}
        adapter = [p.numel() for name, p in model.named_parameters() if ".lora_" in name]
        weights = sum(p.nbytes for p in base)
        held = weights // settings.tensor_parallel + model.dtype.itemsize * sum(adapter)
        embeddings = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        if on_cpu and embeddings[0] is embeddings[1]:
            held += embeddings[0].nbytes
        if settings.kv_cache_gib is not None:
            cache = int(settings.kv_cache_gib * 2**30)
        else:
            cache = max(0, int(settings.memory_fraction * _total_memory(model.device)) - held)
        return cls(weights, held, cache)

    def add_to(
        self,
        always: dict[str, int],
        phases: dict[str, dict[str, int]],
        config: Config,
        device: torch.device,
    ) -> dict[str, int]:
        """Lay the engine's parts over those of a run that samples itself; returns those elsewhere."""
        settings, folder = config.rollout.vllm, config.rollout.vllm.transfer_folder
        # The policy no longer samples; with LoRA the engine is the judge that writes, too.
        phases["sampling"] = phases["evaluating"] = {}
        if config.policy.lora is not None and config.self_reward.mode == "generate":
            phases["judging"] = {}
        parts = {"vLLM: weights": self.held, "vLLM: keys and values": self.cache}
        in_memory = folder is None or Path(folder).resolve().is_relative_to(SHARED_MEMORY)
        copy = {COPY_ON_ITS_WAY: self.weights} if in_memory else {}
        if settings.server is not None:
            parts = {}  # it is not part of the run, wherever it is
        if device.type == "cpu":
            always |= parts
            phases["sync"] = copy
            return {}
        if settings.server is not None:
            return copy
        if settings.devices is not None:
            return {**parts, **copy}
        if not settings.sleep:
            always |= parts
            return copy
        phases["sampling"] = parts
        return {"vLLM: weights of the sleeping engine": self.held, **copy}


def _total_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# ---------------------------------------------------------------- the path that learning will take


class _Witness:
    """A layout of attention that does none, and knows which layers have asked it."""

    def __init__(self) -> None:
        self.layers: set[int] = set()

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        self.layers.add(layer)
        return query[..., : value.shape[-1]]


def static_path(model: PreTrainedModel) -> ForwardPath:
    """What forward.choose_path will choose for this model of fake tensors, as far as shapes tell.

    Whether its passes can be run, and whether every layer's attention can be replaced. That numbers agree
    shows only once there are weights.
    """
    batch = _fake_batch(1, 3, 2, 2, model.device)

    def attends() -> bool:
        witness = _Witness()
        with attention_to_shared_prompts(model):
            model(
                input_ids=batch.prompts_BP,
                position_ids=batch.prompts_BP,
                use_cache=False,
                shared_prompt=witness,
            )
        return len(witness.layers) == len(layer_windows(model))

    def separates() -> bool:
        hidden = states(model, batch, ForwardPath(shared_prompt=False)).flatten(0, 2)
        logprobs_of_states(model, hidden, batch.completions_BKT.flatten(), 1.0)
        return True

    with torch.no_grad(), FullBatch():
        return ForwardPath(_holds(attends), _holds(separates))


def _holds(check: Callable[[], bool]) -> bool:
    try:
        return check()
    except Exception:
        # A model that can't be run in this way raises what its author's code happens to raise.
        return False


# ---------------------------------------------------------------- phases


def _sampling(
    model: PreTrainedModel, config: Config, turn: Turn, shared_prompt: bool
) -> dict[str, int]:
    """One decoded batch: its distinct prompts' pass, then rows that grow to their full length."""
    rows = min(config.rollout.batch_size, turn.groups * turn.K)
    prompts = min(turn.groups, max(1, rows // turn.K))
    return _decoding(model, rows, prompts, turn, shared_prompt)


def _decoding(
    model: PreTrainedModel, rows: int, prompts: int, turn: Turn, shared_prompt: bool
) -> dict[str, int]:
    of_prompts, reading, lost = _reading(model, prompts, turn.P)
    of_token = of_prompts // (prompts * turn.P)
    if shared_prompt:
        own = -(-turn.T // PIECE) * PIECE  # buffers grow by pieces
        cache = of_prompts + rows * own * of_token
    else:
        cache = rows * (turn.P + turn.T) * of_token
    lean = lean_decoder(model) if shared_prompt else None
    return {
        "weights laid out for few rows": lean.copied_bytes if lean else 0,
        "keys and values": cache,
        "a pass over the prompts, or the draw of a token": max(
            of_prompts + reading - cache, _drawing(model, rows)
        ),
        **lost,
    }


def _judging(
    model: PreTrainedModel, config: Config, turn: Turn, shared_prompt: bool
) -> dict[str, int]:
    """The reference as judge: it writes replies, or reads whole prompts once."""
    rows = min(turn.groups, max(1, config.learner.tokens_per_micro_batch // turn.P))
    if config.self_reward.mode == "generate":
        rows = min(rows, config.rollout.batch_size)
        return _decoding(model, rows, rows, turn, shared_prompt)
    _, reading, lost = _reading(model, rows, turn.P, kept=False)
    return {"a pass over the prompts": reading, **lost}


def _reading(
    model: PreTrainedModel, rows: int, length: int, kept: bool = True
) -> tuple[int, int, dict[str, int]]:
    """Bytes of the cache of a pass over prompts, what the pass takes beside it, and what is lost."""
    inputs = _ones(model.device, rows, length)
    with torch.no_grad(), counting(model, inputs) as count:
        cache = DynamicCache(config=model.config) if kept else None
        model(
            input_ids=inputs,
            attention_mask=inputs,
            position_ids=inputs,
            past_key_values=cache,
            use_cache=kept,
            logits_to_keep=1,
        )
        cached = count.now
    return cached, count.most - cached, _lost(model, count)


def _drawing(model: PreTrainedModel, rows: int) -> int:
    """Bytes with which a token is drawn for each row, the logits of this and the last one."""
    shape = rows, vocabulary_size(model)
    uniforms = torch.empty(rows, dtype=torch.float64, device="cpu")
    with torch.no_grad(), LiveBytes([]) as count:
        last = torch.empty(shape, dtype=model.dtype, device=model.device)
        draw_tokens(last.clone(), uniforms, 1.0)
    return count.most


def _learning(
    model: PreTrainedModel,
    config: Config,
    trained: list[Tensor],
    turn: Turn,
    path: ForwardPath,
) -> dict[str, int]:
    """Forward and backward pass of the role's largest micro-batch, beside all gradients."""
    B, K = largest_micro_batch(turn, config, path.shared_prompt)
    again = config.learner.gradient_checkpointing
    batch = _fake_batch(B, turn.P, K, turn.T, model.device)
    for weight in trained:  # those of the micro-batches before it
        weight.grad = torch.zeros_like(weight)
    gradients = [weight.grad for weight in trained if weight.grad is not None]
    inputs = [value for value in vars(batch).values() if isinstance(value, Tensor)]
    with FullBatch(), counting(model, *trained, *gradients, *inputs) as count:
        with checkpointed_layers(model, again):
            before = states(model, batch, path).flatten(0, 2)
            kept = count.now
            tokens = batch.completions_BKT.flatten()
            if path.separate_head:
                logprobs = logprobs_of_states(model, before, tokens, 1.0)
            else:
                logprobs = token_logprobs(before, tokens, 1.0)
        with attention_to_shared_prompts(model):  # for what is computed again
            logprobs.sum().backward()
        for weight in trained:
            weight.grad = None
    return {
        "gradients": sum(g.nbytes for g in gradients),
        "kept by the forward pass of a micro-batch": kept,
        "logits and backward pass": count.most - kept,
        **_lost(model, count),
    }


def _reward_models(
    config: Config, device: torch.device, turns: Sequence[Turn]
) -> tuple[dict[str, int], dict[str, int]]:
    """Weights of the reward models that share the policy's device, and what the largest pass takes."""
    weights, passes = {}, [dict[str, int]()]
    for name, section in config.reward.items():
        if not isinstance(section, RewardModelReward):
            continue
        if section.device not in ("auto", config.device, str(device)):
            continue
        dtype = choose_dtype(config.dtype if section.dtype == "auto" else section.dtype, device)
        model = _fake_reward_model(f"reward.{name}.path", section, dtype, device)
        weights[f"reward model {name!r}"] = sum(p.nbytes for p in model.parameters())
        passes.append(_scoring(model, section, turns))
    return weights, _largest(passes)


def _judges_of_pairs(
    config: Config, device: torch.device, compared: Mapping[str, Turn]
) -> tuple[dict[str, int], dict[str, int]]:
    """As _reward_models, of the models that compare answers for eval.win_rate."""
    weights, passes = {}, [dict[str, int]()]
    for name, asked in compared.items():
        judge, setting = config.eval.win_rate[name].judge, f"eval.win_rate.{name}"
        if judge["kind"] == "reward_model":
            section = RewardModelReward.model_validate(judge)
            if section.device not in ("auto", config.device, str(device)):
                continue
            dtype = choose_dtype(section.dtype, device)
            model = _fake_reward_model(f"{setting}.judge.path", section, dtype, device)
            passes.append(_scoring(model, section, [asked]))
        else:
            local = local_judge_config(judge)
            found = load_model_config(local.policy.path)
            model = _fake_model(local, found, choose_dtype("auto", device), device)
            passes.append(_judging(model, local, asked, static_path(model).shared_prompt))
        weights[f"judge of {setting}"] = sum(p.nbytes for p in model.parameters())
    return weights, _largest(passes)


def _scoring(
    model: PreTrainedModel, section: RewardModelReward, turns: Sequence[Turn]
) -> dict[str, int]:
    """The largest pass of a reward model over the turns' answers."""
    length = min(section.max_tokens, max(turn.P + turn.T for turn in turns))
    pairs = max(turn.groups * turn.K for turn in turns)
    inputs = _ones(model.device, min(pairs, max(1, section.tokens_per_batch // length)), length)
    with torch.no_grad(), counting(model, inputs) as count:
        model(input_ids=inputs, attention_mask=inputs, use_cache=False)
    return {"a pass of the reward model": count.most, **_lost(model, count)}


def _lost(model: PreTrainedModel, count: LiveBytes) -> dict[str, int]:
    """What the allocator loses of a pass's blocks; on GPUs torch has its own."""
    if model.device.type != "cpu" or BLOCKS_ARE_RETURNED in os.environ:
        return {}
    adapted = any(".lora_" in name for name, _ in model.named_parameters())
    loss = HEAP_LOSS_OF_ADAPTERS if adapted else HEAP_LOSS
    return {LOST: int(loss * count.most_in_heap)}


def _largest(phases: list[dict[str, int]]) -> dict[str, int]:
    return max(phases, key=lambda parts: sum(parts.values()))


# ---------------------------------------------------------------- fake models and batches


def _fake_model(
    config: Config, model_config: PreTrainedConfig, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """The policy as it will be trained, of fake tensors on `device`. Called in a FakeTensorMode."""
    path, remote_code = config.policy.path, config.policy.trust_remote_code
    build = partial(AutoModelForCausalLM.from_config, dtype=dtype, trust_remote_code=remote_code)
    # PEFT can't be told to work on fake tensors, so they come last.
    with unset_fake_temporarily(), torch.device("meta"):
        model = read(path, lambda: build(model_config))
        if config.policy.lora is not None:
            add_adapter(model, path, config.policy.lora, config.seed)
    return _faked(model, device)


def _fake_reward_model(
    setting: str, section: RewardModelReward, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    remote_code = section.trust_remote_code

    def build() -> PreTrainedModel:
        found = AutoConfig.from_pretrained(
            resolve_model(section.path), trust_remote_code=remote_code
        )
        found.pad_token_id = 0  # without one it refuses more than one row
        return AutoModelForSequenceClassification.from_config(
            found, dtype=dtype, trust_remote_code=remote_code
        )

    with unset_fake_temporarily(), torch.device("meta"):
        model = read(section.path, build, setting)
    return _faked(model, device)


def _faked(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """`model` with fake tensors on `device` in place of its own; tied weights stay tied."""
    copies: dict[Tensor, Tensor] = {}
    for module in model.modules():
        tables: list[dict[str, Any]] = [module._parameters, module._buffers]
        for tensors in tables:
            for name, tensor in tensors.items():
                if tensor is not None and tensor not in copies:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                    if isinstance(tensor, nn.Parameter):
                        fake = nn.Parameter(fake, tensor.requires_grad)
                    copies[tensor] = fake
                if tensor is not None:
                    tensors[name] = copies[tensor]
    return model.eval()


def _ones(device: torch.device, *shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.int64, device=device)


def _fake_batch(B: int, P: int, K: int, T: int, device: torch.device) -> MicroBatch:
    ones = partial(_ones, device)
    mask = torch.ones(B, K, T, dtype=torch.bool, device=device)
    return MicroBatch(
        ones(B, P), ones(B, P), ones(B, K, T), mask, ones(B, K), ones(B, K), ones(B, K, T)
    )
