"""How often a model is preferred to a baseline, as AlpacaEval counts it. Never torch.

A preference is a number from 1 to 2, as alpaca_eval writes it: 2 the model's answer, 1 the baseline's,
1.5 neither; a judge that gives probabilities lies between.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from language_self_play.evaluate.intervals import resampled_interval

BASELINE_WINS, TIE, MODEL_WINS = 1.0, 1.5, 2.0


@dataclass(frozen=True)
class WinRate:
    """Counts and percentages over n_total preferences, named as alpaca_eval names them."""

    win_rate: float
    standard_error: float | None  # None of a single preference
    n_wins: int
    n_wins_base: int
    n_draws: int
    n_total: int

    @property
    def discrete_win_rate(self) -> float:
        """In %, every preference counted as a win, a loss, or half of each."""
        return 100 * (self.n_wins + self.n_draws / 2) / self.n_total


def win_rate(preferences: Sequence[float]) -> WinRate:
    """100 · the mean of (preference − 1) and 100 · s / √n, s with n − 1.

    Wins are preferences above 1.5, wins of the baseline those below, draws those at it. Raises
    ValueError for none, or one outside 1 … 2.
    """
    if not preferences:
        raise ValueError("no preferences: a win rate needs at least one")
    if not all(BASELINE_WINS <= p <= MODEL_WINS for p in preferences):
        raise ValueError("a preference lies outside 1 … 2")
    n = len(preferences)
    wins = [p - 1 for p in preferences]
    mean = math.fsum(wins) / n
    error = None
    if n > 1:
        variance = math.fsum((w - mean) ** 2 for w in wins) / (n - 1)
        error = 100 * math.sqrt(variance / n)
    return WinRate(
        win_rate=100 * mean,
        standard_error=error,
        n_wins=sum(p > TIE for p in preferences),
        n_wins_base=sum(p < TIE for p in preferences),
        n_draws=sum(p == TIE for p in preferences),
        n_total=n,
    )


def win_rate_interval(preferences: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """(low, high) of the win rate in %, 95 %, over instructions: resampled_interval's."""
    interval = resampled_interval([p - 1 for p in preferences], seed=seed)
    return 100 * interval.low, 100 * interval.high


@dataclass(frozen=True)
class PositionBias:
    """What a judge owes to the order in which it saw two answers; shares from 0 to 1.

    Of a judge without bias `first` is 0.5: it is the mean preference for the answer shown first, ties
    as a half. `flipped` is the share of pairs of which each order names another winner, `tied` that of
    judgements without one.
    """

    first: float
    flipped: float
    tied: float
    win_rate_baseline_first: float  # in %
    win_rate_model_first: float


def position_bias(baseline_first: Sequence[float], model_first: Sequence[float]) -> PositionBias:
    """Of two preferences, 1 to 2, for each pair: its answers in one order and in the other.

    Raises ValueError for none, or numbers of pairs that differ.
    """
    if not baseline_first or len(baseline_first) != len(model_first):
        raise ValueError(f"{len(baseline_first)} and {len(model_first)} are no pairs of judgements")
    n = len(baseline_first)
    pairs = list(zip(baseline_first, model_first, strict=True))
    # Shown second, the model's loss is the first answer's win.
    first = math.fsum((2 - b) + (m - 1) for b, m in pairs) / (2 * n)
    return PositionBias(
        first=first,
        flipped=sum((b - TIE) * (m - TIE) < 0 for b, m in pairs) / n,
        tied=sum((b == TIE) + (m == TIE) for b, m in pairs) / (2 * n),
        win_rate_baseline_first=100 * (math.fsum(baseline_first) / n - 1),
        win_rate_model_first=100 * (math.fsum(model_first) / n - 1),
    )
