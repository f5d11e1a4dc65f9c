"""The paper's values and advantages: Equations 2 and 3, and their extension by the self-reward.

Shapes: R_NG and R_Q_NG hold the reward and the quality self-reward of G answers to each of the N
valid queries. Invalid queries have no answers; only their flag reaches `challenger_advantages`.
No advantage is divided by a standard deviation.
"""

from __future__ import annotations

import torch
from torch import Tensor


def centre(rewards: Tensor) -> Tensor:
    """r - mean(r), the mean over the last axis: a group's completions."""
    return rewards - rewards.mean(-1, keepdim=True)


def group_value(rewards_NG: Tensor) -> Tensor:
    """V(q_i) = mean_j R(q_i, a_ij), shape (N,). Paper, Eq. 2."""
    return rewards_NG.mean(-1)


def solver_advantages(R_NG: Tensor, R_Q_NG: Tensor) -> Tensor:
    """A_Sol = (R + R_Q) - mean_G(R + R_Q), shape (N, G).

    With R_Q = 0 this is R(q_i, a_ij) - V(q_i) of LSP-Zero. Paper, after Eq. 2 and after Eq. 5.
    """
    return centre(R_NG + R_Q_NG)


def challenger_rewards(R_NG: Tensor, R_Q_NG: Tensor, valid: list[bool]) -> Tensor:
    """r_i = V_Q(q_i) - V(q_i) of every posed query, shape (len(valid),). Paper, after Eq. 5.

    R_Q stands outside V, with a plus sign: quality is what the Challenger is paid for, hardness is
    -V. An invalid query earns the smallest reward among the valid ones; with none valid all are 0.

    Paper: silent on invalid queries. Here: the batch's minimum, because a fixed penalty can start a
    spiral and dropping them would teach nothing.
    """
    valid_N = torch.tensor(valid, dtype=torch.bool)
    if not valid_N.any():
        return torch.zeros(len(valid))
    answered = group_value(R_Q_NG) - group_value(R_NG)
    rewards = answered.min().repeat(len(valid))
    rewards[valid_N] = answered
    return rewards


def challenger_advantages(R_NG: Tensor, R_Q_NG: Tensor, valid: list[bool]) -> Tensor:
    """A_Ch = r_i - mean_N(r), shape (len(valid),), centred over all N, invalid ones included.

    With R_Q = 0 and all valid this is mean_i V(q_i) - V(q_i) of LSP-Zero. Paper, Eq. 3.
    """
    return centre(challenger_rewards(R_NG, R_Q_NG, valid))
