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

from language_self_play.attention import Keys, Mapping, merged_attention, own_keys, prompt_keys


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
        one_by_one = attends_one_by_one(query, softcap)
        prompt_query = query[..., :P, :]
        if one_by_one:
            prompt = own_keys(prompt_key, prompt_value, P, q, window, padding)
            of_prompt = merged_attention(prompt_query, prompt, None, None, scale, softcap)
        else:
            prompt = own_keys(prompt_key, prompt_value, P, 1, window, padding)
            of_prompt = fused_attention(prompt_query, prompt, scale)
        if T == 0:
            return of_prompt.flatten(1, 2)

        completions = self._by_row(query[..., P:, :])  # (B · K, H, q, T, D)
        own_key, own_value = self._by_row(key[:, :, P:]), self._by_row(value[:, :, P:])
        if one_by_one:
            own = own_keys(own_key, own_value, T, q, window, None)
            shared = prompt_keys(prompt_key, prompt_value, T, self.K * q, 0, window, padding)
            mapping = Mapping(self._by_prompt, self._by_completion)
            out = merged_attention(completions, own, shared, mapping, scale, softcap)
        else:
            keys = torch.cat([prompt_key.repeat_interleave(self.K, 0), own_key], 2)
            values = torch.cat([prompt_value.repeat_interleave(self.K, 0), own_value], 2)
            repeated = None if padding is None else padding.repeat_interleave(self.K, 0)
            out = fused_attention(
                completions, own_keys(keys, values, T, 1, window, repeated), scale
            )
        out = out.unflatten(0, (-1, self.K)).movedim(1, -3).flatten(-3, -2)
        return torch.cat([of_prompt, out], -2).flatten(1, 2)

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

    On other devices that would write out all scores, so there each completion gets a copy of its prompt's
    keys and torch's own kernels attend to both, which keep their scores to themselves.
    """
    return query.device.type == "cpu" or softcap is not None


def fused_attention(query: Tensor, keys: Keys, scale: float) -> Tensor:
    """Attention of (R, H, q, Q, D) to the last Q tokens' keys (R, H, L, D) by torch's own kernels."""
    size, (q, Q) = query.shape, query.shape[2:4]
    key, value, mask = keys.key, keys.value, None
    if keys.hidden is not None:
        # Padding sees at least itself: where nothing is seen kernels give NaN.
        L = key.shape[2]
        itself = torch.ones(Q, L, dtype=torch.bool, device=key.device).triu(L - Q).tril(L - Q)
        mask = ~keys.hidden | itself
        # With a mask, kernels know no groups of query heads.
        key, value = key.repeat_interleave(q, 1), value.repeat_interleave(q, 1)
    out = nn.functional.scaled_dot_product_attention(
        query.flatten(1, 2),
        key,
        value,
        attn_mask=mask,
        is_causal=keys.causal,
        scale=scale,
        enable_gqa=mask is None and q > 1,
    )
    return out.view(*size[:-1], -1)
