"""How much memory a run will take, by part, from its configuration alone. Loads no weights.

Weights, gradients and moments are counted. What a micro-batch keeps for its backward pass is found by
running the model's own forward pass on fake tensors, which have shapes and types but no numbers: right
for every architecture, attention kernel and adapter, and done in a second or two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from language_self_play.config import Config, RewardModelReward
from language_self_play.forward import ForwardPath, checkpointed_layers, logits_rows, states
from language_self_play.packing import MicroBatch, completions_at_once
from language_self_play.policy import add_adapter
from language_self_play.pretrained import (
    choose_device,
    choose_dtype,
    load_model_config,
    read,
    resolve_model,
)

FLOAT32_BYTES = 4
# On the CPU, what a pass takes and gives back is not all used again: the allocator of the C library
# keeps it in pieces. Measured by benchmarks/memory.py at 1.3 to 1.7 times what is in use.
CPU_SLACK = 1.5
# AdamW's two moments, bytes a weight. Of 8 bits: and a float32 scale for each block of 256.
MOMENT_BYTES = {"adamw": 8.0, "adamw_fused": 8.0, "adamw_8bit": 2 + 8 / 256}
# Float32 copies of the logits at the height of their backward pass: scaled, exponentials, gradients.
LOGIT_COPIES_LEARNING = 4
# The same while a token is drawn: scaled, probabilities, and their sum in float64.
LOGIT_COPIES_SAMPLING = 5


@dataclass(frozen=True)
class Turn:
    """The longest that one role can play: `groups` prompts of P tokens, K completions of T."""

    groups: int
    P: int
    K: int
    T: int


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by part. What is needed only while sampling, or only while learning, is never together."""

    device: str
    always: dict[str, int]
    sampling: dict[str, int]
    learning: dict[str, int]

    @property
    def peak(self) -> int:
        passing = (sum(self.sampling.values()), sum(self.learning.values()))
        return sum(self.always.values()) + max(passing)


def memory_estimate(config: Config, turns: list[Turn]) -> MemoryEstimate:
    """Memory of the policy's device for a step in which every completion is as long as it may be.

    Raises ModelError for a model that can't be had.
    """
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    model_config = load_model_config(config.policy.path, config.policy.trust_remote_code)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = _fake_model(config, model_config, dtype, device)
        trained = [p for p in model.parameters() if p.requires_grad]
        weights = sum(p.nbytes for p in model.parameters())
        num_trained = sum(p.numel() for p in trained)
        num_rounded = sum(p.numel() for p in trained if p.dtype != torch.float32)
        kept = [_kept_for_backward(model, config, turn) for turn in turns]
    full = config.policy.lora is None
    always = {
        "policy": weights,
        "reference": weights if config.needs_reference and full else 0,
        "float32 masters of the weights": FLOAT32_BYTES * num_rounded,
        "AdamW's moments": int(MOMENT_BYTES[config.learner.optimizer] * num_trained),
        **_reward_models(config, dtype),
    }
    vocabulary, width = model_config.get_text_config().vocab_size, dtype.itemsize
    rows = min(config.rollout.batch_size, max(turn.groups * turn.K for turn in turns))
    longest = max(turn.P + turn.T for turn in turns)
    largest = [_largest_micro_batch(turn, config) for turn in turns]
    tokens = max(B * K * turn.T for (B, K), turn in zip(largest, turns, strict=True))
    drawn = FLOAT32_BYTES * LOGIT_COPIES_SAMPLING + width
    learned = FLOAT32_BYTES * LOGIT_COPIES_LEARNING + width
    slack = CPU_SLACK if device.type == "cpu" else 1.0
    return MemoryEstimate(
        str(device),
        always,
        {
            "key-value cache": rows * longest * _cache_bytes_per_token(model_config, width),
            "logits of a token": rows * vocabulary * drawn,
        },
        {
            "gradients": FLOAT32_BYTES * num_trained,
            "activations of a micro-batch": int(slack * max(kept)),
            "logits, a piece at a time": min(tokens, logits_rows(vocabulary))
            * vocabulary
            * learned,
        },
    )


def _fake_model(
    config: Config, model_config: PreTrainedConfig, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """The policy as it will be trained, of fake tensors on `device`. Called in a FakeTensorMode."""
    remote_code = config.policy.trust_remote_code
    # PEFT can't be told to work on fake tensors, so they come last.
    with unset_fake_temporarily(), torch.device("meta"):
        model = read(
            config.policy.path,
            lambda: AutoModelForCausalLM.from_config(
                model_config, dtype=dtype, trust_remote_code=remote_code
            ),
        )
        if config.policy.lora is not None:
            add_adapter(model, config.policy.path, config.policy.lora, config.seed)
    copies: dict[torch.Tensor, torch.Tensor] = {}  # tied weights stay tied
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor not in copies:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                    if isinstance(tensor, nn.Parameter):
                        fake = nn.Parameter(fake, tensor.requires_grad)
                    copies[tensor] = fake
                if tensor is not None:
                    tensors[name] = copies[tensor]
    return model.eval()


def _kept_for_backward(model: PreTrainedModel, config: Config, turn: Turn) -> int:
    """Bytes that the forward pass of the role's largest micro-batch keeps beside the weights."""
    again = config.learner.gradient_checkpointing
    path = ForwardPath(shared_prompt=not again)
    B, K = _largest_micro_batch(turn, config)
    plain = _saved_bytes(model, _fake_batch(B, turn.P, K, turn.T, model.device), path, False)
    if not again:
        return plain
    # One layer at a time is computed again and kept whole.
    one_layer = plain // model.config.get_text_config().num_hidden_layers
    return one_layer + _saved_bytes(
        model, _fake_batch(B, turn.P, K, turn.T, model.device), path, True
    )


def _largest_micro_batch(turn: Turn, config: Config) -> tuple[int, int]:
    """(B, K) of the largest micro-batch that packing makes of the turn; see packing.py."""
    budget = config.learner.tokens_per_micro_batch
    shared_prompt = not config.learner.gradient_checkpointing
    K = min(turn.K, completions_at_once(budget, turn.P, turn.T, shared_prompt))
    slices = turn.groups * -(-turn.K // K)
    tokens = (1 if shared_prompt else K) * turn.P + K * turn.T
    return min(slices, max(1, budget // tokens)), K


def _fake_batch(B: int, P: int, K: int, T: int, device: torch.device) -> MicroBatch:
    def ones(*shape: int) -> torch.Tensor:
        return torch.ones(shape, dtype=torch.int64, device=device)

    mask = torch.ones(B, K, T, dtype=torch.bool, device=device)
    return MicroBatch(ones(B, P), ones(B, P), ones(B, K, T), mask, ones(B, K), ones(B, K))


def _saved_bytes(
    model: PreTrainedModel, batch: MicroBatch, path: ForwardPath, checkpointed: bool
) -> int:
    """Bytes of the distinct tensors that autograd saves in the pass through the decoder."""
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage  # held, so that no other gets its address
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with checkpointed_layers(model, checkpointed), hooks:
        states(model, batch, path)
    return sum(s.nbytes() for address, s in saved.items() if address not in weights)


def _cache_bytes_per_token(model_config: PreTrainedConfig, width: int) -> int:
    """Keys and values of all layers for one token."""
    text = model_config.get_text_config()
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // heads
    return 2 * text.num_hidden_layers * kv_heads * head_size * width


def _reward_models(config: Config, dtype: torch.dtype) -> dict[str, int]:
    """Weights of the reward models that share the policy's device."""
    sizes = {}
    for name, section in config.reward.items():
        if not isinstance(section, RewardModelReward) or section.device not in (
            "auto",
            config.device,
        ):
            continue
        path, remote_code = section.path, section.trust_remote_code
        setting = f"reward.{name}.path"

        def build(path: str = path, remote_code: bool = remote_code) -> nn.Module:
            found = AutoConfig.from_pretrained(resolve_model(path), trust_remote_code=remote_code)
            with torch.device("meta"):
                return AutoModelForSequenceClassification.from_config(
                    found, trust_remote_code=remote_code
                )

        model = read(path, build, setting)
        own = dtype if section.dtype == "auto" else getattr(torch, section.dtype)
        sizes[f"reward model {name!r}"] = own.itemsize * sum(p.numel() for p in model.parameters())
    return sizes
