"""Where a step's time goes, without a word about time in the loop."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class Stopwatch:
    """Adds up the seconds that the functions made by `timed` take, by name.

    `settle` waits for what a function has begun on another device, so that it counts as its own.
    """

    def __init__(self, settle: Callable[[], None] = lambda: None) -> None:
        self._settle = settle
        self._seconds: dict[str, float] = defaultdict(float)
        self._start = time.perf_counter()

    def timed(self, name: str, function: Callable[P, R]) -> Callable[P, R]:
        """`function`, its time counted under `name`."""

        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            start = time.perf_counter()
            try:
                result = function(*args, **kwargs)
                self._settle()
                return result
            finally:
                self._seconds[name] += time.perf_counter() - start

        return call

    def lap(self) -> dict[str, float]:
        """Seconds since the last lap: `step_s`, each name's, and `other_s` for the rest."""
        now = time.perf_counter()
        step, self._start = now - self._start, now
        named = {f"{name}_s": seconds for name, seconds in self._seconds.items()}
        self._seconds.clear()
        return {"step_s": step, **named, "other_s": step - sum(named.values())}
