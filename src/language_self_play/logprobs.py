"""Log-probabilities of tokens under a temperature, in float32 whatever the model's type."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Tokens of a vocabulary that are drawn from as one, before one of them is.
BLOCK = 512


def token_logprobs(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / τ) at `tokens`, shape of `tokens`, in nats.

    `logits` is (..., V), `tokens` (...). Taken before top-p and top-k.
    """
    return shared_logprobs(logits, tokens[..., None], temperature).squeeze(-1)


def shared_logprobs(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / τ) of K tokens under one distribution: (..., V), (..., K) -> (..., K)."""
    return _Logprobs.apply(logits, tokens, temperature)


class _Logprobs(torch.autograd.Function):
    """`shared_logprobs` in few passes over the vocabulary, forward and backward.

    d log p_k / d logits = (onehot_k - p) / τ, summed over the K tokens with what comes from above.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
        scaled = logits if temperature == 1.0 else logits.float() / temperature
        logprobs = scaled.log_softmax(-1, dtype=torch.float32)
        ctx.save_for_backward(logprobs, tokens)
        ctx.temperature, ctx.dtype = temperature, logits.dtype
        return logprobs.gather(-1, tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        logprobs, tokens = ctx.saved_tensors
        gradient = gradient / ctx.temperature
        of_logits = logprobs.exp().mul_(-gradient.sum(-1, keepdim=True))
        of_logits.scatter_add_(-1, tokens, gradient)
        return of_logits.to(ctx.dtype), None, None


def draw_tokens(
    logits: Tensor, uniforms: Tensor, temperature: float, top_p: float = 1.0, top_k: int = 0
) -> tuple[Tensor, Tensor]:
    """(tokens, log-probs) of one draw a row by inverse CDF, both (B,).

    `logits` is (B, V), `uniforms` (B,) in [0, 1). The log-prob is of softmax(logits / τ), before
    top-k and top-p cut the distribution that is drawn from; ties at the cut are kept.
    """
    scaled = logits if temperature == 1.0 else logits.float() / temperature
    probabilities = scaled.softmax(-1, dtype=torch.float32)
    tokens = _inverse_cdf(truncate(probabilities, top_p, top_k), uniforms)
    return tokens, probabilities.gather(-1, tokens[:, None]).squeeze(-1).log()


def _inverse_cdf(weights: Tensor, uniforms: Tensor) -> Tensor:
    """The token, (B,), at which the cumulative sum of `weights` (B, V) exceeds uniform · its total.

    In two stages, the block and the token in it: so a sum of V terms is never written out, and both
    sums can be in float64, which keeps the tail of a large vocabulary reachable.
    """
    V = weights.shape[1]
    wide = torch.float32 if weights.device.type == "mps" else torch.float64  # MPS has no float64
    uniform = uniforms.to(weights.device, wide)[:, None].clamp_max(1 - torch.finfo(wide).eps)
    size = min(BLOCK, V)
    whole = V - V % size
    sums = weights[:, :whole].unflatten(1, (-1, size)).sum(-1)
    if whole < V:
        sums = torch.cat([sums, weights[:, whole:].sum(-1, keepdim=True)], 1)
    block, left = _find(sums.to(wide), uniform)
    within = block * size + torch.arange(size, device=weights.device)
    inside = weights.gather(1, within.clamp_max(V - 1)).masked_fill(within >= V, 0.0)
    token, _ = _find(inside.to(wide), left)
    # NaN has no place in the order; its log-prob says so.
    return (block * size + token).clamp_max(V - 1).squeeze(-1)


def _find(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """(place, what is left): where cumulative weights exceed uniform · total, and how far into it, in [0, 1)."""
    cumulative = weights.cumsum(-1)
    target = uniform * cumulative[:, -1:]
    # right=True steps over weights of 0.
    place = torch.searchsorted(cumulative, target, right=True).clamp_max(weights.shape[1] - 1)
    here = weights.gather(1, place)
    left = (target - (cumulative.gather(1, place) - here)) / here
    return place, left.clamp(0, 1 - torch.finfo(weights.dtype).eps)


def truncate(probabilities: Tensor, top_p: float, top_k: int) -> Tensor:
    """`probabilities` (B, V) with 0 outside the `top_k` likeliest tokens and the nucleus `top_p`.

    The nucleus is the smallest set of likeliest tokens whose probability reaches `top_p`
    (Holtzman et al. 2020). Not renormalised.
    """
    if top_k:
        smallest = probabilities.topk(min(top_k, probabilities.shape[-1]), -1).values[:, -1:]
        probabilities = torch.where(probabilities >= smallest, probabilities, 0.0)
    if top_p < 1.0:
        ordered = probabilities.sort(-1, descending=True).values
        before = ordered.cumsum(-1) - ordered
        total = ordered.sum(-1, keepdim=True)
        inside = before < top_p * total
        smallest = torch.where(inside, ordered, torch.inf).min(-1, keepdim=True).values
        probabilities = torch.where(probabilities >= smallest, probabilities, 0.0)
    return probabilities
