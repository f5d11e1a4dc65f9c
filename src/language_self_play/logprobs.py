"""Log-probabilities of tokens under a temperature, in float32 whatever the model's type."""

from __future__ import annotations

import torch
from torch import Tensor


def token_logprobs(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / τ) at `tokens`, shape of `tokens`, in nats.

    `logits` is (..., V), `tokens` (...). Taken before top-p and top-k.
    """
    return shared_logprobs(logits, tokens[..., None], temperature).squeeze(-1)


def shared_logprobs(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / τ) of K tokens under one distribution: (..., V), (..., K) -> (..., K)."""
    scaled = logits.float() / temperature
    return scaled.gather(-1, tokens) - torch.logsumexp(scaled, -1, keepdim=True)


def draw_tokens(
    logits: Tensor, uniforms: Tensor, temperature: float, top_p: float = 1.0, top_k: int = 0
) -> tuple[Tensor, Tensor]:
    """(tokens, log-probs) of one draw a row by inverse CDF, both (B,).

    `logits` is (B, V), `uniforms` (B,) in [0, 1). The log-prob is of softmax(logits / τ), before
    top-k and top-p cut the distribution that is drawn from; ties at the cut are kept.
    """
    scaled = logits.float() / temperature
    probabilities = scaled.softmax(-1)
    kept = truncate(probabilities, top_p, top_k)
    # A float64 sum keeps the tail of a large vocabulary reachable; MPS has no float64.
    wide = torch.float32 if logits.device.type == "mps" else torch.float64
    cumulative = kept.to(wide).cumsum(-1)
    below_one = 1 - torch.finfo(wide).eps
    target = uniforms.to(cumulative.device, wide).clamp_max(below_one) * cumulative[:, -1]
    # right=True steps over tokens of probability 0.
    tokens = torch.searchsorted(cumulative, target[:, None], right=True).squeeze(-1)
    # NaN has no place in the order; its log-prob below says so.
    tokens = tokens.clamp_max(logits.shape[-1] - 1)
    return tokens, token_logprobs(logits, tokens, temperature)


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
