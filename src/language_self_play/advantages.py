"""The paper's values and advantages: Equations 2 and 3, and their extension by the self-reward.

Shapes: R_NG and R_Q_NG hold the reward and the quality self-reward of G answers to each of the N
valid queries. Invalid queries have no answers; only their flag reaches `challenger_advantages`.
No advantage is divided by a standard deviation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from language_self_play.errors import RewardError


def centre(rewards: Tensor) -> Tensor:
    """r - mean(r), the mean over the last axis: a group's completions. Exactly 0 for equal rewards."""
    return rewards - _mean(rewards)[..., None]


def group_value(rewards_NG: Tensor) -> Tensor:
    """V(q_i) = mean_j R(q_i, a_ij), shape (N,). Paper, Eq. 2."""
    return _mean(rewards_NG)


def _mean(rewards: Tensor) -> Tensor:
    """The mean over the last axis, summed in float64.

    In float32 eight rewards of 0.1 would have advantages of 7e-9, of which AdamW, which divides by
    the gradient's size, would make a step.
    """
    return rewards.double().mean(-1).to(rewards.dtype)


def solver_advantages(R_NG: Tensor, R_Q_NG: Tensor) -> Tensor:
    """A_Sol = (R + R_Q) - mean_G(R + R_Q), shape (N, G).

    With R_Q = 0 this is R(q_i, a_ij) - V(q_i) of LSP-Zero. Paper, after Eq. 2 and after Eq. 5.
    """
    return centre(R_NG + R_Q_NG)


def hardness(R_NG: Tensor) -> Tensor:
    """-V(q_i), shape (N,): what the paper's Challenger earns for a query. Paper, Eq. 3."""
    return -group_value(R_NG)


def learnability(R_NG: Tensor) -> Tensor:
    """4 p (1 - p), p = V(q_i), shape (N,): 1 where half of the answers are right, 0 where all or none.

    p (1 - p) is the variance of a 0-1 reward, and learnability in Rutherford et al. 2024 ("No
    Regrets", arXiv 2408.15099). Here times 4, so that it lies between 0 and 1.
    """
    p = _probability(R_NG, "learnability")
    return 4 * p * (1 - p)


def spread(R_NG: Tensor) -> Tensor:
    """The standard deviation of R over a query's G answers, shape (N,); any scale of R.

    Where it is 0 all advantages are, and the Solver learns nothing from the query.
    """
    return R_NG.std(-1, correction=0)


def uncertainty(R_NG: Tensor) -> Tensor:
    """1 - 2 |p - 1/2|, p = V(q_i), shape (N,). R-Zero (Huang et al. 2025, arXiv 2508.05004)."""
    return 1 - 2 * (_probability(R_NG, "uncertainty") - 0.5).abs()


OBJECTIVES = {f.__name__: f for f in (hardness, learnability, spread, uncertainty)}


def _probability(R_NG: Tensor, objective: str) -> Tensor:
    """p = V(q_i), (N,). Raises RewardError where R is none."""
    outside = R_NG[(R_NG < 0) | (R_NG > 1)]
    if outside.numel():
        raise RewardError(
            f'challenger.objective = "{objective}": needs rewards from 0 to 1, and one of this step is'
            f' {outside[0].item():.6g}; bound the reward, or use "hardness" or "spread"'
        )
    return group_value(R_NG)


def challenger_rewards(
    R_NG: Tensor, R_Q_NG: Tensor, valid: list[bool], objective: str = "hardness"
) -> Tensor:
    """r_i = V_Q(q_i) + objective(q_i) of every posed query, shape (len(valid),).

    With the paper's objective, hardness, that is V_Q(q_i) - V(q_i). Paper, after Eq. 5. R_Q stands
    outside V, with a plus sign: quality is what the Challenger is paid for beside it. An invalid
    query earns the smallest reward among the valid ones; with none valid all are 0.

    Paper: silent on invalid queries. Here: the batch's minimum, because a fixed penalty can start a
    spiral and dropping them would teach nothing.
    """
    valid_N = torch.tensor(valid, dtype=torch.bool)
    if not valid_N.any():
        return torch.zeros(len(valid))
    answered = group_value(R_Q_NG) + OBJECTIVES[objective](R_NG)
    rewards = answered.min().repeat(len(valid))
    rewards[valid_N] = answered
    return rewards


def challenger_advantages(
    R_NG: Tensor, R_Q_NG: Tensor, valid: list[bool], objective: str = "hardness"
) -> Tensor:
    """A_Ch = r_i - mean_N(r), shape (len(valid),), centred over all N, invalid ones included.

    With R_Q = 0, hardness, and all valid this is mean_i V(q_i) - V(q_i) of LSP-Zero. Paper, Eq. 3.
    """
    return centre(challenger_rewards(R_NG, R_Q_NG, valid, objective))
