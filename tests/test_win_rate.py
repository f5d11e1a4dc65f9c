"""Win rate, standard error, order and repeated answers, as AlpacaEval counts them."""

from __future__ import annotations

import pytest

from language_self_play.evaluate.intervals import wilson_interval
from language_self_play.evaluate.pair_report import repeated_answer
from language_self_play.evaluate.win_rate import position_bias, win_rate, win_rate_interval


def test_the_win_rate_is_the_mean_preference_and_its_error_divides_by_n_minus_1():
    # wins 1, 0.5, 0, 0.9: mean 2.4/4; squared deviations .16 + .01 + .36 + .09 = .62; √(.62/3/4)
    rates = win_rate([2.0, 1.5, 1.0, 1.9])
    assert rates.win_rate == pytest.approx(60.0)
    assert rates.standard_error == pytest.approx(100 * (0.62 / 12) ** 0.5)


def test_ties_are_neither_wins_nor_losses_and_count_half():
    rates = win_rate([2.0, 1.5, 1.5, 1.0, 1.51])
    assert (rates.n_wins, rates.n_draws, rates.n_wins_base, rates.n_total) == (2, 2, 1, 5)
    assert rates.discrete_win_rate == pytest.approx(60.0)  # (2 + 2/2) / 5


def test_one_preference_has_no_standard_error():
    assert win_rate([1.25]).standard_error is None


@pytest.mark.parametrize("preferences", [[], [0.99], [2.01], [float("nan")]])
def test_what_is_no_preference_is_refused(preferences):
    with pytest.raises(ValueError, match="preference"):
        win_rate(preferences)


def test_the_interval_is_in_percent_and_of_the_mean_of_the_preferences_less_1():
    # 400 pairs, 300 won: 75 ± 1.96 · √(.75 · .25 / 400) = 75 ± 4.24
    low, high = win_rate_interval([2.0] * 300 + [1.0] * 100)
    assert low == pytest.approx(75 - 4.24, abs=0.5)
    assert high == pytest.approx(75 + 4.24, abs=0.5)


@pytest.mark.parametrize("preferences", [[2.0] * 9, [1.0] * 9, [2.0], [1.75], [1.5] * 9])
def test_pairs_that_all_go_the_same_way_have_an_interval_that_is_no_point(preferences):
    low, high = win_rate_interval(preferences)
    of_wilson = wilson_interval([p - 1 for p in preferences])
    assert (low, high) == (100 * of_wilson.low, 100 * of_wilson.high)
    assert high - low > 25


def test_a_judge_that_always_prefers_the_first_answer_is_found_out():
    # Shown second, the model loses; shown first, it wins.
    bias = position_bias(baseline_first=[1.0, 1.0], model_first=[2.0, 2.0])
    assert (bias.first, bias.flipped, bias.tied) == (1.0, 1.0, 0.0)
    assert (bias.win_rate_baseline_first, bias.win_rate_model_first) == (0.0, 100.0)


def test_a_judge_that_looks_at_the_answers_has_no_position_bias():
    bias = position_bias(baseline_first=[2.0, 1.0, 1.5], model_first=[2.0, 1.0, 1.5])
    assert bias.first == pytest.approx(0.5)
    assert bias.flipped == 0.0
    assert bias.tied == pytest.approx(1 / 3)


def test_position_bias_counts_each_order_once():
    # first answers' preferences: 2 − 1 = 1, 2 − 1.5 = .5; 2 − 1 = 1, 1 − 1 = 0: mean 2.5/4
    bias = position_bias(baseline_first=[1.0, 1.5], model_first=[2.0, 1.0])
    assert bias.first == pytest.approx(0.625)
    assert bias.flipped == 0.5  # the second pair has a tie in one order, which names no winner
    assert bias.tied == 0.25


@pytest.mark.parametrize("orders", [([], []), ([1.5], []), ([1.5], [1.5, 2.0])])
def test_orders_of_unlike_numbers_are_refused(orders):
    with pytest.raises(ValueError, match="no pairs"):
        position_bias(*orders)


def test_one_answer_to_every_instruction_is_suspect_and_white_space_hides_nothing():
    found = repeated_answer(["I win", "I  win\n", " I win", "another"])
    assert (found["count"], found["share"], found["suspect"]) == (3, 0.75, True)
    assert found["answer"] == "I win"


def test_different_answers_and_a_single_one_are_not_suspect():
    assert not repeated_answer(["a"])["suspect"]
    assert not repeated_answer(list("abcdefghijklm"))["suspect"]
    assert not repeated_answer([*"aa", *map(str, range(18))])[
        "suspect"
    ]  # 2 of 20 is no more than 10 %
    assert repeated_answer([*"aaa", *map(str, range(17))])["suspect"]
