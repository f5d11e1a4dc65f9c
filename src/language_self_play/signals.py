"""Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 while a run plays: what they ask for, and when it may happen.

    SIGINT, SIGTERM, SIGHUP   finish the step, write a checkpoint, exit with code 75; a second one, of
                              whichever kind, stops at once. SIGHUP comes when the terminal closes
    SIGUSR1                   write a checkpoint after the step and go on

A signal that was ignored when the run began stays so, as everywhere on Unix: a script's shell starts what
it puts into the background without SIGINT, so that Ctrl-C ends the script and not that. SIGTERM still
comes through.

A step may take minutes. With a bound, a stop that has waited for so long abandons its step: draws are
functions of the step and weights change only at its end, so it is played again on resume and only time
is lost. It is never abandoned once its update has begun, nor while something is written.
"""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

STOPPING = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
STDERR = 2
NOTICE = b"\nlsp: finishing the step, then a checkpoint; Ctrl-C again stops at once\n"


class Abandoned(BaseException):
    """The step, or loading, is given up. No Exception, so that no reward or template that catches those eats it."""


class Stops:
    """What signals have asked for. As a context it listens, if it is in the main thread."""

    def __init__(self, within_s: float = 0.0):
        self.within_s = within_s
        self.requested = False
        self._checkpoint = False
        self._playing = self._abandonable = False
        self._bound_reached = self._overdue = False
        self._before: dict[int, Any] = {}
        self._timer: threading.Timer | None = None

    def __enter__(self) -> Stops:
        if threading.current_thread() is not threading.main_thread():
            return self  # Only the main thread receives signals.
        handlers = dict.fromkeys(STOPPING, self._stop)
        if hasattr(signal, "SIGUSR1"):
            handlers[signal.SIGUSR1] = self._ask_for_checkpoint
        for number, handler in handlers.items():
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, handler)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._playing = self._abandonable = False
        self._restore()

    def begin_step(self) -> None:
        """From here on the step may be abandoned. Raises Abandoned if it is overdue."""
        self._playing = self._abandonable = True
        self._abandon_if_overdue()

    def commit(self) -> None:
        """From here on the step is finished whatever it takes. Raises Abandoned if it is overdue."""
        self._abandon_if_overdue()
        self._abandonable = False

    def take_checkpoint_request(self) -> bool:
        """Whether SIGUSR1 has come since this was last asked."""
        asked, self._checkpoint = self._checkpoint, False
        return asked

    def _ask_for_checkpoint(self, number: int, frame: FrameType | None) -> None:
        self._checkpoint = True

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if number not in (signal.SIGINT, signal.SIGTERM):
            leave_closed_terminal()
        if self._bound_reached:  # the timer's own signal, not another press of Ctrl-C
            self._bound_reached, self._overdue = False, True
            self._abandon_if_overdue()
        elif not self._playing and number != signal.SIGINT:
            raise Abandoned  # A system's own action may be none: in a container, for process 1.
        elif self.requested or not self._playing:
            self._restore()
            signal.raise_signal(number)
        else:
            self.requested = True
            # Of the ranks that torchrun starts one is enough.
            if number == signal.SIGINT and os.environ.get("RANK", "0") == "0":
                with suppress(OSError):
                    os.write(STDERR, NOTICE)  # not print, which may be what the signal came into
            if self.within_s:
                self._timer = threading.Timer(self.within_s, self._reach_bound, [number])
                self._timer.daemon = True
                self._timer.start()

    def _reach_bound(self, number: int) -> None:
        """In the timer's thread: wake the main one, also from a system call that it waits in."""
        self._bound_reached = True
        if hasattr(signal, "pthread_kill"):
            main = threading.main_thread().ident
            assert main is not None, "it is running"
            signal.pthread_kill(main, number)
        else:
            signal.raise_signal(number)

    def _abandon_if_overdue(self) -> None:
        if self._overdue and self._abandonable:
            self._abandonable = False  # once: what follows is the checkpoint
            raise Abandoned

    def _restore(self) -> None:
        for number, handler in self._before.items():
            # None is the handler of a program around Python, which Python can't set.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def leave_closed_terminal() -> None:
    """What would be said to a terminal that has closed goes nowhere, so that saying it is no error."""
    for descriptor in (1, STDERR):
        try:
            os.write(descriptor, b"")
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
