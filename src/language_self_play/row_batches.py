"""Rows that only want to be read, through a model in batches as large as memory allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from language_self_play.errors import MemoryLimitError
from language_self_play.out_of_memory import unless_out_of_memory
from language_self_play.packing import batches

T = TypeVar("T")


class RowBatches:
    """Batches of at most `tokens` tokens, padding included; halved for good where memory runs out.

    `name` is whose rows they are, and `advice` what to do where memory does not hold one of them.
    """

    def __init__(self, tokens: int, name: str, advice: str):
        self.tokens = self.configured = tokens
        self.name = name
        self.advice = advice

    def map(self, compute: Callable[[list[int]], Sequence[T]], lengths: list[int]) -> list[T]:
        """What `compute` finds for each row, called with the places of one batch's rows.

        `lengths` are the rows' tokens. Batches that were computed before memory ran out are not
        computed again. Raises MemoryLimitError if one row is too much.
        """
        found: dict[int, T] = {}
        while waiting := [i for i in range(len(lengths)) if i not in found]:
            for batch in batches([lengths[i] for i in waiting], self.tokens):
                places = [waiting[i] for i in batch]
                if (results := unless_out_of_memory(partial(compute, places))) is None:
                    self._halve([lengths[i] for i in places])
                    break
                found |= zip(places, results, strict=True)
        return [found[i] for i in range(len(lengths))]

    def _halve(self, lengths: list[int]) -> None:
        """To half the tokens of the batch of rows of these lengths."""
        if len(lengths) == 1:
            raise MemoryLimitError(
                f"{self.name}: no memory left for a pass over {lengths[0]} tokens; {self.advice}"
            )
        self.tokens = min(self.tokens, len(lengths) * max(lengths)) // 2
