"""Length control: whatever is known by construction must come out."""

from __future__ import annotations

import numpy as np
import pytest

from language_self_play.evaluate.length_control import length_controlled_win_rate

# Preferences that are a logistic model's own probabilities, so that its fit is exact.
CONSTANT, LENGTH, DIFFICULTY = -0.8, -1.6, 1.1
N = 400


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def made_up(coupled: float):
    """(preferences, baseline's lengths, model's lengths, difficulties, the right answer in %).

    `coupled` is how much the difficulty goes along with the lengths' difference.
    """
    rng = np.random.default_rng(7)
    baseline, model = rng.integers(200, 3000, N), rng.integers(100, 2000, N)
    longer = baseline - model
    tanh = np.tanh(longer / longer.std(ddof=1))
    difficulty = 3.0 + rng.normal(size=N) + coupled * tanh
    centred = (difficulty - difficulty.mean()) / difficulty.std()
    wins = sigmoid(CONSTANT + LENGTH * tanh + DIFFICULTY * centred)
    right = 100 * sigmoid(CONSTANT + DIFFICULTY * centred).mean()
    return (1 + wins).tolist(), baseline.tolist(), model.tolist(), difficulty.tolist(), right


@pytest.mark.parametrize("coupled", [0.0, 1.5, -1.5])
def test_with_the_difficulties_the_right_number_comes_out(coupled):
    preferences, baseline, model, difficulties, right = made_up(coupled)
    fitted = length_controlled_win_rate(preferences, baseline, model, difficulties)
    assert fitted.win_rate == pytest.approx(right, abs=0.01)
    assert fitted.constant == pytest.approx(CONSTANT, abs=1e-3)
    assert fitted.length == pytest.approx(LENGTH, abs=1e-3)
    assert fitted.difficulty == pytest.approx(DIFFICULTY, abs=1e-3)


def test_without_them_a_difficulty_that_goes_with_length_is_missed():
    preferences, baseline, model, _, right = made_up(1.5)
    alone = length_controlled_win_rate(preferences, baseline, model)
    assert abs(alone.win_rate - right) > 1


def test_the_scale_and_the_zero_of_difficulties_are_of_no_account():
    preferences, baseline, model, difficulties, _ = made_up(1.5)
    fitted = length_controlled_win_rate(preferences, baseline, model, difficulties)
    scaled = [100 - 20 * d for d in difficulties]
    again = length_controlled_win_rate(preferences, baseline, model, scaled)
    assert again.win_rate == pytest.approx(fitted.win_rate)
    assert again.difficulty == pytest.approx(-fitted.difficulty)


def test_noisy_binary_preferences_come_within_a_few_points_of_the_right_number():
    preferences, baseline, model, difficulties, right = made_up(1.5)
    rng = np.random.default_rng(3)
    drawn = [1.0 + (rng.random() < p - 1) for p in preferences]
    fitted = length_controlled_win_rate(drawn, baseline, model, difficulties)
    # The binomial spread of a mean of 400 is 2.5 points at most.
    assert fitted.win_rate == pytest.approx(right, abs=5)


def test_a_longer_answer_that_wins_by_length_alone_loses_its_gain():
    # Won if and only if longer; with equal lengths either side would be as good.
    model = [100, 900] * 50
    preferences = [1.1, 1.9] * 50
    fitted = length_controlled_win_rate(preferences, [500] * 100, model)
    assert fitted.win_rate == pytest.approx(50, abs=0.01)
    shorter_wins = length_controlled_win_rate(preferences, [500] * 100, model[::-1])
    assert shorter_wins.length > 0 > fitted.length


def test_equal_lengths_leave_the_win_rate_as_it_is():
    fitted = length_controlled_win_rate([1.2, 1.9, 1.0, 1.5], [7] * 4, [7] * 4)
    assert fitted.win_rate == pytest.approx(40.0, abs=0.02)  # (.2 + .9 + 0 + .5) / 4
    assert fitted.length == 0.0


@pytest.mark.parametrize(("preference", "low", "high"), [(2.0, 99, 100), (1.0, 0, 1)])
def test_one_side_that_wins_everything_has_a_finite_fit(preference, low, high):
    lengths = list(range(1, 301))
    fitted = length_controlled_win_rate([preference] * 300, lengths, lengths[::-1])
    assert low < fitted.win_rate < high
    assert np.isfinite([fitted.constant, fitted.length, fitted.difficulty]).all()


def test_a_single_pair_is_its_own_win_rate_and_has_no_standard_error():
    fitted = length_controlled_win_rate([1.75], [10], [20], [1.0])
    assert fitted.win_rate == pytest.approx(75, abs=0.2)
    assert fitted.standard_error is None


def test_the_standard_error_is_that_of_the_predicted_wins_over_the_instructions():
    preferences, baseline, model, difficulties, _ = made_up(1.5)
    fitted = length_controlled_win_rate(preferences, baseline, model, difficulties)
    centred = (np.array(difficulties) - np.mean(difficulties)) / np.std(difficulties)
    wins = sigmoid(CONSTANT + DIFFICULTY * centred)
    # s / √n with n − 1; that of the preferences, which vary with length too, is another.
    error = 100 * (sum((wins - wins.mean()) ** 2) / (N - 1) / N) ** 0.5
    assert fitted.standard_error == pytest.approx(error, abs=1e-3)
    assert abs(error - 100 * np.std(preferences, ddof=1) / N**0.5) > 0.05


def test_without_difficulties_there_is_no_standard_error():
    assert length_controlled_win_rate([1.2, 1.9], [7, 8], [7, 9]).standard_error is None


@pytest.mark.parametrize(
    "lists", [([], [], []), ([1.5], [1, 2], [1]), ([1.5], [1], [1], [1.0, 2.0])]
)
def test_lists_of_unlike_lengths_are_refused(lists):
    with pytest.raises(ValueError, match="are no pairs"):
        length_controlled_win_rate(*lists)
