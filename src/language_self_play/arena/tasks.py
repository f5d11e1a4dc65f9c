"""The arena's world: small language tasks, the parser that admits them and the answer it expects.

Six tasks, three tiers. A query is one line of text:

    27+48            add           numbers of at most 4 digits
    483-27           subtract      at most 4 digits, the first not smaller than the second
    12+9+40          sum           three numbers of at most 3 digits
    137*6            multiply      at most 3 digits times one digit
    reverse kite     reverse       2 to 7 letters
    sort kite        sort          2 to 7 letters

Numbers are *answered units first* (27+48 -> "57"), the order in which a left-to-right reader can
compute them. Everything else that looks like a query is *unsolvable*: well-formed text that the
parser rejects with a reason (a negative difference, a leading zero, a number too big, an unknown
form). Unsolvable queries earn reward 0, and that is what tempts zero-sum play.

The tier of a problem is its size: a task's parser is the only place that knows the limits.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from math import comb
from typing import Any

TIERS = ("easy", "medium", "hard")
TASKS = ("add", "subtract", "sum", "multiply", "reverse", "sort")

# For each task the largest size (digits or letters) of each tier.
SIZE_LIMITS = {
    "add": (2, 3, 4),
    "subtract": (2, 3, 4),
    "sum": (1, 2, 3),
    "multiply": (1, 2, 3),
    "reverse": (3, 5, 7),
    "sort": (3, 5, 7),
}
MIN_LETTERS = 2

# One question in HELD_OUT_ONE_IN of every large enough space is kept for evaluation.
HELD_OUT_ONE_IN = 16
MIN_HELD_OUT_SPACE = 5_000


class Unsolvable(ValueError):
    """A well-formed query that the arena's parser rejects; the message is the reason."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A query that has been admitted. `operands` are ints, or one string of letters."""

    task: str
    tier: str
    operands: tuple[Any, ...]

    @property
    def answer(self) -> str:
        """The only answer that earns reward 1."""
        match self.task, self.operands:
            case "reverse", (letters,):
                return letters[::-1]
            case "sort", (letters,):
                return "".join(sorted(letters))
            case "subtract", (a, b):
                value = a - b
            case "multiply", (a, b):
                value = a * b
            case _:
                value = sum(self.operands)
        return str(value)[::-1]


_STRING_QUERY = re.compile(r"(reverse|sort) ([a-z]+)")
_NUMBER_QUERY = re.compile(r"(\d+)([-+*])(\d+)(?:(\+)(\d+))?", re.ASCII)


def parse(query: str) -> Problem:
    """The problem that `query` states.

    Raises Unsolvable, with the reason, for everything that the arena does not admit.
    """
    if match := _STRING_QUERY.fullmatch(query):
        task, letters = match.groups()
        if len(letters) < MIN_LETTERS:
            raise Unsolvable("too short")
        return Problem(task, _tier(task, len(letters)), (letters,))
    if match := _NUMBER_QUERY.fullmatch(query):
        first, operator, second, plus, third = match.groups()
        numbers = [n for n in (first, second, third) if n is not None]
        if plus and operator != "+":
            raise Unsolvable("unknown form")
        if any(len(n) > 1 and n[0] == "0" for n in numbers):
            raise Unsolvable("leading zero")
        task = "sum" if plus else {"+": "add", "-": "subtract", "*": "multiply"}[operator]
        if task == "multiply" and len(second) > 1:
            raise Unsolvable("too big")
        tier = _tier(task, max(map(len, numbers)))
        operands = tuple(map(int, numbers))
        if task == "subtract" and operands[0] < operands[1]:
            raise Unsolvable("negative difference")
        return Problem(task, tier, operands)
    raise Unsolvable("unknown form")


def _tier(task: str, size: int) -> str:
    for tier, limit in zip(TIERS, SIZE_LIMITS[task], strict=True):
        if size <= limit:
            return tier
    raise Unsolvable("too big")


def space_size(task: str, tier: str) -> int:
    """How many questions `task` has in `tier`."""
    index = TIERS.index(tier)
    high = SIZE_LIMITS[task][index]
    low = SIZE_LIMITS[task][index - 1] if index else None
    if task in ("reverse", "sort"):
        shortest = low + 1 if low else MIN_LETTERS
        return sum(26**length for length in range(shortest, high + 1))
    return _count_up_to(task, 10**high) - (_count_up_to(task, 10**low) if low else 0)


def _count_up_to(task: str, numbers: int) -> int:
    """Questions of an arithmetic task whose operands come from the first `numbers` integers."""
    match task:
        case "add":
            return numbers**2
        case "subtract":
            return comb(numbers + 1, 2)
        case "sum":
            return numbers**3
        case "multiply":
            return numbers * 10
    raise AssertionError(task)


def is_held_out(problem: Problem) -> bool:
    """Whether `problem` belongs to the evaluation questions, by a hash of what it asks.

    Sums that differ only in the order of their terms are held out together.
    Spaces below MIN_HELD_OUT_SPACE questions are learned whole and never held out.
    """
    if space_size(problem.task, problem.tier) < MIN_HELD_OUT_SPACE:
        return False
    operands = problem.operands
    if problem.task in ("add", "sum"):
        operands = tuple(sorted(operands))
    key = " ".join(map(str, (problem.task, *operands)))
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


def held_out_spaces() -> dict[tuple[str, str], bool]:
    """(task, tier) -> whether the space is large enough to hold questions out of it."""
    return {
        (task, tier): space_size(task, tier) >= MIN_HELD_OUT_SPACE
        for tier in TIERS
        for task in TASKS
    }


def describe(query: str) -> dict[str, str | None]:
    """What the arena knows of a query: its `tier`, or why it is `unsolvable`."""
    try:
        return {"tier": parse(query).tier, "unsolvable": None}
    except Unsolvable as reason:
        return {"tier": None, "unsolvable": str(reason)}


def is_held_out_query(query: str) -> bool:
    """Whether `query` is one of the evaluation questions; an unsolvable one never is."""
    try:
        return is_held_out(parse(query))
    except Unsolvable:
        return False
