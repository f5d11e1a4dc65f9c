"""Intervals and tests over questions, and pass@k, against numbers worked out by hand."""

from __future__ import annotations

import itertools

import pytest

from language_self_play.evaluate.intervals import (
    bootstrap_interval,
    mean_interval,
    normal_interval,
    paired_bootstrap_p,
    resampled_interval,
    wilson_interval,
)
from language_self_play.evaluate.pass_at_k import pass_at_k


def test_the_normal_half_width_is_z_standard_errors():
    # 1 2 3 4: mean 2.5, s² = 5 / 3, standard error √(5/12) = 0.6454972; times 1.9599640.
    found = normal_interval([1, 2, 3, 4])
    assert found == pytest.approx((2.5, 1.2348487, 3.7651513), rel=1e-6)
    assert found.half_width == pytest.approx(1.2651513, rel=1e-6)
    # At 90 % z is 1.6448536.
    assert normal_interval([1, 2, 3, 4], 0.9).half_width == pytest.approx(1.0617484, rel=1e-6)


def test_wilsons_interval_of_a_share_of_one_ends_at_one_and_is_no_point():
    # 10 of 10: z² = 3.841459; (1 + z²/20 ± z √(z² / 400)) / (1 + z² / 10), which is 1 / 1.3841459 and 1.
    assert wilson_interval([1] * 10) == pytest.approx((1.0, 0.7224672, 1.0), rel=1e-6)
    assert wilson_interval([0] * 10) == pytest.approx((0.0, 0.0, 0.2775328), rel=1e-6)


def test_wilsons_interval_lies_nearer_to_a_half_than_the_share():
    # 9 of 10: (0.9 + 0.1920729 ± 1.959964 √(0.009 + 0.0096036)) / 1.3841459.
    found = wilson_interval([1] * 9 + [0])
    assert found == pytest.approx((0.9, 0.5958500, 0.9821238), rel=1e-6)
    assert found.high - found.mean < found.half_width < found.mean - found.low


def test_shares_get_wilsons_interval_and_other_means_the_normal_one():
    assert mean_interval([1.0, 1.0, 0.0]) == wilson_interval([1.0, 1.0, 0.0])
    assert mean_interval([1.0, 0.5, 0.0]) == normal_interval([1.0, 0.5, 0.0])


def test_shares_get_wilsons_interval_and_other_means_the_bootstraps():
    assert resampled_interval([1.0, 1.0, 0.0]) == wilson_interval([1.0, 1.0, 0.0])
    assert resampled_interval([0.25] * 3) == wilson_interval([0.25] * 3)
    values = [1.0, 0.5, 0.0, 0.25]
    assert resampled_interval(values) == (0.4375, *bootstrap_interval(values))


def test_one_value_and_equal_ones_have_an_interval_that_is_no_point():
    # ½ of one: (0.5 + z²/2 ± z √(¼ + z²/4)) / (1 + z²): ½ ± ½ z / √(1 + z²) = ½ ± 0.4453792.
    assert mean_interval([0.5]) == pytest.approx((0.5, 0.05462076, 0.94537924), rel=1e-6)
    assert mean_interval([0.25] * 3).low < 0.25 < mean_interval([0.25] * 3).high
    with pytest.raises(ValueError, match="one value has no spread"):
        normal_interval([0.5])


def test_the_bootstrap_interval_of_two_values_is_that_of_a_coin():
    # The mean of 4 draws from {0, 1} is 0, ¼, ½, ¾, 1 with 1, 4, 6, 4, 1 sixteenths: at 80 % the
    # tenth and the ninetieth percentile are ¼ (5/16 lie at or below) and ¾.
    assert bootstrap_interval([0, 1, 0, 1], level=0.8) == (0.25, 0.75)
    # At 95 %, 1/16 = 6.25 % lie at 0, more than 2.5 %.
    assert bootstrap_interval([0, 1, 0, 1]) == (0.0, 1.0)


def test_the_bootstrap_interval_agrees_with_the_normal_one_for_many_values():
    values = [((i * 7919) % 1000) / 1000 for i in range(2000)]
    normal = normal_interval(values)
    found = bootstrap_interval(values)
    assert found == pytest.approx(normal[1:], abs=0.05 * normal.half_width)


def test_the_same_seed_gives_the_same_interval_and_another_seed_another():
    values = [i**0.5 for i in range(10)]
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)


def test_drawing_in_pieces_changes_nothing_but_memory(monkeypatch):
    whole = bootstrap_interval([0.0, 0.2, 1.0, 0.7], resamples=1000)
    monkeypatch.setattr("language_self_play.evaluate.intervals.DRAWN_AT_ONCE", 400)
    assert bootstrap_interval([0.0, 0.2, 1.0, 0.7], resamples=1000) == whole


def test_p_is_the_share_of_centred_resamples_as_far_out_as_the_difference():
    # d = 1, 1, 1, −1: mean ½, centred ½ ½ ½ −1½. The mean of 4 draws is ½ − 2j/4 with j of the last
    # value, j binomial (4, ¼): |mean| ≥ ½ unless j = 1, whose probability is 4 · ¼ · (¾)³ = 27/64.
    assert paired_bootstrap_p([1, 1, 1, 0], [0, 0, 0, 1]) == pytest.approx(37 / 64, abs=0.02)


def test_p_does_not_depend_on_the_order_of_the_two():
    a, b = [0.9, 0.3, 0.6, 0.8, 0.1], [0.4, 0.5, 0.2, 0.3, 0.0]
    assert paired_bootstrap_p(a, b) == pytest.approx(paired_bootstrap_p(b, a), abs=1e-12)


def test_p_is_one_for_equal_answers_and_as_small_as_resamples_allow_for_a_clear_difference():
    assert paired_bootstrap_p([0, 1, 1], [0, 1, 1]) == 1.0
    # Every difference is 1: no centred resample is as far from 0. 1 / 10,001.
    assert paired_bootstrap_p([1] * 50, [0] * 50) == pytest.approx(1 / 10_001)


def test_few_equal_differences_are_no_evidence():
    # The sign test: one question 1, three 2 · (½)³.
    assert paired_bootstrap_p([1], [0]) == 1.0
    assert paired_bootstrap_p([1, 1, 1], [0, 0, 0]) == 0.25


def test_pairing_finds_what_the_spread_between_questions_hides():
    easy_and_hard = [i / 100 for i in range(100)]
    a_little_better = [v + 0.01 + 0.002 * (i % 3) for i, v in enumerate(easy_and_hard)]
    shuffled = easy_and_hard[50:] + easy_and_hard[:50]
    assert paired_bootstrap_p(a_little_better, easy_and_hard) < 0.001
    assert paired_bootstrap_p(a_little_better, shuffled) > 0.5


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: bootstrap_interval([]), "at least one"),
        (lambda: normal_interval([]), "at least one"),
        (lambda: wilson_interval([]), "at least one"),
        (lambda: bootstrap_interval([1.0, float("nan")]), "not finite"),
        (lambda: bootstrap_interval([1.0], level=95), "between 0 and 1"),
        (lambda: paired_bootstrap_p([1.0], [1.0, 0.0]), "same questions"),
        (lambda: pass_at_k(3, 1, 4), "k ≤ n"),
        (lambda: pass_at_k(3, 4, 1), "c ≤ n"),
        (lambda: pass_at_k(3, 1, 0), "1 ≤ k"),
    ],
)
def test_what_has_no_interval_is_refused(call, reason):
    with pytest.raises(ValueError, match=reason):
        call()


def test_pass_at_k_is_chens_estimate():
    # 1 − C(7, 1) / C(10, 1) = 3/10; 1 − C(7, 5) / C(10, 5) = 1 − 21/252 = 11/12;
    # of 3 wrong answers no 4 can be drawn.
    assert pass_at_k(10, 3, 1) == pytest.approx(0.3)
    assert pass_at_k(10, 3, 5) == pytest.approx(11 / 12)
    assert pass_at_k(7, 4, 4) == 1.0
    assert pass_at_k(7, 0, 4) == 0.0
    # The naive 1 − (1 − c/n)^k is biased: 1 − 0.7⁵ = 0.832.
    assert pass_at_k(10, 3, 5) != pytest.approx(1 - 0.7**5, abs=0.01)


def test_pass_at_k_is_the_share_of_k_out_of_n_with_a_right_one():
    right = [True, False, False, True, False, False]
    draws = list(itertools.combinations(right, 3))
    assert pass_at_k(6, 2, 3) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_pass_at_k_is_exact_where_factorials_would_overflow():
    # 1 − C(9999, 100) / C(10000, 100) = 100 / 10000.
    assert pass_at_k(10_000, 1, 100) == pytest.approx(0.01)
