"""The win rate that a model would have if its answers were as long as the baseline's. Never torch.

Dubois, Galambosi, Liang, Hashimoto, "Length-Controlled AlpacaEval", 2024 (arXiv 2404.04475).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Weight of Σ w² / 2 beside the log-likelihood: keeps w finite where all wins are one side's, and moves
# a fit of some hundred pairs by less than a hundredth of a point.
PENALTY = 1e-3
STEPS = 100
CONVERGED = 1e-10


@dataclass(frozen=True)
class LengthControl:
    """The fitted model. `win_rate` and `standard_error` are in %, the weights are in units of logits."""

    win_rate: float
    standard_error: float | None  # None without a table of difficulties, and of a single pair
    constant: float
    length: float  # of tanh((baseline's length − model's) / their standard deviation)
    difficulty: float  # of the instruction's difficulty, standardised


def length_controlled_win_rate(
    preferences: Sequence[float],
    baseline_lengths: Sequence[int],
    model_lengths: Sequence[int],
    difficulties: Sequence[float] | None = None,
) -> LengthControl:
    """100 · mean_i σ(c + d · x_i), from the logistic regression

        P(model preferred) = σ(c + l · tanh((n_b − n_m) / s) + d · x_i)

    of the preferences, 1 to 2, on the lengths n in characters, s the standard deviation of n_b − n_m,
    and x_i the instruction's difficulty. Without difficulties x_i is log(1 + n_b), both standardised:
    how long the baseline's answer is, is the instruction's doing too, and without a term of its own
    goes to the length's account. Raises ValueError for lists of different lengths, or empty ones.

    The standard error is 100 · s / √n of the σ(c + d · x_i), s with n − 1, which the leaderboards publish as
    lc_standard_error. It is how much the instructions differ in difficulty, no error of the fit; so there
    is none where the difficulties are not known.

    Published figures come from the same terms, and an L1 penalty chosen by cross-validation over these
    rows and those of two baselines that were told to be brief and to be verbose.
    """
    given = [preferences, baseline_lengths, model_lengths]
    given += [difficulties] if difficulties is not None else []
    if not preferences or len({len(values) for values in given}) > 1:
        raise ValueError(f"lists of {', '.join(str(len(v)) for v in given)} values are no pairs")
    wins_N = np.asarray(preferences, dtype=np.float64) - 1
    baseline_N = np.asarray(baseline_lengths, dtype=np.float64)
    longer_N = baseline_N - np.asarray(model_lengths, dtype=np.float64)
    spread = longer_N.std(ddof=1) if len(longer_N) > 1 else 0.0
    length_N = np.tanh(longer_N / spread) if spread > 0 else np.zeros_like(longer_N)
    difficulty_N = np.log1p(baseline_N) if difficulties is None else np.asarray(difficulties)
    difficulty_N = _standardised(difficulty_N)
    terms_NK = np.stack([np.ones_like(wins_N), length_N, difficulty_N], axis=1)
    weights_K = _logistic_fit(terms_NK, wins_N)
    equal_NK = np.stack([np.ones_like(wins_N), np.zeros_like(wins_N), difficulty_N], axis=1)
    constant, length, difficulty = weights_K.tolist()
    wins_N = _sigmoid(equal_NK @ weights_K)
    error = None
    if difficulties is not None and len(wins_N) > 1:
        error = 100 * float(wins_N.std(ddof=1)) / len(wins_N) ** 0.5
    return LengthControl(100 * float(wins_N.mean()), error, constant, length, difficulty)


def _standardised(values_N: np.ndarray) -> np.ndarray:
    spread = values_N.std()
    return (values_N - values_N.mean()) / spread if spread > 0 else np.zeros_like(values_N)


def _logistic_fit(terms_NK: np.ndarray, targets_N: np.ndarray) -> np.ndarray:
    """argmin_w  −Σ [y log σ(t·w) + (1 − y) log σ(−t·w)] + PENALTY · Σ w² / 2, by Newton's method."""

    def loss(weights_K: np.ndarray) -> float:
        logits_N = terms_NK @ weights_K
        misses_N = np.logaddexp(0, logits_N) - targets_N * logits_N
        return float(misses_N.sum() + PENALTY * weights_K @ weights_K / 2)

    weights_K = np.zeros(terms_NK.shape[1])
    for _ in range(STEPS):
        predicted_N = _sigmoid(terms_NK @ weights_K)
        gradient_K = terms_NK.T @ (predicted_N - targets_N) + PENALTY * weights_K
        curvature_N = predicted_N * (1 - predicted_N)
        hessian_KK = terms_NK.T @ (terms_NK * curvature_N[:, None])
        step_K = np.linalg.solve(hessian_KK + PENALTY * np.eye(len(weights_K)), gradient_K)
        before, size = loss(weights_K), 1.0
        # Far from the minimum a whole step may lead away from it.
        while loss(weights_K - size * step_K) > before and size > CONVERGED:
            size /= 2
        weights_K = weights_K - size * step_K
        if np.abs(size * step_K).max() < CONVERGED:
            break
    return weights_K


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -logits))
