"""Rewards R(q, a): one file each, chosen by `kind`, summed by weight.

A reward is a function of flat lists, `reward(queries, answers) -> one number for each pair`.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from language_self_play.config import Config, PythonReward
from language_self_play.errors import NonFiniteError, RewardError

RewardFunction = Callable[[list[str], list[str]], Sequence[float]]


class RewardSum:
    """R(q, a) = Σ weight · reward(q, a) over the configured rewards."""

    def __init__(self, terms: dict[str, tuple[float, RewardFunction]]):
        self.terms = terms

    def __call__(self, queries: list[str], answers: list[list[str]]) -> Tensor:
        """R of G answers to each of N queries, shape (N, G).

        Raises RewardError for a reward that raises or returns something other than one number
        a pair, NonFiniteError for one that is not finite.
        """
        pairs = [(q, a) for q, group in zip(queries, answers, strict=True) for a in group]
        total = torch.zeros(len(pairs))
        if pairs:
            flat_queries, flat_answers = map(list, zip(*pairs, strict=True))
            for name, (weight, function) in self.terms.items():
                total += weight * _call(name, function, flat_queries, flat_answers)
        return total.view(len(queries), len(answers[0]) if answers else 0)


def build_reward(config: Config) -> RewardSum:
    """The configured rewards. Raises RewardError for one that can't be had, before weights load."""
    terms: dict[str, tuple[float, RewardFunction]] = {}
    for name, section in config.reward.items():
        if isinstance(section, PythonReward):
            from language_self_play.rewards.python import load_function

            function = load_function(name, section.function)
            _call(name, function, ["a query"], ["an answer"])  # what is wrong with it shows now
        else:
            from language_self_play.rewards.arena import arena_reward

            function = arena_reward
        terms[name] = (section.weight, function)
    return RewardSum(terms)


def _call(name: str, function: RewardFunction, queries: list[str], answers: list[str]) -> Tensor:
    """The reward's values as float32, one for each pair."""
    try:
        returned = function(queries, answers)
        values = list(returned) if isinstance(returned, Iterable) else [returned]
    except Exception as error:
        # A reward is the user's code; whatever it raises is reported under its name.
        where = traceback.extract_tb(error.__traceback__)[-1]
        raise RewardError(
            f"reward.{name}: raised {type(error).__name__}: {error}"
            f" ({where.filename}:{where.lineno})"
        ) from error
    try:
        if not isinstance(returned, Iterable) or any(isinstance(v, str) for v in values):
            raise TypeError("not a list of numbers")
        numbers = torch.tensor([float(value) for value in values], dtype=torch.float32)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise RewardError(
            f"reward.{name}: returned {_shown(returned)}; it must return a list of numbers"
        ) from None
    if len(numbers) != len(queries):
        raise RewardError(
            f"reward.{name}: returned {len(numbers)} numbers for {len(queries)} (query, answer) pairs"
        )
    for value, number, query, answer in zip(values, numbers, queries, answers, strict=True):
        if not math.isfinite(number):
            raise NonFiniteError(
                f"reward.{name}: returned {value} for query {_shown(query)} and answer"
                f" {_shown(answer)}; a reward must be finite in float32"
            )
    return numbers


def _shown(value: object, limit: int = 200) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "…"
