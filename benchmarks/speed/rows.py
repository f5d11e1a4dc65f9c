"""The rows of the tables: what each compares, and how one is measured.

Every row is measured in a process of its own, both sides in it, taking turns; vLLM and peak memory need
processes of theirs.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from speed.machine import flops, matmul_rate
from speed.models import Work, save_model
from speed.ours import Ours
from speed.padded import Padded, move_away
from speed.peak import peak
from speed.replay import played
from speed.timing import CLOCKS, Rounds, alternate, timed

if TYPE_CHECKING:
    from speed.trl_side import Settings

GIB = 2**30
# Largest relative difference of the gradients of two ways to compute the same loss.
GRADIENT_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
LARGE_VOCABULARY = 49_152
# Micro-batches of the padded version, in completions; the faster one is kept.
PADDED_ROWS = (16, 64)
# And of ours, in tokens, likewise.
OUR_TOKENS = (2048, 4096)
# Of `generate`; the faster one is kept.
CACHES = ("growing", "static")

Result = dict[str, Any]
Key = TypeVar("Key")


@dataclass(frozen=True)
class Row:
    """One comparison. `item` is the number of its table, `kind` the function here that measures it."""

    item: str
    kind: str
    work: Work
    case: str = ""
    in_bench: bool = False  # or in the full run only
    rounds: int = 3

    @property
    def id(self) -> str:
        work = self.work
        parts = [self.item, self.kind, self.case, work.size, work.dtype, f"beta={work.beta:g}"]
        if work.vocabulary:
            parts.append(f"V={work.vocabulary}")
        return "/".join(filter(None, parts))


@dataclass(frozen=True)
class Run:
    """How rows are measured: the clock, the time for one, and the results of rows before it."""

    clock_name: str
    budget_s: float
    full: bool
    earlier: dict[str, Result]

    @property
    def clock(self) -> Callable[[], float]:
        return CLOCKS[self.clock_name]


def rows() -> list[Row]:
    """All rows, in the order in which they are measured: the cheap ones first."""
    every = [
        *_of_size("1M", rounds=7),
        *(Row("5", "growth", Work("1M"), case, rounds=5) for case in DOUBLED),
        Row("4", "memory", Work("1M")),
        Row("4", "memory", Work("1M", vocabulary=LARGE_VOCABULARY)),
        Row("4", "memory", Work("1M", "bfloat16", vocabulary=LARGE_VOCABULARY)),
        *_of_size("30M", rounds=5),
        Row("4", "memory", Work("30M")),
        *(Row("5", "growth", Work("30M"), case) for case in DOUBLED),
        *_of_size("135M", rounds=3),
        Row("4", "memory", Work("135M")),
        Row("4", "memory", Work("135M", "bfloat16")),
    ]
    return [replace(row, in_bench=_in_bench(row)) for row in every]


def _of_size(size: str, rounds: int) -> Iterator[Row]:
    for dtype in ("float32", "bfloat16"):
        with_kl, without = Work(size, dtype), Work(size, dtype, beta=0.0)
        yield Row("0", "settings", with_kl)
        for work in (with_kl, without):
            yield Row("1a", "solver_half", work, rounds=rounds)
            yield Row("1b", "whole_step", work, rounds=rounds)
        yield Row("2", "generate", without, rounds=rounds)
        yield Row("2", "vllm", without, rounds=rounds)
        for case in SHAPES:
            yield Row("3", "learning", with_kl, case, rounds=rounds)


def _in_bench(row: Row) -> bool:
    """Whether the short run has time for it."""
    if row.work.size == "1M":
        # In bfloat16 what tells something that float32 has not told.
        without_kl, half = row.work.beta == 0, row.kind == "solver_half"
        known = row.kind in ("settings", "memory") or (without_kl and half)
        return row.work.dtype == "float32" or not known
    if row.work.size == "30M":
        if row.item == "1b":
            return row.work.beta > 0
        return row.item == "2" or (row.item == "3" and row.case == "challenger")
    return False


SHAPES: dict[str, Callable[[Work], Work]] = {
    "challenger": lambda w: w,
    "solver": lambda w: w,
    "both": lambda w: w,
    "uneven": lambda w: w,
    "short prompts": lambda w: replace(w, solver_prompt=8),
    "pairs": lambda w: replace(w, group_size=2, solver_prompt=8),
}
DOUBLED: dict[str, Callable[[Work], Work]] = {
    "N": lambda w: replace(w, num_queries=2 * w.num_queries),
    "G": lambda w: replace(w, group_size=2 * w.group_size),
    "length": lambda w: replace(w, length=2 * w.length),
    "vocabulary": lambda w: replace(w, vocabulary=2 * w.vocab_size),
    "prompts": lambda w: replace(
        w, challenger_prompt=2 * w.challenger_prompt, solver_prompt=2 * w.solver_prompt
    ),
}


def measure(row: Row, run: Run) -> Result:
    """The row's result, as plain data."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        save_model(row.work, Path(folder))
        result = KINDS[row.kind](row, run, Path(folder))
    described = {"id": row.id, "item": row.item, "kind": row.kind, "case": row.case}
    took = {"took_s": round(time.perf_counter() - start, 1)}
    return described | {"work": asdict(row.work)} | took | result


def _settings(row: Row, run: Run, folder: Path) -> Result:
    """TRL's step by what can be chosen, so that it is compared at its best."""
    from speed.trl_side import Trl, to_try

    tried: dict[str, list[float]] = {}
    for settings in to_try(row.work):

        def after_step(seconds: float, name: str = str(settings)) -> bool:
            tried.setdefault(name, []).append(seconds)
            return len(tried[name]) == 2

        Trl(row.work, folder, settings).train(run.clock, after_step)
    # The first step warms up.
    return {"times": {name: times[1:] for name, times in tried.items()}}


def _against_trl(row: Row, run: Run, folder: Path, with_challenger: bool) -> Result:
    from speed.trl_side import Trl

    ours = Ours(row.work, folder)
    settings = _best_settings(row.work, run, with_challenger)
    trl = Trl(row.work, folder, settings, with_challenger)
    rounds = Rounds(row.rounds, run.budget_s)
    rates: list[float] = []

    def after_step(seconds: float) -> bool:
        mine = timed(lambda: ours.step(with_challenger), run.clock)
        rates.append(matmul_rate(row.work.torch_dtype, run.clock))
        return rounds.add({"ours": mine, "TRL": seconds})

    trl.train(run.clock, after_step)
    result: Result = {"times": rounds.times, "settings": str(settings)}
    if with_challenger:
        result |= {"flops": flops(row.work), "matmul_rates": rates[1:]}
    return result


def _best_settings(work: Work, run: Run, with_challenger: bool) -> Settings:
    """The fastest of TRL's on this model, or else on the next like it that has been measured."""
    from speed.trl_side import to_try

    choices = to_try(work, with_challenger)
    for size, dtype in (
        (work.size, work.dtype),
        (work.size, "float32"),
        ("1M", work.dtype),
        ("1M", "float32"),
    ):
        tried = run.earlier.get(Row("0", "settings", Work(size, dtype)).id, {}).get("times")
        if tried:
            fastest = min(tried, key=lambda name: min(tried[name]))
            return choices[list(tried).index(fastest)]
    return choices[-1]


def _solver_half(row: Row, run: Run, folder: Path) -> Result:
    return _against_trl(row, run, folder, with_challenger=False)


def _whole_step(row: Row, run: Run, folder: Path) -> Result:
    return _against_trl(row, run, folder, with_challenger=True)


def _generate(row: Row, run: Run, folder: Path) -> Result:
    from speed.generate_side import Generate

    ours = Ours(row.work, folder)
    tries = {cache: Generate(row.work, folder, cache) for cache in CACHES}
    cache = _fastest({name: theirs.sample for name, theirs in tries.items()}, run)
    theirs = tries[cache]
    sides = {
        "ours": lambda: timed(ours.sample, run.clock),
        "generate": lambda: timed(theirs.sample, run.clock),
    }
    times = alternate(sides, row.rounds, run.budget_s)
    return {"times": times, "settings": f"{cache} cache"}


def _fastest(tries: dict[Key, Callable[[], Any]], run: Run) -> Key:
    """The name of what takes the shortest, each run twice: the first time warms up."""
    best = {}
    for name, call in tries.items():
        call()
        best[name] = timed(call, run.clock)
    return min(best, key=lambda name: best[name])


def _vllm(row: Row, run: Run, folder: Path) -> Result:
    from speed.vllm_side import Vllm

    ours = Ours(row.work, folder)
    best: Result = {}
    for eager in (False, True) if run.full else (False,):
        with Vllm(row.work, folder, run.clock_name, eager) as theirs:
            sides = {"ours": lambda: timed(ours.sample, run.clock), "vLLM": theirs.sample}
            times = alternate(sides, row.rounds, run.budget_s)
        if not best or min(times["vLLM"]) < min(best["times"]["vLLM"]):
            best = {"times": times, "settings": "eager" if eager else "compiled"}
    return best


def _learning(row: Row, run: Run, folder: Path) -> Result:
    work = SHAPES[row.case](row.work)
    both = played(work, uneven=row.case == "uneven")
    roles = {"challenger": both[:1], "both": both, "uneven": both}.get(row.case, both[1:])
    ours = Ours(work, folder)
    if work.beta:
        with ours.policy.as_reference() as reference:
            move_away(reference)

    def learn(tokens: int = OUR_TOKENS[0]) -> None:
        ours.learner.tokens_per_micro_batch = tokens
        # Learner.step takes the Solver's groups and the Challenger's; alone, either is the first.
        ours.learner.step(roles[-1], roles[0] if len(roles) == 2 else None, 1.0)

    tries = {num: Padded(work, folder, num) for num in PADDED_ROWS}
    gradients = _gradients_of(ours.learner.optimizer, learn)
    expected = _gradients_of(
        tries[PADDED_ROWS[0]].optimizer, lambda: tries[PADDED_ROWS[0]].step(roles)
    )
    difference = float((gradients - expected).norm() / expected.norm())
    if not difference <= GRADIENT_TOLERANCE[work.dtype]:
        raise AssertionError(f"the gradients differ by {difference:.1e} of their norm")
    num = _fastest({n: partial(p.step, roles) for n, p in tries.items()}, run)
    padded = tries[num]
    tokens = _fastest({n: partial(learn, n) for n in OUR_TOKENS}, run)
    sides = {
        "ours": lambda: timed(partial(learn, tokens), run.clock),
        "padded": lambda: timed(lambda: padded.step(roles), run.clock),
    }
    times = alternate(sides, row.rounds, run.budget_s)
    return {
        "times": times,
        "gradient_difference": difference,
        "settings": f"{num} rows, ours {tokens} tokens",
    }


def _gradients_of(optimizer: Any, step: Callable[[], None]) -> torch.Tensor:
    """What `optimizer` would have updated the weights with, flat; the weights stay as they are."""
    seen: list[torch.Tensor] = []

    def look(lr: float) -> None:
        seen.extend(w.grad.flatten().clone() for w in optimizer.weights.values())

    optimizer.step = look  # the instance's; the class keeps its own
    step()
    del optimizer.step
    return torch.cat(seen)


def _memory(row: Row, run: Run, folder: Path) -> Result:
    settings = _best_settings(row.work, run, with_challenger=True)
    sides = {
        "our step": ("our_step", {}),
        "TRL's step": ("trl_step", {"settings": settings}),
        "TRL's step, 8 rows at once": ("trl_step", {"settings": (row.work.group_size, None)}),
        "our sampling": ("our_sampling", {}),
        "generate": ("generate", {}),
        "our learning": ("our_learning", {}),
        "padded learning": ("padded", {"rows": 16}),
    }
    if not run.full:
        del sides["TRL's step, 8 rows at once"]
    peaks: dict[str, float] = {}
    failed = []
    for name, (side, options) in sides.items():
        try:
            peaks[name] = peak(side, row.work, **options) / GIB
        except RuntimeError as error:
            failed.append(str(error))
    return {"peaks_gib": peaks, "settings": str(settings), "failed": failed}


def _growth_of(row: Row, run: Run, folder: Path) -> Result:
    works = {"once": row.work, "twice": DOUBLED[row.case](row.work)}
    sides, peaks = {}, {}
    for name, work in works.items():
        place = folder / name
        save_model(work, place)
        sides[name] = _stepping(Ours(work, place), run)
        peaks[name] = peak("our_step", work) / GIB
    return {"times": alternate(sides, row.rounds, run.budget_s), "peaks_gib": peaks}


def _stepping(ours: Ours, run: Run) -> Callable[[], float]:
    return lambda: timed(ours.step, run.clock)


KINDS: dict[str, Callable[[Row, Run, Path], Result]] = {
    "settings": _settings,
    "solver_half": _solver_half,
    "whole_step": _whole_step,
    "generate": _generate,
    "vllm": _vllm,
    "learning": _learning,
    "memory": _memory,
    "growth": _growth_of,
}
