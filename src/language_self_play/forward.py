"""The forward pass of a micro-batch: log-probs of completions, each prompt computed once.

Two things make it lean, and both are checked against the plain pass when a model is loaded:

- the prompt goes through once for the group's K completions, in the same pass (packed_prompt.py);
- the decoder's hidden states are kept and only those of completion tokens become logits, a bounded
  number at a time and again in the backward pass, so no vocabulary decides the batch size.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from language_self_play.decoding import SharedDecoding
from language_self_play.errors import ModelError
from language_self_play.lean_decoder import lean_decoder
from language_self_play.logprobs import token_logprobs
from language_self_play.packed_prompt import PackedPrompt
from language_self_play.packing import MicroBatch
from language_self_play.prefill import prefill
from language_self_play.pretrained import UNBOUNDED_CONTEXT, vocabulary_size
from language_self_play.shared_prompt import (
    SharedPrompt,
    attention_of,
    attention_to_shared_prompts,
    go_on,
    has_unknown_layers,
    layer_windows,
)

# Logits that exist at once: 128 MiB in float32, a few times that with what the softmax needs.
LOGITS_AT_ONCE = 1 << 25
# Attention to prompts that stand apart has a price, about a tenth on a small model: so many times fewer
# tokens pay it.
LEAST_SAVING = 1.15
# Largest difference of a path's log-probs from the plain pass's, over their spread.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}


@dataclass(frozen=True)
class ForwardPath:
    """How a model's log-probs are computed: a static choice, made once for a run.

    shared_prompt     a prompt once for all its completions; otherwise whole sequences
    separate_head     logits from hidden states, in chunks; otherwise the model's own, all at once
    """

    shared_prompt: bool = True
    separate_head: bool = True


PLAIN = ForwardPath(shared_prompt=False, separate_head=False)


def choose_path(model: PreTrainedModel) -> ForwardPath:
    """The leanest path that gives the plain pass's log-probs on this model; warns of what it can't."""
    path = ForwardPath()
    probe = _probe(model)
    with torch.no_grad():
        expected = completion_logprobs(model, probe, 1.0, PLAIN)
        if not _agrees(model, probe, expected, ForwardPath(False, True)):
            warnings.warn(
                f"{type(model).__name__} gives no logits for hidden states alone, so those of a whole"
                " micro-batch are kept at once; a smaller learner.tokens_per_micro_batch saves memory",
                stacklevel=2,
            )
            path = replace(path, separate_head=False)
        if has_unknown_layers(model) or not _agrees(model, probe, expected, path):
            warnings.warn(
                f"{type(model).__name__} has a kind of attention that knows no shared prompts, so in"
                " learning prompts are computed once for each completion",
                stacklevel=2,
            )
            path = replace(path, shared_prompt=False)
    return path


def goes_on_from_shared_prompts(model: PreTrainedModel) -> bool:
    """Whether rows behind shared prompts (shared_prompt.py) get on `model` what the plain pass gives.

    Warns if not.
    """
    probe = _probe(model)
    with torch.no_grad():
        expected = completion_logprobs(model, probe, 1.0, PLAIN)
        agrees = not has_unknown_layers(model) and _is_close(
            model, probe, expected, lambda: _logprobs_behind_prompts(model, probe)
        )
    if not agrees:
        warnings.warn(
            f"{type(model).__name__} has a kind of attention that knows no shared prompts, so each"
            " completion keeps its own copy of its prompt's keys and values",
            stacklevel=2,
        )
    return agrees


def _logprobs_behind_prompts(model: PreTrainedModel, batch: MicroBatch) -> Tensor:
    """log softmax of every completion token, (B, K, T), as the sampler computes it."""
    prompts = [
        p[m.bool()].tolist() for p, m in zip(batch.prompts_BP, batch.prompt_mask_BP, strict=True)
    ]
    B, K, T = batch.completions_BKT.shape
    prefilled = prefill(model, prompts, pad_id=0)
    prompt_of_row = torch.arange(B, device=model.device).repeat_interleave(K)
    cache = SharedPrompt(prefilled.cache, prefilled.mask_BP, prompt_of_row)
    tokens = batch.completions_BKT.flatten(0, 1)
    positions = prefilled.mask_BP.sum(-1)[prompt_of_row, None] + torch.arange(
        T, device=model.device
    )
    logits = [prefilled.logits_BV[prompt_of_row, None]]
    # Several tokens at once, then one: both ways of going on.
    several, last = slice(0, T - 2), T - 2
    logits.append(
        go_on(model, cache, input_ids=tokens[:, several], position_ids=positions[:, several])
    )
    lean = lean_decoder(model)
    decoding = SharedDecoding(model, UNBOUNDED_CONTEXT, logits[0], cache, positions[:, last], lean)
    decoding.step(tokens[:, last])
    logits.append(decoding.logits_RV[:, None])
    return token_logprobs(torch.cat(logits, 1), tokens, 1.0).view(B, K, T)


def completion_logprobs(
    model: PreTrainedModel,
    batch: MicroBatch,
    temperature: float,
    path: ForwardPath = ForwardPath(),
) -> Tensor:
    """log softmax(logits / τ) of every completion token, shape (B, K, T); 0 where masked."""
    if not batch.mask_BKT.any():
        return torch.zeros(batch.mask_BKT.shape, device=batch.mask_BKT.device)
    before = states(model, batch, path)[batch.mask_BKT]
    tokens = batch.completions_BKT[batch.mask_BKT]
    if path.separate_head:
        logprobs = logprobs_of_states(model, before, tokens, temperature)
    else:
        logprobs = token_logprobs(before, tokens, temperature)
    return torch.zeros(batch.mask_BKT.shape, device=logprobs.device).masked_scatter(
        batch.mask_BKT, logprobs
    )


def states(model: PreTrainedModel, batch: MicroBatch, path: ForwardPath) -> Tensor:
    """What each completion token is predicted from, (B, K, T, ·): hidden states, or else logits."""
    shared = path.shared_prompt and saves_tokens(batch)
    compute = _shared_states if shared else _whole_states
    return compute(model, batch, path.separate_head)


def saves_tokens(batch: MicroBatch) -> bool:
    """Whether a prompt once for its K completions is fewer tokens by enough to be faster, too."""
    P, (_, K, T) = batch.prompts_BP.shape[1], batch.completions_BKT.shape
    return K * (P + T) >= LEAST_SAVING * (P + K * T)


def logits_rows(vocabulary: int) -> int:
    """How many tokens' logits exist at once."""
    return max(1, LOGITS_AT_ONCE // vocabulary)


def _shared_states(model: PreTrainedModel, batch: MicroBatch, hidden: bool) -> Tensor:
    """Prompt and completions in one pass, the prompt once for all (packed_prompt.py)."""
    P, (_, K, T) = batch.prompts_BP.shape[1], batch.completions_BKT.shape
    # Nothing is predicted from a completion's last token.
    completions, mask = batch.completions_BKT[..., :-1], batch.mask_BKT[..., :-1]
    lengths = batch.prompt_mask_BP.sum(-1)[:, None, None]
    prompt_positions = (batch.prompt_mask_BP.cumsum(-1) - 1).clamp_min(0)
    # Padding stands at position 0: beyond a row's own tokens the context may end.
    positions = (lengths + torch.arange(T - 1, device=mask.device)) * mask
    padding = None if batch.prompt_mask_BP.all() else batch.prompt_mask_BP == 0
    with attention_to_shared_prompts(model):
        states = _states(
            model,
            hidden,
            input_ids=torch.cat([batch.prompts_BP, completions.flatten(1)], 1),
            position_ids=torch.cat([prompt_positions, positions.flatten(1)], 1),
            use_cache=False,
            keep=1 + K * (T - 1),
            shared_prompt=PackedPrompt(P, K, T - 1, padding, layer_windows(model)),
        )
    # The token after the prompt is drawn from one distribution in all K completions.
    first = states[:, :1, None].expand(-1, K, -1, -1)
    return torch.cat([first, states[:, 1:].unflatten(1, (K, T - 1))], 2)


def _whole_states(model: PreTrainedModel, batch: MicroBatch, hidden: bool) -> Tensor:
    """Whole sequences: the prompt goes through once for each of its completions."""
    B, K, T = batch.completions_BKT.shape
    tokens = torch.cat(
        [batch.prompts_BP.repeat_interleave(K, 0), batch.completions_BKT.flatten(0, 1)], 1
    )
    mask = torch.cat(
        [batch.prompt_mask_BP.repeat_interleave(K, 0), batch.mask_BKT.flatten(0, 1).long()], 1
    )
    return _states(
        model,
        hidden,
        input_ids=tokens[:, :-1],
        attention_mask=mask[:, :-1],
        position_ids=((mask.cumsum(-1) - 1) * mask).clamp_min(0)[:, :-1],
        use_cache=False,
        keep=T,
    ).view(B, K, T, -1)


def _states(model: PreTrainedModel, hidden: bool, keep: int = 0, **inputs: Any) -> Tensor:
    """Hidden states of the decoder, or logits, (rows, positions, ·), of the last `keep` (0: all)."""
    if not hidden:
        return model(**inputs, logits_to_keep=keep).logits
    return model.get_decoder()(**inputs).last_hidden_state[:, -keep:]


def logprobs_of_states(
    model: PreTrainedModel, states_MH: Tensor, tokens_M: Tensor, temperature: float
) -> Tensor:
    """Log-probs of M tokens, (M,), from the hidden states before them, (M, H)."""

    def logprobs(states: Tensor, tokens: Tensor) -> Tensor:
        return token_logprobs(_head(model, states), tokens, temperature)

    rows = logits_rows(vocabulary_size(model))
    if len(tokens_M) <= rows:
        return logprobs(states_MH, tokens_M)
    pieces = zip(states_MH.split(rows), tokens_M.split(rows), strict=True)
    return torch.cat(
        [
            checkpoint(logprobs, *piece, use_reentrant=False, preserve_rng_state=False)
            for piece in pieces
        ]
    )


@dataclass
class _DecoderOutput(BaseModelOutputWithPastAndCrossAttentions):
    """With whatever any architecture hands on from its decoder: mixtures of experts their routers'."""

    router_logits: None = None


def _head(model: PreTrainedModel, states_MH: Tensor) -> Tensor:
    """Logits (M, V) of hidden states (M, H), with whatever scale or cap the model puts on them.

    The model's own forward pass is run with a decoder that returns `states_MH`: each architecture
    treats its logits in its own way after the decoder.
    """
    output = _DecoderOutput(last_hidden_state=states_MH[None])  # type: ignore[arg-type]
    with _replaced_forward(model.get_decoder(), output):
        return model(input_ids=None, use_cache=False).logits[0]


@contextmanager
def _replaced_forward(module: torch.nn.Module, output: Any) -> Iterator[None]:
    module.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        del module.forward  # the instance's; the class keeps its own


@contextmanager
def checkpointed_layers(model: PreTrainedModel, active: bool) -> Iterator[None]:
    """While active, layers keep only their inputs for the backward pass and compute again.

    transformers asks a layer for training mode to do so. The layers alone are put in it, not what is
    in them, so nothing else changes. Raises ModelError for a model without such layers.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if active and not layers:
        raise ModelError(
            f"learner.gradient_checkpointing: {type(model).__name__} has no layers that can be"
            " computed again; leave it off"
        )

    def then_and_again() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """The backward pass, in which it happens, comes after the forward pass's attention is left."""
        now = model.config.get_text_config()._attn_implementation
        return nullcontext(), attention_of(model, now)

    again = partial(
        checkpoint, use_reentrant=False, preserve_rng_state=False, context_fn=then_and_again
    )
    if active:
        for layer in layers:
            vars(layer)["_gradient_checkpointing_func"] = again
            layer.gradient_checkpointing = layer.training = True
    try:
        yield
    finally:
        if active:
            for layer in layers:
                layer.gradient_checkpointing = layer.training = False


def _probe(model: PreTrainedModel) -> MicroBatch:
    """Two prompts of unequal length with two completions each, of unequal length too."""
    device = model.device
    vocabulary = vocabulary_size(model)
    tokens = (torch.arange(2 * 5 + 2 * 2 * 4, device=device) * 7 + 3) % vocabulary
    prompt_mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], device=device)
    mask = torch.tensor([[4, 2], [1, 3]], device=device)[..., None] > torch.arange(4, device=device)
    completions, nothing = tokens[10:].view(2, 2, 4), torch.zeros(2, 2, device=device)
    return MicroBatch(
        tokens[:10].view(2, 5),
        prompt_mask,
        completions,
        mask,
        nothing,
        nothing,
        torch.zeros_like(completions),
    )


def _agrees(model: PreTrainedModel, probe: MicroBatch, expected: Tensor, path: ForwardPath) -> bool:
    """Whether `path` gives the plain pass's log-probs."""
    return _is_close(model, probe, expected, lambda: completion_logprobs(model, probe, 1.0, path))


def _is_close(
    model: PreTrainedModel, probe: MicroBatch, expected: Tensor, compute: Callable[[], Tensor]
) -> bool:
    """Whether what is computed is what was expected, to the tolerance of the model's type."""
    try:
        found = compute()
    except Exception:
        # A model that can't be run in this way raises what its author's code happens to raise.
        return False
    expected, found = expected[probe.mask_BKT], found[probe.mask_BKT]
    spread = expected.std().clamp_min(torch.finfo(torch.float32).tiny)
    tolerance = TOLERANCE.get(model.dtype, max(TOLERANCE.values()))
    close = (found - expected).abs() <= tolerance * spread
    return bool((close | (found.isnan() & expected.isnan())).all())
