"""The arena's verifier as a reward."""

from __future__ import annotations

from language_self_play.arena.tasks import Unsolvable, parse


def arena_reward(queries: list[str], answers: list[str]) -> list[float]:
    """1 for the one right answer, 0 for any other and for every answer to an unsolvable query."""
    return [float(_is_right(q, a)) for q, a in zip(queries, answers, strict=True)]


def _is_right(query: str, answer: str) -> bool:
    try:
        return parse(query).answer == answer
    except Unsolvable:
        return False
