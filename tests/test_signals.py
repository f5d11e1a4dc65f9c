"""Real signals, at any moment of a step: the run goes on to the same end, bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from language_self_play import self_play
from language_self_play.errors import Paused
from language_self_play.learner import Learner
from language_self_play.optimizer import Optimizer
from language_self_play.policy import Policy
from language_self_play.run_folder import RunFolder
from language_self_play.sampling.transformers import TransformersSampler
from language_self_play.signals import Stops
from test_train import assert_same_run, events, small

PLAYED = {"checkpoint": {"every": 3, "keep_last": 9}}
AT = 1  # the step that signals come in
LONG_S = 60.0

# Where a signal may come: class, method.
MOMENTS = {
    "sampling": (TransformersSampler, "sample"),
    "learning": (Learner, "_backward"),
    "updating": (Optimizer, "step"),
    "checkpointing": (Policy, "save_trained"),
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> RunFolder:
    return self_play(small("arena-zero", **PLAYED), tmp_path_factory.mktemp("whole") / "run")


def on_call(
    patch: Any, moment: str, number: int, act: Callable[[], None], after: bool = False
) -> None:
    """Call `act` within the `number`-th call of what happens at `moment`."""
    owner, name = MOMENTS[moment]
    original, calls = getattr(owner, name), iter(range(10**6))

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        now = next(calls) == number
        if now and not after:
            act()
        result = original(self, *args, **kwargs)
        if now and after:
            act()
        return result

    patch.setattr(owner, name, call)


def press(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


# Two calls of sampling and of the backward pass a step, one of the others.
CALLS = {"sampling": 2 * AT + 1, "learning": 2 * AT + 1, "updating": AT, "checkpointing": 0}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_at_any_moment_finishes_the_step_and_goes_on_to_the_same_end(
    number, moment, uninterrupted, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        on_call(patch, moment, CALLS[moment], press(number), after=True)
        with pytest.raises(Paused, match=r"paused, (\d) of 4 steps played; go on") as paused:
            self_play(small("arena-zero", **PLAYED), tmp_path / "run")
    assert paused.value.exit_code == 75
    run = RunFolder(tmp_path / "run")
    # The checkpoint is being written after step 2; the stop comes to be seen right behind it.
    steps = 3 if moment == "checkpointing" else AT + 1
    assert [r["step"] for r in run.metrics()] == list(range(steps))
    assert (run.checkpoints_folder / f"step-{steps:06d}").is_dir()
    assert_same_run(uninterrupted, self_play(run.resumed_config({}), run.folder, resume=True))


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="this platform has no SIGUSR1")
def test_sigusr1_checkpoints_after_the_step_and_goes_on(uninterrupted, tmp_path, monkeypatch):
    on_call(monkeypatch, "sampling", 0, press(signal.SIGUSR1))
    run = self_play(small("arena-zero", **PLAYED), tmp_path / "run")
    assert [c.name for c in sorted(run.checkpoints_folder.glob("step-*"))] == [
        "step-000001",  # asked for, once
        "step-000003",  # by cadence
        "step-000004",  # at the end
    ]
    assert [e["event"] for e in events(run)] == ["started", "finished"]
    assert_same_run(uninterrupted, run)


@pytest.mark.parametrize("moment", ["sampling", "learning"])
def test_a_step_that_outlasts_the_bound_is_abandoned_and_played_again(
    moment, uninterrupted, tmp_path, monkeypatch
):
    def press_and_wait() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(LONG_S)

    config = small("arena-zero", guard={"stop_within_s": 0.3}, **PLAYED)
    started = time.monotonic()
    with monkeypatch.context() as patch:
        on_call(patch, moment, CALLS[moment], press_and_wait)
        with pytest.raises(Paused, match=r"step 1 took longer than 0\.3 s .* abandoned; 1 of 4"):
            self_play(config, tmp_path / "run")
    assert time.monotonic() - started < LONG_S / 2
    run = RunFolder(tmp_path / "run")
    assert [r["step"] for r in run.metrics()] == [0]
    assert (run.checkpoints_folder / "step-000001").is_dir()
    assert_same_run(uninterrupted, self_play(run.resumed_config({}), run.folder, resume=True))


@pytest.mark.parametrize("moment", ["updating", "checkpointing"])
def test_no_update_and_no_checkpoint_is_abandoned(moment, uninterrupted, tmp_path, monkeypatch):
    def press_and_wait() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.3)  # beyond the bound

    config = small("arena-zero", guard={"stop_within_s": 0.05}, **PLAYED)
    with monkeypatch.context() as patch:
        on_call(patch, moment, CALLS[moment], press_and_wait)
        with pytest.raises(Paused, match=r"^paused, \d of 4 steps played; go on"):
            self_play(config, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    steps = 3 if moment == "checkpointing" else AT + 1
    assert (run.checkpoints_folder / f"step-{steps:06d}").is_dir()
    assert_same_run(uninterrupted, self_play(run.resumed_config({}), run.folder, resume=True))


def test_a_reward_that_catches_everything_does_not_hold_up_the_bound(
    uninterrupted, tmp_path, monkeypatch
):
    from language_self_play.rewards.arena import ArenaVerifier

    def stubborn(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        while True:
            try:
                time.sleep(LONG_S)
            except Exception:
                continue

    with monkeypatch.context() as patch:
        patch.setattr(ArenaVerifier, "__call__", stubborn)
        config = small("arena-zero", guard={"stop_within_s": 0.2}, **PLAYED)
        with pytest.raises(Paused, match="step 0 took longer"):
            self_play(config, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    assert_same_run(uninterrupted, self_play(run.resumed_config({}), run.folder, resume=True))


def test_the_handlers_of_before_are_back_after_a_run(tmp_path):
    watched = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1]
    before = [signal.getsignal(s) for s in watched]
    self_play(small("arena-zero", steps=1), tmp_path / "run")
    assert [signal.getsignal(s) for s in watched] == before


def test_a_run_in_another_thread_hears_no_signals_and_plays(tmp_path):
    folders = []

    def play() -> None:
        folders.append(self_play(small("arena-zero", steps=1), tmp_path / "run"))

    thread = threading.Thread(target=play)
    thread.start()
    thread.join()
    assert len(list(folders[0].metrics())) == 2 - 1


def test_sigterm_while_the_model_loads_exits_with_75_too(tmp_path, monkeypatch):
    import language_self_play.game as game

    monkeypatch.setattr(game, "load_policy", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Paused, match="before a step was played; start it again"):
        self_play(small("arena-zero"), tmp_path / "run")
    assert not (tmp_path / "run" / "config.toml").exists()


def test_sigterm_before_the_first_step_of_a_resumed_run_leaves_its_checkpoints(
    tmp_path, monkeypatch
):
    import language_self_play.train as train

    run = self_play(small("arena-zero", steps=2, **PLAYED), tmp_path / "run")
    config = run.resumed_config({"steps": 3})
    # The loop's first act, before its first step.
    monkeypatch.setattr(train, "Stopwatch", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Paused, match="before a step was played"):
        self_play(config, run.folder, resume=True)
    assert [c.name for c in run.checkpoints()] == ["step-000002"]


def test_ctrl_c_before_there_is_a_run_to_go_on_with_names_none(tmp_path, monkeypatch):
    import language_self_play.game as game

    monkeypatch.setattr(game, "load_policy", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt) as interrupt:
        self_play(small("arena-zero"), tmp_path / "run")
    assert str(interrupt.value) == ""
    assert not (tmp_path / "run" / "config.toml").exists()


def test_before_it_plays_ctrl_c_acts_at_once():
    with pytest.raises(KeyboardInterrupt), Stops():
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# ---------------------------------------------------------------- whole processes

PROGRAM = """
import sys, time
from language_self_play.cli import main
from language_self_play.sampling.transformers import TransformersSampler
sample, calls = TransformersSampler.sample, iter(range(99))
def slow(self, *args):
    if next(calls) == 3:
        print("sampling", flush=True)
        time.sleep({seconds})
    return sample(self, *args)
TransformersSampler.sample = slow
sys.exit(main(sys.argv[1:]))
"""

FLAGS = (
    "--steps=4 --threads=1 --challenger.num_queries=6 --solver.group_size=3 --checkpoint.every=3"
    " --checkpoint.keep_last=9 --eval.every=2 --eval.tasks=[] --log.progress=none"
).split()


def start(
    folder: Path, seconds: float, *flags: str, before: Callable[[], Any] | None = None
) -> subprocess.Popen[str]:
    """A run that stops for `seconds` while it samples in step 1; returns when it does.

    `before` is called in its process before it begins.
    """
    process = subprocess.Popen(
        [
            *(sys.executable, "-c", PROGRAM.format(seconds=seconds)),
            *("train", "arena-zero", "--run", str(folder), *FLAGS, *flags),
        ],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=before,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line == "sampling\n":
            return process
    raise AssertionError(process.communicate()[1])


def test_sigterm_within_a_bound_ends_a_process_with_75_and_a_sentence(uninterrupted, tmp_path):
    folder = tmp_path / "run"
    process = start(folder, LONG_S, "--guard.stop_within_s=0.2")
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=LONG_S / 2)
    assert process.returncode == 75, errors
    assert "was abandoned; 1 of 4 steps played; go on with: lsp train --resume" in errors
    assert "Traceback" not in errors
    run = RunFolder(folder)
    assert_same_run(uninterrupted, self_play(run.resumed_config({}), run.folder, resume=True))


def without_ctrl_c() -> None:
    """As a script's shell starts what it puts into the background."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def test_ctrl_c_that_is_ignored_when_a_run_begins_stays_ignored(uninterrupted, tmp_path):
    process = start(tmp_path / "run", 1.0, before=without_ctrl_c)
    for _ in range(3):
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
    _, errors = process.communicate(timeout=LONG_S)
    assert (process.returncode, errors) == (0, "")
    assert_same_run(uninterrupted, RunFolder(tmp_path / "run"))


def test_where_ctrl_c_is_ignored_sigterm_stops_and_keeps_its_bound(uninterrupted, tmp_path):
    flags = ["--guard.stop_within_s=0.2"]
    process = start(tmp_path / "run", LONG_S, *flags, before=without_ctrl_c)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=LONG_S / 2)
    assert process.returncode == 75, errors
    assert "was abandoned; 1 of 4 steps played" in errors
    run = RunFolder(tmp_path / "run")
    assert_same_run(uninterrupted, self_play(run.resumed_config({}), run.folder, resume=True))


def test_a_signal_that_a_program_around_python_handles_does_not_end_the_run(monkeypatch):
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    set_handlers = {}
    monkeypatch.setattr(
        signal, "signal", lambda number, handler: set_handlers.update({number: handler})
    )
    with Stops():
        pass
    assert set_handlers[signal.SIGTERM] is signal.SIG_DFL


@pytest.mark.filterwarnings(
    "ignore:.* has gone without a word:UserWarning"
)  # the lock of one killed
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)]
)
def test_a_second_signal_stops_at_once_and_what_is_there_goes_on(
    number, code, uninterrupted, tmp_path
):
    folder = tmp_path / "run"
    process = start(folder, LONG_S)
    process.send_signal(number)
    time.sleep(0.2)  # two signals of a kind that wait together are one
    assert process.poll() is None
    process.send_signal(number)
    _, errors = process.communicate(timeout=LONG_S / 2)
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    said = f"stopped at once; all of it is played again by: lsp train --resume {folder}\n"
    notice = "lsp: finishing the step, then a checkpoint; Ctrl-C again stops at once\n"
    by_hand = number == signal.SIGINT
    assert (notice in errors, said in errors) == (by_hand, by_hand)
    run = RunFolder(folder)
    assert_same_run(uninterrupted, self_play(run.resumed_config({}), run.folder, resume=True))
