"""A group in one pass of the model, its prompt once and its K completions behind it.

A row of the batch is a prompt, padded on the left, and then all its completions, one after the other:

    tokens  (B, P + K · T)    P prompt tokens, then K times T completion tokens

Every layer but attention treats tokens alone, so attention alone has to know that a completion goes on
from the prompt and not from the completion before it. There is no key-value cache, so layers can be
computed again for the backward pass (gradient checkpointing).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from language_self_play.attention import Mapping, merged_attention, own_keys, prompt_keys


@dataclass(frozen=True)
class PackedPrompt:
    """How the batch is laid out: `padding_BP` is True at the prompts' padding, None without any."""

    P: int
    K: int
    T: int
    padding_BP: Tensor | None
    windows: list[int | None]  # of each layer's attention

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        """Attention of (B, heads, P + K · T, D) to keys and values with H heads; (B, heads, ·, D)."""
        window, P, T, padding = self.windows[layer], self.P, self.T, self.padding_BP
        H = key.shape[1]
        query = query.unflatten(1, (H, -1))  # (B, H, q, ·, D): q query heads share a key's head
        q = query.shape[2]
        prompt_key, prompt_value = key[:, :, :P], value[:, :, :P]
        prompt = own_keys(prompt_key, prompt_value, P, q, window, padding)
        of_prompt = merged_attention(query[..., :P, :], prompt, None, None, scale, softcap)
        if T == 0:
            return of_prompt.flatten(1, 2)

        completions = self._by_row(query[..., P:, :])  # (B · K, H, q, T, D)
        own_key, own_value = self._by_row(key[:, :, P:]), self._by_row(value[:, :, P:])
        if attends_one_by_one(query, softcap):
            own = own_keys(own_key, own_value, T, q, window, None)
            shared = prompt_keys(prompt_key, prompt_value, T, self.K * q, 0, window, padding)
            mapping = Mapping(self._by_prompt, self._by_completion)
            out = merged_attention(completions, own, shared, mapping, scale, softcap)
        else:
            keys = torch.cat([prompt_key.repeat_interleave(self.K, 0), own_key], 2)
            values = torch.cat([prompt_value.repeat_interleave(self.K, 0), own_value], 2)
            out = self._attend_to_repeated(completions, keys, values, window, scale)
        out = out.unflatten(0, (-1, self.K)).movedim(1, -3).flatten(-3, -2)
        return torch.cat([of_prompt, out], -2).flatten(1, 2)

    def _attend_to_repeated(
        self, query: Tensor, key: Tensor, value: Tensor, window: int | None, scale: float
    ) -> Tensor:
        """Attention of (B · K, H, q, T, D) to a prompt's keys that each completion has for itself."""
        padding = None if self.padding_BP is None else self.padding_BP.repeat_interleave(self.K, 0)
        key, value, hidden, _ = own_keys(key, value, self.T, 1, window, padding)
        size = query.shape
        out = nn.functional.scaled_dot_product_attention(
            query.flatten(1, 2),
            key,
            value,
            attn_mask=None if hidden is None else ~hidden,
            scale=scale,
            enable_gqa=True,
        )
        return out.view(*size[:-1], -1)

    def _by_row(self, x: Tensor) -> Tensor:
        """(B, …, K · T, D) -> (B · K, …, T, D)."""
        return x.unflatten(-2, (self.K, self.T)).movedim(-3, 1).flatten(0, 1)

    def _by_prompt(self, x: Tensor) -> Tensor:
        """(B · K, H, M, ·) -> (B, H, K · M, ·)."""
        return x.unflatten(0, (-1, self.K)).transpose(1, 2).flatten(2, 3)

    def _by_completion(self, x: Tensor) -> Tensor:
        """The inverse of `_by_prompt`."""
        return x.unflatten(2, (self.K, -1)).transpose(1, 2).flatten(0, 1)


def attends_one_by_one(query: Tensor, softcap: float | None) -> bool:
    """Whether a completion attends to its prompt and to itself apart, and the results are merged.

    On other devices that would write out all scores: torch's kernels keep theirs to themselves.
    """
    return query.device.type == "cpu" or softcap is not None
