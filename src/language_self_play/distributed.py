"""The ranks of a run: processes, on one host or several, that play and learn one run together.

    torchrun --nproc-per-node 4 -m language_self_play train my.toml

Every rank holds the same settings and plays the same steps. What differs is small: a rank draws its share
of a step's completions and learns from its share of their tokens; the first one asks the reward, checks the
answers of an evaluation, and alone writes. Between ranks go completions (as bytes of ours), sums of gradients, and what the first rank
found, as JSON; nothing is pickled. A process alone is the one rank of `Ranks()`, and exchanges nothing.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from language_self_play import errors
from language_self_play.config import Config
from language_self_play.errors import ConfigError, LspError, RankError
from language_self_play.run_folder import Record, RunFolder, flatten
from language_self_play.types import Completion, Group

# Gradients are summed in pieces of so many numbers: few calls, and no second copy of all of them.
BUCKET = 1 << 24

# What gloo and NCCL say when another process has gone, or has not come in time.
GONE = (
    *("Connection closed by peer", "Connection reset by peer", "Connection refused"),
    *("Broken pipe", "Timed out", "timed out", "Socket Timeout", "failed to connect"),
    *("Connection was likely closed", "NCCL", "no error: Success", "Application timeout"),
)

T = TypeVar("T")


class Place(NamedTuple):
    """Where a process stands among the ranks, as torchrun says in the environment."""

    rank: int
    size: int
    local_rank: int  # among those of its host
    local_size: int

    @classmethod
    def of_this_process(cls) -> Place | None:
        """None for a process that was started alone. Raises ConfigError."""
        if "WORLD_SIZE" not in os.environ:
            return None
        numbers = []
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            value = os.environ.get(name, "")
            if not value.isdecimal():
                raise ConfigError(
                    f"{name} = {value!r} in the environment: must be a number where WORLD_SIZE is set;"
                    " torchrun sets RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE"
                )
            numbers.append(int(value))
        return cls(*numbers)


class Ranks:
    """The ranks as one of them sees them; by default it is the only one.

    Whatever exchanges something must be called by all of them, in the same order. A rank that fails on
    its own ends at once, and the others, whose next exchange fails, raise RankError.
    """

    def __init__(self, place: Place | None = None):
        self.place = place or Place(0, 1, 0, 1)
        self.rank, self.size = self.place.rank, self.place.size
        self.apart = False  # whether the others may no longer be waited for

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, count: int) -> range:
        """This rank's of `count` things in order: as even as can be, empty where there are too few."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def once(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """What `function` returns on the first rank, which alone calls it; it must be as JSON has it.

        An LspError that it raises there is raised on all ranks.
        """
        if self.size == 1:
            return function(*args, **kwargs)
        if self.apart:
            return function(*args, **kwargs) if self.is_first else None  # type: ignore[return-value]
        failure: LspError | None = None
        said: Any = None
        if self.is_first:
            try:
                said = {"value": function(*args, **kwargs)}
            except LspError as error:
                failure, said = error, _told(error)
        found = json.loads(self._broadcast(json.dumps(said).encode()))
        if "value" in found:
            return found["value"]
        failure = failure or _heard(found)
        failure.agreed = True
        raise failure

    def gather(self, own: bytes) -> list[bytes]:
        """What every rank gives, in their order."""
        if self.size == 1:
            return [own]
        with in_words():
            lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
            dist.all_gather(lengths, torch.tensor([len(own)]))
            longest = max(1, *(int(n) for n in lengths))
            padded = torch.zeros(longest, dtype=torch.uint8)
            padded[: len(own)] = torch.frombuffer(bytearray(own), dtype=torch.uint8) if own else 0
            pieces = [torch.empty_like(padded) for _ in range(self.size)]
            dist.all_gather(pieces, padded)
        return [p[: int(n)].numpy().tobytes() for p, n in zip(pieces, lengths, strict=True)]

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is set on any rank."""
        return [bool(flag) for flag in self._reduced([int(f) for f in flags], dist.ReduceOp.MAX)]

    def most(self, number: int) -> int:
        """The largest of the ranks' numbers."""
        return int(self._reduced([number], dist.ReduceOp.MAX)[0])

    def least(self, number: int) -> int:
        """The smallest of the ranks' numbers."""
        return int(self._reduced([number], dist.ReduceOp.MIN)[0])

    def sums(self, numbers: Sequence[float]) -> list[float]:
        """The sum over the ranks of each number."""
        return self._reduced(numbers, dist.ReduceOp.SUM)

    def sum(self, tensor: Tensor | None) -> None:
        """`tensor` becomes the sum of the ranks'; None, on all of them, stays."""
        if self.size > 1 and tensor is not None:
            with in_words():
                dist.all_reduce(tensor)

    def sum_gradients(self, weights: Sequence[Tensor]) -> None:
        """Each weight's gradient becomes the sum of the ranks'; none is left where none has one."""
        if self.size == 1:
            return
        having = self.any(*(weight.grad is not None for weight in weights))
        gradients = []
        for weight, has_one in zip(weights, having, strict=True):
            if has_one:
                if weight.grad is None:
                    weight.grad = torch.zeros_like(weight)
                gradients.append(weight.grad)
        with in_words():
            for bucket in _buckets(gradients):
                flat = torch.cat([gradient.flatten() for gradient in bucket])
                dist.all_reduce(flat)
                pieces = flat.split([gradient.numel() for gradient in bucket])
                for gradient, piece in zip(bucket, pieces, strict=True):
                    gradient.copy_(piece.view_as(gradient))

    def share_of_completions(self, prompts: int, n: int) -> tuple[range, range]:
        """(groups, completions of each) that this rank draws: whole groups, or of one group a part."""
        if prompts == 1:
            return range(1), self.share(n)
        return self.share(prompts), range(n)

    def join(self, prompts: list[list[int]], n: int, own: list[Group]) -> list[Group]:
        """All groups, of what each rank drew of them in `share_of_completions`."""
        if self.size == 1:
            return own
        drawn = [c for part in self.gather(_packed(own)) for c in _unpacked(part)]
        return [Group(p, drawn[i * n : (i + 1) * n]) for i, p in enumerate(prompts)]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Whoever leaves by an error that not all ranks raise leaves the others."""
        try:
            yield
        except BaseException as error:
            if not getattr(error, "agreed", False):
                self.leave()
            raise

    def outlive_first(self) -> None:
        """Wait until the first rank's process has ended: a launcher kills the others when one ends."""
        with suppress(RuntimeError):
            dist.broadcast(torch.zeros(1), 0)

    def from_first(self, tensor: Tensor) -> None:
        """`tensor`, on the CPU, becomes the first rank's."""
        with in_words():
            dist.broadcast(tensor, 0)

    def rows_from_first(self, tensor: Tensor, rows_of: Callable[[int], range]) -> Tensor:
        """This rank's rows of the first one's `tensor`, on the CPU; others give one of its shape."""
        if self.is_first:
            for rank in range(1, self.size):
                if rows := rows_of(rank):
                    with in_words():
                        dist.send(tensor[rows.start : rows.stop].contiguous(), rank)
            own = rows_of(0)
            return tensor[own.start : own.stop]
        received = torch.empty(len(rows_of(self.rank)), *tensor.shape[1:], dtype=tensor.dtype)
        if len(received):
            with in_words():
                dist.recv(received, 0)
        return received

    def leave(self) -> None:
        """From here on nothing is exchanged: the first rank writes what it has, the others nothing."""
        self.apart = self.size > 1

    def _broadcast(self, own: bytes) -> bytes:
        with in_words():
            length = torch.tensor([len(own)])
            dist.broadcast(length, 0)
            payload = torch.zeros(int(length), dtype=torch.uint8)
            if self.is_first:
                payload = torch.frombuffer(bytearray(own), dtype=torch.uint8)
            dist.broadcast(payload, 0)
        return payload.numpy().tobytes()

    def _reduced(self, numbers: Sequence[float], how: Any) -> list[float]:
        if self.size == 1 or self.apart:
            return list(numbers)
        with in_words():
            reduced = torch.tensor(numbers, dtype=torch.float64)
            dist.all_reduce(reduced, how)
        return reduced.tolist()


ALONE = Ranks()


@contextmanager
def join_ranks(timeout_s: float) -> Iterator[Ranks]:
    """The ranks that torchrun has started, this process one of them; alone without torchrun.

    Raises ConfigError for an environment that names no place, RankError if the others don't come.
    """
    place = Place.of_this_process()
    if place is None:
        yield Ranks()
        return
    ranks = Ranks(place)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(place.local_rank % torch.cuda.device_count())
    with in_words():
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    try:
        with ranks.together():
            yield ranks
    except BaseException:
        if not (ranks.apart or ranks.is_first):
            ranks.outlive_first()
        raise  # without a good-bye, for which who ends alone would have to wait
    dist.destroy_process_group()


@contextmanager
def in_words() -> Iterator[None]:
    """What is raised when another rank has gone becomes a RankError."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, LspError) or not is_of_ranks(error):
            raise
        raise RankError(
            "another rank has ended, or gave no sign for distributed.timeout_s; what it said itself tells"
            " why. The run goes on from its newest checkpoint by --resume"
        ) from None


def is_of_ranks(error: BaseException) -> bool:
    """Whether `error` says that an exchange between ranks failed."""
    return isinstance(error, dist.DistError) or any(words in str(error) for words in GONE)


def threads_of_rank(place: Place) -> int:
    """CPU threads of a rank, so that all ranks of a host together take no more than it has."""
    return max(1, min(torch.get_num_threads(), (os.cpu_count() or 1) // place.local_size))


def device_of_rank(device: torch.device, place: Place) -> torch.device:
    """The GPU of a rank on its host. Raises ConfigError where the host has too few, or one is named."""
    if device.type != "cuda" or place.size == 1:
        return device
    if device.index is not None:
        raise ConfigError(
            f'device = "{device}": names one GPU, and {place.local_size} ranks on this host need one'
            " each; use cuda"
        )
    if place.local_size > torch.cuda.device_count():
        raise ConfigError(
            f"{place.local_size} ranks on a host with {torch.cuda.device_count()} GPUs; start as many"
            ' ranks as there are GPUs, or use device = "cpu"'
        )
    return torch.device("cuda", place.local_rank)


def refuse_other_settings(config: Config, resume: bool, ranks: Ranks) -> None:
    """Raises ConfigError, on all ranks, where one would play another game than the first."""
    if ranks.size == 1:
        return
    own = {"--resume": resume, **flatten(config.model_dump(mode="json"))}
    first, *others = (json.loads(told) for told in ranks.gather(json.dumps(own).encode()))
    for rank, other in enumerate(others, 1):
        for name in dict.fromkeys([*first, *other]):
            if other.get(name) != first.get(name):
                error = ConfigError(
                    f"{name} = {other.get(name)!r} on rank {rank}, {first.get(name)!r} on the first: all"
                    " ranks play the same game; start them with the same recipe and flags"
                )
                error.agreed = True
                raise error


class SharedRunFolder(RunFolder):
    """A run's folder on many ranks: all call, the first writes, and what goes wrong all raise."""

    def __init__(self, folder: str | os.PathLike[str], ranks: Ranks):
        super().__init__(folder)
        self.own = RunFolder(folder)  # the first rank's: it keeps what waits for the disk
        self._once = ranks.once

    def create(self, config: Config) -> None:
        self._once(self.own.create, config)

    def write_config(self, config: Config) -> None:
        self._once(self.own.write_config, config)

    def record(self, record: Record, games: list[Record], questions: Sequence[Record] = ()) -> None:
        self._once(self.own.record, record, games, questions)

    def flush(self) -> None:
        self._once(self.own.flush)

    def event(self, kind: str, **details: Any) -> None:
        self._once(self.own.event, kind, **details)

    def truncate(self, step: int) -> None:
        self._once(self.own.truncate, step)


def _told(error: LspError) -> dict[str, Any]:
    number = error.errno if isinstance(error, OSError) else None
    places = getattr(error, "places", None)
    name = type(error).__name__
    return {"error": name, "message": str(error), "errno": number, "places": places}


def _heard(told: dict[str, Any]) -> LspError:
    kind: type[LspError] = getattr(errors, told["error"])
    error = kind(told["message"])
    if isinstance(error, OSError):
        error.errno = told["errno"]
    if told["places"] is not None:
        error.places = [(role, i) for role, i in told["places"]]  # type: ignore[attr-defined]
    return error


def _packed(groups: list[Group]) -> bytes:
    """Completions as bytes: a line of JSON, the tokens as int32, their log-probs as float64."""
    completions = [c for group in groups for c in group.completions]
    head = [(len(c.tokens), c.finish_reason, c.text) for c in completions]
    tokens = array("i", (token for c in completions for token in c.tokens))
    logprobs = array("d", (p for c in completions for p in c.logprobs))
    return json.dumps(head).encode() + b"\n" + tokens.tobytes() + logprobs.tobytes()


def _unpacked(packed: bytes) -> Iterator[Completion]:
    head, numbers = packed.split(b"\n", 1)
    rows = json.loads(head)
    count = sum(length for length, _, _ in rows)
    tokens, logprobs = array("i"), array("d")
    tokens.frombytes(numbers[: count * tokens.itemsize])
    logprobs.frombytes(numbers[count * tokens.itemsize :])
    start = 0
    for length, finish_reason, text in rows:
        here = slice(start, start + length)
        start += length
        yield Completion(tokens[here].tolist(), text, logprobs[here].tolist(), finish_reason)


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one type and place together, at most BUCKET numbers where they are more than one."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        first = bucket[0] if bucket else tensor
        fits = sum(t.numel() for t in bucket) + tensor.numel() <= BUCKET
        if bucket and not (fits and (tensor.dtype, tensor.device) == (first.dtype, first.device)):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
