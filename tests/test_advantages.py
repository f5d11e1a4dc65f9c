"""The paper's values and advantages, by hand."""

from __future__ import annotations

import torch
from torch.testing import assert_close

from language_self_play.advantages import (
    centre,
    challenger_advantages,
    challenger_rewards,
    group_value,
    solver_advantages,
)

ZEROS = torch.zeros(3, 2)


def test_centre_subtracts_each_groups_own_mean():
    rewards = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]])
    # Means 3 and 1.
    expected = torch.tensor([[-2.0, -1.0, 3.0], [-1.0, -1.0, 2.0]])
    assert_close(centre(rewards), expected)


def test_group_value_is_the_mean_reward_of_a_querys_answers():
    assert_close(group_value(torch.tensor([[1.0, 0.0], [1.0, 2.0]])), torch.tensor([0.5, 1.5]))


def test_solver_advantages_without_self_reward_are_reward_minus_group_value():
    R = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    # V = 1/4.
    expected = torch.tensor([[0.75, -0.25, -0.25, -0.25]])
    assert_close(solver_advantages(R, torch.zeros_like(R)), expected)


def test_solver_advantages_add_the_self_reward_before_centring():
    R, R_Q = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 6.0]])
    # R + R_Q = 3, 6; mean 4.5.
    assert_close(solver_advantages(R, R_Q), torch.tensor([[-1.5, 1.5]]))


def test_no_advantage_is_divided_by_a_standard_deviation():
    R = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    valid = [True] * 3
    assert_close(solver_advantages(10 * R, ZEROS), 10 * solver_advantages(R, ZEROS))
    assert_close(
        challenger_advantages(10 * R, ZEROS, valid), 10 * challenger_advantages(R, ZEROS, valid)
    )


def test_challenger_advantages_prefer_hard_queries():
    R = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    # V = 1, 1/2, 0; their mean 1/2; A = 1/2 - V.
    expected = torch.tensor([-0.5, 0.0, 0.5])
    assert_close(challenger_advantages(R, ZEROS, [True] * 3), expected)


def test_challenger_advantages_prefer_queries_of_quality():
    R = torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    R_Q = torch.tensor([[7.0, 5.0], [2.0, 2.0]])
    # V_Q - V = 6 - 1 = 5 and 2 - 1 = 1; mean 3.
    assert_close(challenger_rewards(R, R_Q, [True, True]), torch.tensor([5.0, 1.0]))
    assert_close(challenger_advantages(R, R_Q, [True, True]), torch.tensor([2.0, -2.0]))


def test_an_invalid_query_earns_the_smallest_reward_among_the_valid_ones():
    R, R_Q = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    # The valid ones earn 0 - 1/2 and 1 - 0; the smaller is -1/2, whichever place it has.
    rewards = challenger_rewards(R, R_Q, [False, True, True, False])
    assert_close(rewards, torch.tensor([-0.5, -0.5, 1.0, -0.5]))


def test_challenger_advantages_are_centred_over_invalid_queries_too():
    R, R_Q = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    # Rewards -1/2, -1/2, 1, -1/2; mean -1/8.
    advantages = challenger_advantages(R, R_Q, [False, True, True, False])
    assert_close(advantages, torch.tensor([-0.375, -0.375, 1.125, -0.375]))


def test_without_a_valid_query_all_challenger_advantages_are_zero():
    nothing = torch.zeros(0, 0)
    advantages = challenger_advantages(nothing, nothing, [False, False, False])
    assert advantages.tolist() == [0.0, 0.0, 0.0]
    assert solver_advantages(nothing, nothing).shape == (0, 0)


def test_without_any_query_there_are_no_challenger_advantages():
    nothing = torch.zeros(0, 0)
    assert challenger_advantages(nothing, nothing, []).shape == (0,)
