"""The paper's losses, Equations 4 and 5, on tokens: one function for both roles.

Shapes: log-probs and masks are (K, T), advantages (K,). Log-probs are log softmax(logits / τ) of
the tokens that were sampled; the mask marks those that belong to a completion.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3"]
Aggregation = Literal["sequence", "sequence_mean", "token_mean"]


def policy_gradient(logprobs_KT: Tensor, advantages_K: Tensor) -> Tensor:
    """-(π / sg π - 1) · A for every token, shape (K, T); its gradient is -A ∇ log π.

    The ratio's value is 1: play is strictly on-policy, without clipping or a second epoch.

    Paper: the ratio of whole sequences, without the -1. Here: of tokens, minus 1, because at
    ratio 1 the gradient is the same under every aggregation, and the value is Eq. 4's: a group's
    advantages sum to 0.
    """
    ratio_minus_one = torch.expm1(logprobs_KT - logprobs_KT.detach())
    return -ratio_minus_one * advantages_K[:, None]


def importance_weights(logprobs_KT: Tensor, sampled_KT: Tensor, cap: float) -> Tensor:
    """min(π / μ, C) for every token, shape (K, T), without gradient.

    μ is what the tokens were drawn from: a sampler's distribution, which differs from the trainer's π
    by its kernels' rounding. E_μ[π/μ · f] = E_π[f], a token at a time; the cap C bounds the variance at
    the price of a bias where it holds (Ionides, "Truncated importance sampling", 2008). `sampled_KT`
    are the sampler's own log μ. Paper: plays with the weights' own log-probs, where this is 1.
    """
    return (logprobs_KT.detach() - sampled_KT).exp().clamp_max(cap)


def kl_terms(logprobs_KT: Tensor, ref_logprobs_KT: Tensor, estimator: KLEstimator) -> Tensor:
    """An estimate of the KL to the reference for every token, shape (K, T), in nats.

    With r = log π_Ref - log π (Schulman, "Approximating KL divergence", 2020):

        k1 = -r               value KL(π‖π_Ref); expected gradient 0: noise, not a pull
        k2 = r² / 2           expected gradient ∇KL(π‖π_Ref)
        k3 = exp(r) - r - 1   value KL(π‖π_Ref); expected gradient ∇KL(π_Ref‖π)

    Paper: the printed β log(π/π_Ref) is k1. Here: k3 is the default (GRPO's choice), because k1
    differentiated on samples from π has no effect on average.
    """
    r = ref_logprobs_KT - logprobs_KT
    match estimator:
        case "k1":
            return -r
        case "k2":
            return r.square() / 2
        case "k3":
            return torch.expm1(r) - r
    raise ValueError(f"unknown KL estimator {estimator!r}; one of k1, k2, k3")


def aggregate(
    terms_KT: Tensor, mask_KT: Tensor, mode: Aggregation, num_completions: int, num_tokens: int
) -> Tensor:
    """Token terms to one number, normalised by the counts of the whole step.

        sequence        sum over a completion's tokens, mean over completions (the paper)
        sequence_mean   mean over a completion's tokens, mean over completions
        token_mean      mean over all tokens

    `num_completions` and `num_tokens` count what enters the loss in the step, not in this
    micro-batch, so that the micro-batches' results add up.
    """
    terms = torch.where(mask_KT, terms_KT, 0.0)
    match mode:
        case "sequence":
            return terms.sum() / num_completions
        case "sequence_mean":
            return (terms.sum(-1) / mask_KT.sum(-1).clamp_min(1)).sum() / num_completions
        case "token_mean":
            return terms.sum() / num_tokens
    raise ValueError(f"unknown aggregation {mode!r}")
