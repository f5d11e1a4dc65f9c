"""Rows that go on from prompts which they share: a key-value cache, and attention to it.

The keys and values of B prompts exist once, however many rows go on from them; R rows have tokens of
their own behind them, in buffers that grow a piece at a time:

    prompt  (B, H, P, D)    padded on the left
    own     (R, H, L, D)    the l-th of every row stands l places behind its prompt

Nothing is copied per token. Sliding windows and capped scores are known here; other kinds of attention
are not: forward.py finds out which a model has, by what its config says and by trying it out.

Axes beside those of types.py: R rows, H key-value heads, Q query tokens, D head size, L own tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from language_self_play.attention import Mapping, merged_attention, own_keys, prompt_keys
from language_self_play.packed_prompt import PackedPrompt

# The name under which transformers' attention layers find `attend_by_layout`.
ATTENTION = "shared_prompt"
# Tokens by which a row's buffer grows: a copy of it is made once in so many tokens.
PIECE = 128
# Of transformers' kinds of layers.
KNOWN_LAYERS = {"full_attention", "sliding_attention"}


class SharedPromptLayer(CacheLayerMixin):
    """One layer's keys and values: of the prompts, and of every row's own tokens."""

    def __init__(self, prompt: Any, num_rows: int, kept: bool = True):
        super().__init__()
        self.kept = kept
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
        if not self.kept:
            return key_states, value_states
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

    def to(self, dtype: torch.dtype) -> None:
        self.prompt_keys, self.prompt_values = (
            self.prompt_keys.to(dtype),
            self.prompt_values.to(dtype),
        )
        self.own_keys, self.own_values = self.own_keys.to(dtype), self.own_values.to(dtype)

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return -1


class SharedPrompt(Cache):
    """The cache of R rows behind B prompts: `prompt_of_row` is (R,), `mask_BP` 0 at padding.

    Rows whose first own tokens are padding have `own_padding_RL`, True there; with it no layer may
    have a window that ends before the beginning of a row. Unless they are `kept`, the rows' own keys and
    values live as long as their layer computes: nothing can go on from them.
    """

    def __init__(
        self,
        prompts: DynamicCache,
        mask_BP: Tensor,
        prompt_of_row: Tensor,
        own_padding_RL: Tensor | None = None,
        kept: bool = True,
    ):
        self.of_layer = [SharedPromptLayer(x, len(prompt_of_row), kept) for x in prompts.layers]
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

    def to(self, dtype: torch.dtype) -> None:
        """Go on in `dtype`; the prompts that were given stay as they are."""
        for layer in self.of_layer:
            layer.to(dtype)

    def by_prompt(self, x: Tensor) -> Tensor:
        """(R, H, M, ·) -> (B, H, K · M, ·): the rows of a prompt side by side, 0 where it has fewer."""
        if self.place is not None:
            x = x.new_zeros(self.B * self.K, *x.shape[1:]).index_copy_(0, self.place, x)
        x = x.unflatten(0, (self.B, self.K)).transpose(1, 2)
        return x.reshape(*x.shape[:2], -1, x.shape[-1])

    def by_row(self, x: Tensor) -> Tensor:
        """The inverse of `by_prompt`."""
        x = x.unflatten(2, (self.K, -1)).transpose(1, 2).flatten(0, 1)
        return x if self.place is None else x[self.place]

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        """Attention of the rows' last Q tokens, (R, heads, Q, D), to all L own and to the prompts."""
        Q, H, L = query.shape[2], key.shape[1], key.shape[2]
        of_layer = self.of_layer[layer]
        window = of_layer.window
        grouped = query.unflatten(1, (H, -1))  # q query heads share a key's head
        q = grouped.shape[2]
        own = own_keys(key, value, Q, q, window, self.own_padding_RL)
        prompts = of_layer.prompt_keys, of_layer.prompt_values
        shared = prompt_keys(*prompts, Q, self.K * q, L - Q, window, self.padding_BP)
        mapping = Mapping(self.by_prompt, self.by_row)
        return merged_attention(grouped, own, shared, mapping, scale, softcap).flatten(1, 2)


def has_unknown_layers(model: PreTrainedModel) -> bool:
    """Whether the config names a kind of layer that is not known here.

    Trying a model out would not tell: chunked attention (Llama 4), which has the cache of a sliding
    window, and attention to the best keys show only in texts longer than a chunk.
    """
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return getattr(config, "attention_chunk_size", None) is not None
    return not KNOWN_LAYERS.issuperset(kinds)


def layer_windows(model: PreTrainedModel) -> list[int | None]:
    """How many keys each layer's attention sees, itself included; None for all."""
    layers = DynamicCache(config=model.config).layers
    return [getattr(layer, "sliding_window", None) for layer in layers]


def go_on(model: PreTrainedModel, cache: SharedPrompt, **inputs: Any) -> Tensor:
    """The model's logits of rows behind the prompts of `cache`: inputs as for its forward pass."""
    with attention_to_shared_prompts(model):
        return model(past_key_values=cache, use_cache=True, shared_prompt=cache, **inputs).logits


def attention_to_shared_prompts(model: PreTrainedModel) -> AbstractContextManager[None]:
    """While active, a forward pass takes `shared_prompt`: the layout that does its attention."""
    return attention_of(model, ATTENTION)


@contextmanager
def attention_of(model: PreTrainedModel, implementation: str | None) -> Iterator[None]:
    """While active, the model's layers attend by the implementation of that name."""
    config = model.config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = implementation
    try:
        yield
    finally:
        config._attn_implementation = before


def attend_by_layout(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    shared_prompt: SharedPrompt | PackedPrompt,
    scaling: float,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: (R, heads, Q, D) and (R, H, L, D) to (R, Q, heads, D)."""
    if kwargs.get("s_aux") is not None:
        raise NotImplementedError("attention sinks have a part in every softmax")
    layer: Any = module.layer_idx
    out = shared_prompt.attend(layer, query, key, value, scaling, softcap)
    return out.transpose(1, 2), None


def _buffer(like: Tensor, rows: int, capacity: int) -> Tensor:
    return like.new_empty(rows, like.shape[1], capacity, like.shape[3])


AttentionInterface.register(ATTENTION, attend_by_layout)
