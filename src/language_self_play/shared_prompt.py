"""Rows that go on from prompts which they share: a key-value cache, and attention to it.

The keys and values of B prompts exist once, however many rows go on from them; R rows have tokens of
their own behind them, in buffers that grow a piece at a time:

    prompt  (B, H, P, D)    padded on the left
    own     (R, H, L, D)    the l-th of every row stands l places behind its prompt

A query attends to both parts apart, all rows of a prompt in one product, and the two results are
merged by the log-sum-exp of their scores, which is exact (Juravsky et al. 2024, "Hydragen",
arXiv 2402.05099). Nothing is copied per step. Sliding windows and capped scores are known here; other
kinds of attention are not; forward.py finds out which a model has.

Axes beside those of types.py: R rows, H key-value heads, Q query tokens, D head size, L own tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

# The name under which transformers' attention layers find `attend_to_prompt_and_own`.
ATTENTION = "shared_prompt"
# Tokens by which a row's buffer grows: a copy of it is made once in so many tokens.
PIECE = 128


class SharedPromptLayer(CacheLayerMixin):
    """One layer's keys and values: of the prompts, and of every row's own tokens."""

    def __init__(self, prompt: Any, num_rows: int):
        super().__init__()
        assert isinstance(prompt, DynamicLayer), "forward.py tries a model out first"
        assert prompt.keys is not None, "prompts have been computed"
        assert prompt.values is not None, "prompts have been computed"
        self.prompt_keys, self.prompt_values = prompt.keys, prompt.values
        self.own_keys = _buffer(prompt.keys, num_rows, 0)
        self.own_values = _buffer(prompt.values, num_rows, 0)
        self.window: int | None = getattr(prompt, "sliding_window", None)
        self.length = 0  # own tokens of every row

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the prompts' keys tell all shapes."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append (R, H, Q, D) to the rows' own; returns all of those, (R, H, L, D)."""
        end = self.length + key_states.shape[2]
        if end > self.own_keys.shape[2]:
            capacity = -(-end // PIECE) * PIECE
            self.own_keys = self._moved(self.own_keys, capacity)
            self.own_values = self._moved(self.own_values, capacity)
        self.own_keys[:, :, self.length : end] = key_states
        self.own_values[:, :, self.length : end] = value_states
        self.length = end
        return self.own_keys[:, :, :end], self.own_values[:, :, :end]

    def _moved(self, own: Tensor, capacity: int) -> Tensor:
        longer = _buffer(own, len(own), capacity)
        longer[:, :, : self.length] = own[:, :, : self.length]
        return longer

    def keep(self, rows: Tensor, prompts: Tensor | None) -> None:
        """Drop all but `rows`, and all but `prompts` where given."""
        self.own_keys, self.own_values = self.own_keys[rows], self.own_values[rows]
        if prompts is not None:
            self.prompt_keys = self.prompt_keys[prompts]
            self.prompt_values = self.prompt_values[prompts]

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return -1


class SharedPrompt(Cache):
    """The cache of R rows behind B prompts: `prompt_of_row` is (R,), `mask_BP` 0 at padding.

    Rows whose first own tokens are padding have `own_padding_RL`, True there; with it no layer may
    have a window that ends before the beginning of a row.
    """

    def __init__(
        self,
        prompts: DynamicCache,
        mask_BP: Tensor,
        prompt_of_row: Tensor,
        own_padding_RL: Tensor | None = None,
    ):
        self.of_layer = [SharedPromptLayer(x, len(prompt_of_row)) for x in prompts.layers]
        super().__init__(layers=[*self.of_layer])
        self.own_padding_RL = own_padding_RL
        self.padding_BP = None if mask_BP.all() else mask_BP == 0
        self.prompt_of_row = prompt_of_row
        self._place_rows(len(mask_BP))

    def _place_rows(self, num_prompts: int) -> None:
        """Give each row a place among those of its prompt: all prompts get room for K rows."""
        device = self.prompt_of_row.device
        one_hot = self.prompt_of_row[:, None] == torch.arange(num_prompts, device=device)
        self.B, self.K = num_prompts, int(one_hot.sum(0).max())
        rank = (one_hot.cumsum(0) - 1)[
            torch.arange(len(one_hot), device=device), self.prompt_of_row
        ]
        place = self.prompt_of_row * self.K + rank
        in_order = len(place) == self.B * self.K and bool((place.diff() == 1).all())
        self.place = None if in_order else place

    def keep(self, rows: Tensor) -> None:
        """Drop all but `rows`, (≤ R,), and the prompts that none of them goes on from."""
        live, self.prompt_of_row = self.prompt_of_row[rows].unique(return_inverse=True)
        prompts = live if len(live) < self.B else None
        for layer in self.of_layer:
            layer.keep(rows, prompts)
        if self.own_padding_RL is not None:
            self.own_padding_RL = self.own_padding_RL[rows]
        if prompts is not None and self.padding_BP is not None:
            self.padding_BP = self.padding_BP[prompts]
        self._place_rows(len(live))

    def by_prompt(self, x: Tensor) -> Tensor:
        """(R, H, M, ·) -> (B, H, K · M, ·): the rows of a prompt side by side, 0 where it has fewer."""
        if self.place is not None:
            x = x.new_zeros(self.B * self.K, *x.shape[1:]).index_copy_(0, self.place, x)
        _, H, M, D = x.shape
        return x.view(self.B, self.K, H, M, D).transpose(1, 2).reshape(self.B, H, self.K * M, D)

    def by_row(self, x: Tensor, M: int) -> Tensor:
        """The inverse of `by_prompt`."""
        x = x.view(self.B, x.shape[1], self.K, M, -1).transpose(1, 2).flatten(0, 1)
        return x if self.place is None else x[self.place]


def go_on(model: PreTrainedModel, cache: SharedPrompt, **inputs: Any) -> Tensor:
    """The model's logits of rows behind the prompts of `cache`: inputs as for its forward pass."""
    with _attention(model):
        return model(past_key_values=cache, use_cache=True, shared_prompt=cache, **inputs).logits


@contextmanager
def _attention(model: PreTrainedModel) -> Iterator[None]:
    config = model.config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before


# ---------------------------------------------------------------- attention


def attend_to_prompt_and_own(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    shared_prompt: SharedPrompt,
    scaling: float,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: `query` (R, heads, Q, D), `key` and `value` (R, H, L, D).

    The queries are the rows' last Q tokens. Returns (R, Q, heads, D).
    """
    R, heads, Q, D = query.shape
    H, L = key.shape[1], key.shape[2]
    layer = shared_prompt.of_layer[module.layer_idx]  # type: ignore[index]
    grouped = query.reshape(R, H, -1, D)  # a key's query heads beside each other: (R, H, M, D)
    M = grouped.shape[2]
    window = layer.window

    # Keys beyond the window of the first query are left out, those beyond others' are hidden.
    first = L - Q
    start = 0 if window is None else max(0, first + 1 - window)
    hidden = None
    if Q > 1:
        distance = _distance(Q, L, first, query.device)[:, start:]
        hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
        hidden = hidden.repeat(heads // H, 1)
    if shared_prompt.own_padding_RL is not None:
        padding = shared_prompt.own_padding_RL
        padding = nn.functional.pad(padding, (0, L - padding.shape[1]))[:, None, None, start:]
        hidden = padding if hidden is None else hidden | padding
    own, own_lse = attend(grouped, key[:, :, start:], value[:, :, start:], scaling, hidden, softcap)

    P = layer.prompt_keys.shape[2]
    visible = P if window is None else min(P, window - 1 - first)
    if visible <= 0:
        return _as_rows(own, R, Q), None
    hidden = None
    if shared_prompt.padding_BP is not None:
        hidden = shared_prompt.padding_BP[:, None, None, -visible:]
    if Q > 1 and window is not None:
        far = _distance(Q, visible, first + visible, query.device) >= window
        far = far.repeat(shared_prompt.K * heads // H, 1)
        hidden = far if hidden is None else hidden | far
    shared, shared_lse = attend(
        shared_prompt.by_prompt(grouped),
        layer.prompt_keys[:, :, -visible:],
        layer.prompt_values[:, :, -visible:],
        scaling,
        hidden,
        softcap,
    )
    shared = shared_prompt.by_row(shared, M)
    shared_lse = shared_prompt.by_row(shared_lse[..., None], M)
    weight = torch.sigmoid(own_lse[..., None] - shared_lse)
    merged = torch.lerp(shared.to(weight.dtype), own.to(weight.dtype), weight).to(query.dtype)
    return _as_rows(merged, R, Q), None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    hidden: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(scale · q kᵀ) v over the keys that are not hidden, and the scores' log-sum-exp, float32.

    `query` is (B, H, M, D), `key` and `value` (B, H, P, D), `hidden` a mask that broadcasts to
    (B, H, M, P). With `softcap` c a score s becomes c · tanh(s / c) (Gemma 2).
    """
    # Not -∞: where all keys are hidden, what is merged must be finite.
    lowest = torch.finfo(query.dtype).min
    if query.device.type == "cpu" and softcap is None and key.shape[-1] == value.shape[-1]:
        mask = None
        if hidden is not None:
            mask = query.new_zeros(hidden.shape).masked_fill_(hidden, lowest)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, False, attn_mask=mask, scale=scale
        )
    scores = (query @ key.mT).float() * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if hidden is not None:
        scores = scores.masked_fill(hidden, lowest)
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp().to(value.dtype) @ value, lse


def _as_rows(x: Tensor, R: int, Q: int) -> Tensor:
    """(R, H, heads / H · Q, D) -> (R, Q, heads, D)."""
    return x.reshape(R, -1, Q, x.shape[-1]).transpose(1, 2)


def _distance(Q: int, L: int, first: int, device: torch.device) -> Tensor:
    """How many places the i-th of Q queries, at place `first` + i, stands behind the l-th of L keys."""
    queries = torch.arange(Q, device=device)[:, None] + first
    return queries - torch.arange(L, device=device)


def _buffer(like: Tensor, rows: int, capacity: int) -> Tensor:
    return like.new_empty(rows, like.shape[1], capacity, like.shape[3])


AttentionInterface.register(ATTENTION, attend_to_prompt_and_own)
