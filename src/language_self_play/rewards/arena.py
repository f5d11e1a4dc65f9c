"""The arena's verifier as a reward."""

from __future__ import annotations

from language_self_play.arena.tasks import Unsolvable, parse
from language_self_play.config import ArenaReward, Config
from language_self_play.rewards import Reward


class ArenaVerifier(Reward):
    """1 for the one right answer, 0 for any other and for every answer to an unsolvable query."""

    def __call__(
        self, queries: list[str], answers: list[list[str]], keys: list[str | None]
    ) -> list[list[float]]:
        return [
            [float(_is_right(q, a)) for a in group]
            for q, group in zip(queries, answers, strict=True)
        ]


def build(name: str, section: ArenaReward, config: Config) -> ArenaVerifier:
    return ArenaVerifier()


def is_query(text: str) -> bool:
    """Whether some answer to it is right."""
    try:
        parse(text)
    except Unsolvable:
        return False
    return True


def _is_right(query: str, answer: str) -> bool:
    try:
        return parse(query).answer == answer
    except Unsolvable:
        return False
