"""Attention to two sets of keys at once: those of a prompt that rows share, and a row's own.

Each set is attended to by itself, and the results are merged by the log-sum-exp of the scores. With
o_i and l_i of set i, l = log Σ exp(l_i):

    o = Σ exp(l_i - l) · o_i

which is softmax attention to both (Juravsky et al. 2024, "Hydragen", arXiv 2402.05099). The gradient of
a set's keys and values needs of the other set only o and l (Dao et al. 2022, "FlashAttention", arXiv
2205.14135, Algorithm 4; Liu et al. 2023, "Ring Attention", arXiv 2310.01889), so the kernel's own
backward pass is called once for each set, with the merged o and l.

Axes: R rows, B prompts, H key-value heads, q query heads of each, Q query tokens, D head size, L own
keys, P keys of a prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Mapping(NamedTuple):
    """Rows to prompts and back: (R, H, M, ·) -> (B, H, K · M, ·), all rows of a prompt in one."""

    by_prompt: Callable[[Tensor], Tensor]
    by_row: Callable[[Tensor], Tensor]


class Keys(NamedTuple):
    """Keys and values (·, H, L, D), and which are hidden: a mask that broadcasts to (·, H, M, L).

    `causal` instead of a mask hides from the i-th query what stands behind the i-th key.
    """

    key: Tensor
    value: Tensor
    hidden: Tensor | None = None
    causal: bool = False


def own_keys(
    key: Tensor, value: Tensor, Q: int, q: int, window: int | None, padding_RL: Tensor | None
) -> Keys:
    """What the last Q of a row's L tokens see of its L keys (R, H, L, D), q queries a key's head.

    A token sees itself and what stands before it, as far as `window` keys; `padding_RL` is True where
    there is none, and may be shorter than L.
    """
    L = key.shape[2]
    first = L - Q
    if first == 0 and padding_RL is None and (window is None or window >= L):
        return Keys(key, value, causal=Q > 1)
    # Keys beyond the window of the first query are left out, those beyond others' are hidden.
    start = 0 if window is None else max(0, first + 1 - window)
    hidden = None
    if Q > 1:
        distance = _distance(Q, L, first, key.device)[:, start:]
        hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
        hidden = hidden.repeat(q, 1)
    if padding_RL is not None:
        padding = nn.functional.pad(padding_RL, (0, L - padding_RL.shape[1]))
        padding = padding[:, None, None, start:]
        hidden = padding if hidden is None else hidden | padding
    return Keys(key[:, :, start:], value[:, :, start:], hidden)


def prompt_keys(
    key: Tensor,
    value: Tensor,
    Q: int,
    q: int,
    first: int,
    window: int | None,
    padding_BP: Tensor | None,
) -> Keys | None:
    """What Q tokens see of their prompt's keys (B, H, P, D), with `first` tokens between; None: nothing.

    There are q times the Q queries, one after the other; `padding_BP` is True where there is no prompt.
    """
    P = key.shape[2]
    visible = P if window is None else min(P, window - 1 - first)
    if visible <= 0:
        return None
    hidden = None
    if padding_BP is not None:
        hidden = padding_BP[:, None, None, -visible:]
    if Q > 1 and window is not None and Q + first + visible > window:
        far = (_distance(Q, visible, first + visible, key.device) >= window).repeat(q, 1)
        hidden = far if hidden is None else hidden | far
    return Keys(key[:, :, -visible:], value[:, :, -visible:], hidden)


def _distance(Q: int, L: int, first: int, device: torch.device) -> Tensor:
    """How many places the i-th of Q queries, at place `first` + i, stands behind the l-th of L keys."""
    queries = torch.arange(Q, device=device)[:, None] + first
    return queries - torch.arange(L, device=device)


def merged_attention(
    query: Tensor,
    own: Keys,
    shared: Keys | None,
    rows: Mapping | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Attention of `query` (R, H, q, Q, D) to a row's own keys and its prompt's; its shape."""
    if (
        shared
        and can_flash(query, own, softcap)
        # An adapter may train the keys and leave the queries as they are.
        and any(x.requires_grad for x in (query, *own[:2], *shared[:2]))
    ):
        # Only tensors among its arguments get gradients, so the two sets are handed over in pieces.
        return _MergedFlash.apply(rows, scale, own.causal, query, *own[:3], *shared[:3])
    return _merged(query, own, shared, rows, scale, softcap)[0]


def _merged(
    query: Tensor,
    own: Keys,
    shared: Keys | None,
    rows: Mapping | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """The merged outputs (R, H, q, Q, D) and log-sum-exp (R, H, q, Q)."""
    out, lse = _attend_own(query, own, scale, softcap)
    if shared is None or rows is None:
        return out, lse
    size = query.shape
    their, their_lse = attend(rows.by_prompt(query.flatten(2, 3)), shared, scale, softcap)
    their = rows.by_row(their).view(size)
    their_lse = rows.by_row(their_lse[..., None]).view(size[:-1])
    weight = torch.sigmoid(lse - their_lse)[..., None]
    merged = torch.lerp(their.to(weight.dtype), out.to(weight.dtype), weight)
    return merged.to(query.dtype), torch.logaddexp(lse, their_lse)


def _attend_own(
    query: Tensor, own: Keys, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    R, H, q, Q, _ = query.shape
    if not own.causal:
        out, lse = attend(query.flatten(2, 3), own, scale, softcap)
        return out.view(R, H, q, Q, -1), lse.view(R, H, q, Q)
    each = [attend(query[:, :, i], own, scale, softcap) for i in range(q)]
    return torch.stack([o for o, _ in each], 2), torch.stack([lse for _, lse in each], 2)


def attend(query: Tensor, keys: Keys, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """softmax(scale · q kᵀ) v, (·, H, M, D), and the log-sum-exp of the scores, at least float32.

    With `softcap` c a score s becomes c · tanh(s / c) (Gemma 2).
    """
    key, value, hidden, causal = keys
    if can_flash(query, keys, softcap):
        # The kernel takes the last axis to be contiguous, and does not check.
        query, key, value = (
            x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value)
        )
        return _flash(query, key, value, 0.0, causal, attn_mask=_mask(keys), scale=scale)
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = (query @ key.mT).to(wide) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).triu(1)
    if hidden is not None:
        scores = scores.masked_fill(hidden, _lowest(query))
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp().to(value.dtype) @ value, lse


def can_flash(query: Tensor, keys: Keys, softcap: float | None) -> bool:
    """Whether torch's kernel for CPUs does it; elsewhere the scores are written out."""
    same_size = keys.key.shape[-1] == keys.value.shape[-1]
    return query.device.type == "cpu" and softcap is None and same_size


class _MergedFlash(torch.autograd.Function):
    """`_merged` with a gradient that never writes scores out."""

    @staticmethod
    def forward(ctx: Any, rows: Mapping, scale: float, causal: bool, *tensors: Tensor) -> Tensor:
        query, key, value, hidden, their_key, their_value, their_hidden = tensors
        own, shared = Keys(key, value, hidden, causal), Keys(their_key, their_value, their_hidden)
        out, lse = _merged(query, own, shared, rows, scale, None)
        ctx.save_for_backward(*tensors, out, lse)
        ctx.rows, ctx.scale, ctx.causal = rows, scale, causal
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, hidden, their_key, their_value, their_hidden, out, lse = (
            ctx.saved_tensors
        )
        own = Keys(key, value, hidden, ctx.causal)
        shared = Keys(their_key, their_value, their_hidden)
        rows: Mapping = ctx.rows
        [grad] = gradients
        dquery, dkey, dvalue = _own_gradients(own, ctx.scale, grad, query, out, lse)
        flat = [rows.by_prompt(x.flatten(2, 3)) for x in (grad, query, out, lse[..., None])]
        flat[3] = flat[3].squeeze(-1)
        their_dquery, their_dkey, their_dvalue = _gradients(shared, ctx.scale, *flat)
        dquery = dquery + rows.by_row(their_dquery).view(query.shape)
        return None, None, None, dquery, dkey, dvalue, None, their_dkey, their_dvalue, None


def _own_gradients(
    own: Keys, scale: float, grad: Tensor, query: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    if not own.causal:
        flat = [x.flatten(2, 3) for x in (grad, query, out, lse)]
        dquery, dkey, dvalue = _gradients(own, scale, *flat)
        return dquery.view(query.shape), dkey, dvalue
    each = [
        _gradients(own, scale, grad[:, :, i], query[:, :, i], out[:, :, i], lse[:, :, i])
        for i in range(query.shape[2])
    ]
    dquery = torch.stack([d for d, _, _ in each], 2)
    return dquery, sum(d for _, d, _ in each), sum(d for _, _, d in each)  # type: ignore[return-value]


def _gradients(
    keys: Keys, scale: float, grad: Tensor, query: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the query, the keys and the values of one set; `out` and `lse` are the merged ones."""
    tensors = (grad, query, keys.key, keys.value, out, lse)
    grad, query, key, value, out, lse = (x.contiguous() for x in tensors)
    return _flash_backward(
        grad, query, key, value, out, lse, 0.0, keys.causal, attn_mask=_mask(keys), scale=scale
    )


def _mask(keys: Keys) -> Tensor | None:
    if keys.hidden is None:
        return None
    return keys.key.new_zeros(keys.hidden.shape).masked_fill_(keys.hidden, _lowest(keys.key))


def _lowest(x: Tensor) -> float:
    # Not -∞: where all keys of a set are hidden, what is merged must be finite.
    return torch.finfo(x.dtype).min
