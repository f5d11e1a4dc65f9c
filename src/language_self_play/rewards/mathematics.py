"""Equality as mathematics (math-verify), decided in processes that are killed at a deadline.

math-verify's own timeouts are signals, which can't interrupt what hangs inside C code and don't work
in threads; they are off here. This file is also what a worker process runs: it must not import
anything of ours, so that a worker starts without torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import logging
import os
import re
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

TAIL = 4000  # characters at the end of a text, all that is read of it
START_S = 120.0  # importing sympy from a cold disk
MEMORY_MIB = 4096  # of a worker
PARSES_KEPT = 4096  # by a worker

Request = tuple[str, ...]

# ---------------------------------------------------------------- the trainer's side


class WorkerError(RuntimeError):
    """A worker can't start; says why."""


class _Worker:
    """One process that answers one request at a time."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            start_new_session=True,  # Ctrl-C is the trainer's
        )
        self.request: Request | None = None  # None while it starts or is idle
        self.started = False
        self.deadline = time.monotonic() + START_S
        self._read = b""

    def ask(self, request: Request, timeout_s: float) -> None:
        """Send it. Raises BrokenPipeError if the process is gone."""
        assert self.process.stdin is not None
        self.request = request
        self.deadline = time.monotonic() + timeout_s
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()

    def reply(self) -> tuple[bool, Any]:
        """Read what has come: whether the reply is complete, and the reply. Raises EOFError."""
        assert self.process.stdout is not None
        piece = os.read(self.process.stdout.fileno(), 1 << 16)
        if not piece:
            raise EOFError
        self._read += piece
        if not self._read.endswith(b"\n"):
            return False, None
        value, self._read = json.loads(self._read), b""
        return True, value

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):  # what was not sent any more
                pipe.close()


class MathWorkers:
    """Processes that parse and compare, as many as `workers`, started when first needed.

    A request that takes longer than `timeout_s` ends with its process, and so does one that takes
    the process down; both have failed. The process is replaced.
    """

    def __init__(self, timeout_s: float, workers: int | None = None):
        self.timeout_s = timeout_s
        self.limit = workers or os.cpu_count() or 1
        self._workers: list[_Worker] = []

    def equal(self, pairs: Sequence[tuple[str, str]]) -> list[bool | None]:
        """For (key, answer) pairs: whether they are equal; None if the key says nothing.

        Equal pairs are compared once; what failed is not equal. Raises WorkerError.
        """
        replies = self._ask([("equal", key, answer) for key, answer in pairs])
        return [False if reply == "failed" else reply for reply in replies]

    def read(self, texts: Sequence[str]) -> list[str | None]:
        """The expression that each text says, in one way of writing; None for none, or if it failed.

        Equally written expressions are equal; others may be, too. Raises WorkerError.
        """
        replies = self._ask([("read", text) for text in texts])
        return [reply["expression"] if isinstance(reply, dict) else None for reply in replies]

    def _ask(self, requests: Sequence[Request]) -> list[Any]:
        replies: dict[Request, Any] = {}
        waiting = deque(dict.fromkeys(requests))
        try:
            while waiting or any(worker.request for worker in self._workers):
                self._hand_out(waiting)
                self._collect(replies)
        except BaseException:
            self.close()  # replies to come would be taken for those to other requests
            raise
        return [replies[request] for request in requests]

    def _hand_out(self, waiting: deque[Request]) -> None:
        """Give requests to idle workers, and start as many workers as are needed."""
        for worker in [w for w in self._workers if w.started and w.request is None]:
            if not waiting:
                return
            try:
                worker.ask(waiting[0], self.timeout_s)
                waiting.popleft()
            except BrokenPipeError:  # it died while idle; that is not the request's fault
                self._drop(worker)
        starting = sum(not worker.started for worker in self._workers)
        room = self.limit - len(self._workers)
        for _ in range(min(room, len(waiting) - starting)):
            self._workers.append(_Worker())

    def _collect(self, replies: dict[Request, Any]) -> None:
        """Wait until something happens: a reply, a death, or a deadline."""
        active = [w for w in self._workers if w.request is not None or not w.started]
        if not active:
            return
        with selectors.DefaultSelector() as selector:
            for worker in active:
                assert worker.process.stdout is not None
                selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
            left = min(worker.deadline for worker in active) - time.monotonic()
            ready = {id(key.data) for key, _ in selector.select(max(left, 0.0))}
        for worker in active:
            if id(worker) in ready:
                self._take_reply(worker, replies)
            elif time.monotonic() >= worker.deadline:
                self._fail(worker, replies, f"it did not start within {START_S:g} s")

    def _take_reply(self, worker: _Worker, replies: dict[Request, Any]) -> None:
        try:
            complete, value = worker.reply()
        except EOFError:
            self._fail(worker, replies, "it ended at once")
            return
        if not complete:
            return
        if worker.request is not None:
            replies[worker.request] = value
            worker.request = None
        elif value == "ready":
            worker.started = True
        else:
            raise WorkerError(str(value))

    def _fail(self, worker: _Worker, replies: dict[Request, Any], why: str) -> None:
        self._drop(worker)
        if worker.request is None:
            raise WorkerError(why)
        replies[worker.request] = "failed"

    def _drop(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.kill()

    def close(self) -> None:
        """Kill the workers; the next request starts new ones."""
        while self._workers:
            self._workers.pop().kill()


# ---------------------------------------------------------------- the worker's side

# GSM8K's form: the last line is `#### 42`. A heading further up is none.
FINAL_LINE = re.compile(r"####[ \t]*([^\n#]*?)\s*\Z")
DELIMITED = re.compile(r"\$|\\\(|\\\[|\\boxed|\\begin")
WORD = re.compile(r"(?<![\\{A-Za-z])[A-Za-z]{2,}")
PLAIN_NUMBER = re.compile(r"\A[-+]?[\d.,]+\s*%?\Z")
LINES = re.compile(r"\n|\A\Z")


def expressions(text: str) -> list[Any]:
    """math-verify's reading of the last TAIL characters of `text`: [] or its candidates.

    Where the last line is `#### ...`, that line is read alone. One line without words and
    delimiters is read as LaTeX: `\\frac{1}{2}`, `(1, 2)`.
    """
    text = text[-TAIL:]
    if final := FINAL_LINE.search(text):
        text = final[1]
    text = text.strip()
    bare = not any(pattern.search(text) for pattern in (PLAIN_NUMBER, DELIMITED, WORD, LINES))
    return (_parse(f"${text}$") if bare else []) or _parse(text)


@functools.lru_cache(PARSES_KEPT)
def _parse(text: str) -> list[Any]:
    from math_verify import parse

    return parse(text, parsing_timeout=None)


def equal(key: str, answer: str) -> bool | None:
    """Whether `answer` says what `key` says; None if `key` says nothing."""
    from math_verify import verify

    gold = expressions(key)
    if not gold:
        return None
    return bool(verify(gold, expressions(answer), timeout_seconds=None))


def read(text: str) -> dict[str, str | None]:
    found = expressions(text)
    return {"expression": repr(found[0])[:TAIL] if found else None}


def serve() -> None:
    """Answer requests, one JSON array a line, until there are no more."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1):  # what a library prints is no reply
        os.dup2(null, fd)
    logging.disable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _limit()
    try:
        equal("1", "1")
        greeting = "ready"
    except Exception as error:
        # Whatever keeps the library from working is reported by the trainer.
        greeting = f"{type(error).__name__}: {error}"
    _send(replies, greeting)
    operations: dict[str, Callable[..., Any]] = {"equal": equal, "read": read}
    for line in requests:
        operation, *texts = json.loads(line)
        try:
            reply = operations[operation](*texts)
        except Exception:
            # Libraries fail on what models write in any way; none of them makes an answer right.
            reply = "failed"
        _send(replies, reply)


def _send(replies: Any, value: Any) -> None:
    replies.write(json.dumps(value).encode() + b"\n")
    replies.flush()


def _limit() -> None:
    """Die with the trainer, and take no more than MEMORY_MIB."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, int(signal.SIGKILL), 0, 0, 0)
    if sys.platform != "win32":
        import resource

        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_MIB << 20, hard))


if __name__ == "__main__":
    serve()
