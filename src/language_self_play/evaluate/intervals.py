"""Intervals and tests over questions: what another draw of questions would have given. Never torch.

A question is one number: whether it was answered right, its pass@k, a win rate's 1, 0 or ½.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

RESAMPLES = 10_000
# Numbers drawn at once: bounds the memory that a resampling takes.
DRAWN_AT_ONCE = 4_000_000


class Interval(NamedTuple):
    """A mean and its interval, which need not lie evenly about it."""

    mean: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2


def normal_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """The mean ± z · s / √n, s with n − 1. Raises ValueError for fewer than two values."""
    _check(values, level)
    if len(values) == 1:
        raise ValueError("one value has no spread: a normal interval needs at least two")
    mean = math.fsum(values) / len(values)
    variance = math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)
    half = _z(level) * math.sqrt(variance / len(values))
    return Interval(mean, mean - half, mean + half)


def wilson_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """The share p and Wilson's score interval, which is not a point for a share of 0 or 1.

    (p + z² / 2n ± z √(p (1 − p) / n + z² / 4n²)) / (1 + z² / n); Wilson, "Probable inference, the law of
    succession, and statistical inference", 1927. Its middle lies nearer to ½ than p. Of values between
    0 and 1 it is wide enough: none vary more than those that are 0 or 1. Raises ValueError for no values.
    """
    _check(values, level)
    n, z = len(values), _z(level)
    share = math.fsum(values) / n
    middle = share + z**2 / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    # In exact numbers an end at 0 or 1 is 0 or 1.
    low, high = (min(1.0, max(0.0, end / (1 + z**2 / n))) for end in (middle - half, middle + half))
    return Interval(share, low, high)


def mean_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Of values from 0 to 1: the normal interval, but Wilson's where every value is 0 or 1 or all are equal."""
    return (wilson_interval if _are_shares(values) else normal_interval)(values, level)


def resampled_interval(
    values: Sequence[float], level: float = 0.95, seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """The same with the bootstrap in place of the normal interval: of a few values not beyond 0 and 1."""
    if _are_shares(values):
        return wilson_interval(values, level)
    low, high = bootstrap_interval(values, level, seed, resamples)
    return Interval(math.fsum(values) / len(values), low, high)


def _are_shares(values: Sequence[float]) -> bool:
    return all(value in (0, 1) for value in values) or len(set(values)) == 1


def bootstrap_interval(
    values: Sequence[float], level: float = 0.95, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """(low, high) of the mean: the percentiles of the means of `resamples` draws with replacement.

    Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, section 13.3. Of paired values
    give the differences. The same seed and number of values give the same draws. Raises ValueError
    for no values, values that are not finite, or a level outside (0, 1).
    """
    _check(values, level)
    means = _resampled_means(np.asarray(values, dtype=np.float64), seed, resamples)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_bootstrap_p(
    a: Sequence[float], b: Sequence[float], seed: int = 0, resamples: int = RESAMPLES
) -> float:
    """Two-sided p of "a and b have the same mean" over the same questions in the same order.

    With d = a − b, the share of resampled means of d − d̄ (so that the hypothesis holds) at least as
    far from 0 as d̄, the data's own counted among them: (1 + #{|m| ≥ |d̄|}) / (1 + resamples). Efron
    and Tibshirani, section 16.4. Raises ValueError for different lengths, and as bootstrap_interval.
    """
    if len(a) != len(b):
        raise ValueError(f"{len(a)} values and {len(b)} are not of the same questions")
    _check(a, 0.5)
    _check(b, 0.5)
    differences = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    found = differences.mean()
    least = 2.0 ** (1 - len(differences)) if np.ptp(differences) == 0 else 0.0
    means = _resampled_means(differences - found, seed, resamples)
    # Sums in another order differ in their last bits; a tie is one.
    extreme = int((np.abs(means) >= abs(found) * (1 - 1e-12)).sum())
    return max(least, (1 + extreme) / (1 + resamples))


def _resampled_means(values: np.ndarray, seed: int, resamples: int) -> np.ndarray:
    generator, n = np.random.default_rng(seed), len(values)
    at_once = max(1, DRAWN_AT_ONCE // n)
    return np.concatenate(
        [
            values[generator.integers(n, size=(min(at_once, resamples - start), n))].mean(axis=1)
            for start in range(0, resamples, at_once)
        ]
    )


def _z(level: float) -> float:
    """How many standard deviations about the mean hold `level` of a normal distribution."""
    return NormalDist().inv_cdf((1 + level) / 2)


def _check(values: Sequence[float], level: float) -> None:
    if not len(values):
        raise ValueError("no values: an interval needs at least one")
    if not all(math.isfinite(value) for value in values):
        raise ValueError("a value is not finite")
    if not 0 < level < 1:
        raise ValueError(f"level = {level}: must lie between 0 and 1")
