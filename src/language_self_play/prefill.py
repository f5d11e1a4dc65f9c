"""Prompts through the model, to where their completions begin; a long common beginning only once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from language_self_play.packing import pad_left
from language_self_play.shared_prompt import SharedPrompt, go_on, layer_windows

# Tokens that prompts must have in common for a pass of their own over them: on small models a pass
# takes about as long whatever it computes.
SHORTEST_BEGINNING = 64


class Prefilled(NamedTuple):
    """B prompts, ready to go on from: the next token's logits, keys and values, 0 at padding."""

    logits_BV: Tensor
    cache: DynamicCache
    mask_BP: Tensor


class Behind(NamedTuple):
    """R prompts behind one beginning: the next token's logits, the cache, each prompt's length."""

    logits_RV: Tensor
    cache: SharedPrompt
    lengths_R: Tensor


def prefill(model: PreTrainedModel, prompts: list[list[int]], pad_id: int) -> Prefilled:
    """Each of the B prompts once, padded on the left."""
    cache = DynamicCache(config=model.config)
    logits, mask = _pass(model, prompts, pad_id, cache)
    return Prefilled(logits, cache, mask)


def next_logits(model: PreTrainedModel, prompts: list[list[int]], pad_id: int) -> Tensor:
    """The logits (B, V) of the token after each of the B prompts; no keys and values are kept."""
    return _pass(model, prompts, pad_id, None)[0]


def _pass(
    model: PreTrainedModel, prompts: list[list[int]], pad_id: int, cache: DynamicCache | None
) -> tuple[Tensor, Tensor]:
    """The next token's logits (B, V), and the mask (B, P)."""
    tokens_BP, mask_BP = pad_left(prompts, pad_id, model.device)
    logits = model(
        input_ids=tokens_BP,
        attention_mask=mask_BP,
        position_ids=(mask_BP.cumsum(-1) - 1).clamp_min(0),
        past_key_values=cache,
        use_cache=cache is not None,
        logits_to_keep=1,
    ).logits[:, -1]
    return logits, mask_BP


class Beginning:
    """What all `prompts` begin with, computed once; `new_tokens` are to follow each at most."""

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: list[list[int]],
        pad_id: int,
        new_tokens: int = 0,
    ):
        self.model, self.pad_id = model, pad_id
        self.length = beginning_length(model, prompts, new_tokens)
        if self.length:
            self.prefilled = prefill(model, [prompts[0][: self.length]], pad_id)

    def before(self, prompts: list[list[int]]) -> Behind:
        """The rest of some of the prompts, one row each, to go on from."""
        return self._pass(prompts, kept=True)

    def next_logits(self, prompts: list[list[int]]) -> Tensor:
        """The logits (R, V) of the token after each of R prompts; of their rests nothing is kept."""
        return self._pass(prompts, kept=False).logits_RV

    def _pass(self, prompts: list[list[int]], kept: bool) -> Behind:
        model = self.model
        rest, mask = pad_left([p[self.length :] for p in prompts], self.pad_id, model.device)
        nothing = torch.zeros(len(prompts), dtype=torch.int64, device=model.device)
        padding = None if mask.all() else mask == 0
        cache = SharedPrompt(self.prefilled.cache, self.prefilled.mask_BP, nothing, padding, kept)
        positions = self.length + (mask.cumsum(-1) - 1).clamp_min(0)
        logits = go_on(model, cache, input_ids=rest, position_ids=positions, logits_to_keep=1)
        return Behind(logits[:, -1], cache, self.length + mask.sum(-1))


def beginning_length(model: PreTrainedModel, prompts: list[list[int]], new_tokens: int = 0) -> int:
    """How many tokens at the beginning of all `prompts` are worth a pass of their own; 0 if none.

    Each prompt keeps at least one token. Behind a beginning the rests are padded, which windows of
    attention do not know of, so it is 0 where a prompt with its `new_tokens` may reach beyond a window.
    """
    if len(prompts) < 2:
        return 0
    first, last = min(prompts), max(prompts)  # in their order all others lie between
    shortest = min(map(len, prompts))
    common = next((i for i in range(shortest - 1) if first[i] != last[i]), shortest - 1)
    windows = [window for window in layer_windows(model) if window]
    longest = max(map(len, prompts)) + new_tokens
    if common < SHORTEST_BEGINNING or (windows and longest >= min(windows)):
        return 0
    return common
