"""Clocks, and sides that take turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

Seconds = Callable[[], float]
CLOCKS: dict[str, Seconds] = {"wall": time.perf_counter, "cpu": time.process_time}
# A ratio of medians of fewer says little.
FEWEST_ROUNDS = 3


def timed(run: Callable[[], Any], clock: Seconds) -> float:
    """Seconds that `run()` takes by `clock`."""
    start = clock()
    run()
    return clock() - start


class Rounds:
    """How many rounds are counted: until the time is used up, but at least FEWEST_ROUNDS.

    The first round is a warm-up and does not count.
    """

    def __init__(self, most: int, budget_s: float):
        self.most = max(most, FEWEST_ROUNDS)
        self.end = time.perf_counter() + budget_s
        self.times: dict[str, list[float]] = {}
        self.warm = False

    def add(self, seconds: Mapping[str, float]) -> bool:
        """Record one round, seconds by side; whether it was the last."""
        if not self.warm:
            self.warm = True
            return False
        for side, value in seconds.items():
            self.times.setdefault(side, []).append(value)
        counted = len(next(iter(self.times.values())))
        late = time.perf_counter() > self.end
        return counted >= self.most or (late and counted >= FEWEST_ROUNDS)


def alternate(sides: Mapping[str, Seconds], most: int, budget_s: float) -> dict[str, list[float]]:
    """Times by side, in seconds, of sides that take turns: A B A B …; each returns its own time."""
    rounds = Rounds(most, budget_s)
    while not rounds.add({name: side() for name, side in sides.items()}):
        pass
    return rounds.times


def ratio(ours: list[float], theirs: list[float]) -> tuple[float, float, float]:
    """(median, smallest, largest) of ours over theirs: the ratio of medians, and that of each round."""
    each = [a / b for a, b in zip(ours, theirs, strict=True)]
    return statistics.median(ours) / statistics.median(theirs), min(each), max(each)
