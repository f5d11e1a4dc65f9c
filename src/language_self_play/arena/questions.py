"""Where arena queries come from: the easy-skewed "human" distribution and the held-out set."""

from __future__ import annotations

import json
import random
import string
from functools import cache

from language_self_play.arena.tasks import (
    MIN_LETTERS,
    SIZE_LIMITS,
    TASKS,
    TIERS,
    Problem,
    Unsolvable,
    held_out_spaces,
    is_held_out,
    parse,
)

# Humans mostly ask easy questions, and now and then one that nobody can answer.
HUMAN_TIER_WEIGHTS = (0.60, 0.30, 0.10)
HUMAN_FLAWED_SHARE = 0.06
_FLAWS = ("negative", "zero", "big number", "big factor", "long", "short", *["form", "cut"] * 3)

_SLIPS = string.ascii_lowercase + string.digits + "+-* " * 9

NUM_HUMAN_QUERIES = 1_000
HUMAN_SEED = 2_025

HELD_OUT_PER_TIER = 300
HELD_OUT_SEED = 20_250_909


def draw_query(rng: random.Random, tier: str, task: str | None = None) -> str:
    """A solvable query of `tier`, of any size that the tier has."""
    task = task or rng.choice(TASKS)
    index = TIERS.index(tier)
    high = SIZE_LIMITS[task][index]
    low = SIZE_LIMITS[task][index - 1] + 1 if index else 1
    size = rng.randint(low, high)
    if task in ("reverse", "sort"):
        letters = rng.choices(string.ascii_lowercase, k=max(size, MIN_LETTERS))
        return f"{task} {''.join(letters)}"
    numbers = [_draw_number(rng, size)]
    if task == "multiply":
        return f"{numbers[0]}*{rng.randint(0, 9)}"
    numbers += [_draw_number(rng, rng.randint(1, size)) for _ in range(2 if task == "sum" else 1)]
    if task == "subtract":
        return "-".join(map(str, sorted(numbers, reverse=True)))
    rng.shuffle(numbers)
    return "+".join(map(str, numbers))


def draw_learnable_query(rng: random.Random, tier: str, task: str | None = None) -> str:
    """A solvable query of `tier` that is not held out."""
    while is_held_out(parse(query := draw_query(rng, tier, task))):
        pass
    return query


def draw_flawed_query(rng: random.Random) -> str:
    """A query that the parser rejects, of the kinds that people write by mistake."""
    kind = rng.choice(_FLAWS)
    tier = rng.choices(TIERS, HUMAN_TIER_WEIGHTS)[0]
    match kind:
        case "negative":
            larger, smaller = draw_query(rng, tier, "subtract").split("-")
            return f"{smaller}-{int(larger) + 1}"
        case "zero":
            numbers = draw_query(rng, tier, rng.choice(("add", "sum"))).split("+")
            spoilt = rng.randrange(len(numbers))
            numbers[spoilt] = "0" + numbers[spoilt]
            return "+".join(numbers)
        case "big number":
            operator = rng.choice("+-")
            first, second = (
                _draw_number(rng, rng.randint(5, 7)),
                _draw_number(rng, rng.randint(1, 5)),
            )
            return f"{max(first, second)}{operator}{min(first, second)}"
        case "big factor":
            return f"{_draw_number(rng, rng.randint(1, 4))}*{_draw_number(rng, rng.randint(2, 3))}"
        case "long":
            letters = rng.choices(string.ascii_lowercase, k=rng.randint(8, 11))
            return f"{rng.choice(('reverse', 'sort'))} {''.join(letters)}"
        case "form":
            query = draw_query(rng, tier)
            place, length = rng.randrange(len(query)), rng.randint(0, 1)
            slip = rng.choice(_SLIPS) if rng.random() < 0.8 or not length else ""
            return _unless_solvable(rng, query[:place] + slip + query[place + length :])
        case "cut":
            query = draw_query(rng, tier)
            place = rng.randint(1, len(query) - 1)
            return _unless_solvable(rng, rng.choice((query[:place], query[place:])))
        case "short":
            return f"{rng.choice(('reverse', 'sort'))} {rng.choice(string.ascii_lowercase)}"
    raise AssertionError(kind)


def draw_human_query(rng: random.Random) -> str:
    """A query as people pose them: mostly easy, sometimes flawed, never held out."""
    if rng.random() < HUMAN_FLAWED_SHARE:
        return draw_flawed_query(rng)
    return draw_learnable_query(rng, rng.choices(TIERS, HUMAN_TIER_WEIGHTS)[0])


@cache
def held_out_problems() -> tuple[tuple[str, Problem], ...]:
    """The evaluation set: HELD_OUT_PER_TIER (query, problem) pairs a tier, tasks in turn."""
    rng = random.Random(HELD_OUT_SEED)
    held_out: list[tuple[str, Problem]] = []
    spaces = held_out_spaces()
    for tier in TIERS:
        tasks = [task for task in TASKS if spaces[task, tier]]
        chosen: dict[str, Problem] = {}
        while len(chosen) < HELD_OUT_PER_TIER:
            query = draw_query(rng, tier, tasks[len(chosen) % len(tasks)])
            problem = parse(query)
            if is_held_out(problem):
                chosen.setdefault(query, problem)
        held_out += chosen.items()
    return tuple(held_out)


def _draw_number(rng: random.Random, digits: int) -> int:
    return rng.randint(10 ** (digits - 1) if digits > 1 else 0, 10**digits - 1)


def _unless_solvable(rng: random.Random, query: str) -> str:
    query = query.strip()  # as it is read out of a completion
    try:
        parse(query)
    except Unsolvable:
        if query:
            return query
    return draw_flawed_query(rng)


def human_queries() -> list[str]:
    """NUM_HUMAN_QUERIES different solvable queries of the human distribution, for GRPO."""
    rng = random.Random(HUMAN_SEED)
    chosen: dict[str, None] = {}
    while len(chosen) < NUM_HUMAN_QUERIES:
        tier = rng.choices(TIERS, HUMAN_TIER_WEIGHTS)[0]
        chosen.setdefault(draw_learnable_query(rng, tier))
    return list(chosen)


if __name__ == "__main__":
    # python -m language_self_play.arena.questions > human_queries.jsonl
    for human_query in human_queries():
        print(json.dumps({"prompt": human_query}))
