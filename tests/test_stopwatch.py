"""Where a step's time goes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from language_self_play import stopwatch


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(s=100.0)
    monkeypatch.setattr(stopwatch, "time", SimpleNamespace(perf_counter=lambda: now.s))
    return now


def test_a_lap_holds_the_step_each_named_part_and_the_rest(clock):
    watch = stopwatch.Stopwatch()

    def take(seconds: float) -> str:
        clock.s += seconds
        return "done"

    learn, reward = watch.timed("learn", take), watch.timed("reward", take)
    assert learn(2.0) == "done"
    assert reward(0.5) == "done"
    assert learn(1.0) == "done"
    clock.s += 0.25
    # 2 + 1 under learn, 0.5 under reward, 0.25 unnamed.
    assert watch.lap() == {"step_s": 3.75, "learn_s": 3.0, "reward_s": 0.5, "other_s": 0.25}


def test_what_a_function_began_elsewhere_counts_as_its_own(clock):
    def settle() -> None:
        clock.s += 3.0

    watch = stopwatch.Stopwatch(settle)
    watch.timed("learn", lambda: None)()
    assert watch.lap() == {"step_s": 3.0, "learn_s": 3.0, "other_s": 0.0}


def test_a_lap_begins_where_the_last_one_ended(clock):
    watch = stopwatch.Stopwatch()

    def take() -> None:
        clock.s += 4.0

    watch.timed("learn", take)()
    watch.lap()
    clock.s += 1.5
    assert watch.lap() == {"step_s": 1.5, "other_s": 1.5}


def test_the_time_of_a_call_that_raises_is_counted(clock):
    watch = stopwatch.Stopwatch()

    def fail() -> None:
        clock.s += 2.0
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        watch.timed("sync", fail)()
    assert watch.lap() == {"step_s": 2.0, "sync_s": 2.0, "other_s": 0.0}
