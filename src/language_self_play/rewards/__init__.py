"""Rewards R(q, a): one file each, chosen by `kind`, summed by weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from language_self_play.config import Config
from language_self_play.errors import NonFiniteError, RewardError

if TYPE_CHECKING:
    from language_self_play.row_batches import RowBatches

# kind -> the module in this room that has it, as `build(name, section, config) -> Reward`.
KINDS = {
    "arena": "language_self_play.rewards.arena",
    "python": "language_self_play.rewards.python",
    "reward_model": "language_self_play.rewards.reward_model",
    "verifier": "language_self_play.rewards.verifier",
    "majority": "language_self_play.rewards.majority",
    "judge": "language_self_play.rewards.judge",
}


class Reward:
    """What every kind of reward is: a function of a step's queries, their answers and their keys.

    Building one checks what can be checked at once (files, extras, isolation, the environment) and
    loads no weights. One that makes passes of a model of its own has `batches`. `setting` is what messages
    name where it is not `reward.NAME`, such as `reward.NAME.function = 'module:function'`.
    """

    setting = ""
    batches: RowBatches | None = None

    def load(self, device: torch.device) -> None:
        """Load what takes long: weights, to `device` unless configured elsewhere. Called once."""

    def __call__(
        self, queries: list[str], answers: list[list[str]], keys: list[str | None]
    ) -> Sequence[Sequence[float]]:
        """R of G answers to each of N queries, N rows of G numbers; keys are (N,), None if unknown.

        Raises RewardError, or ServiceError if it can't be had for now.
        """
        raise NotImplementedError

    def costs(self) -> dict[str, float]:
        """What the last call took beside time, such as `usd`, by name."""
        return {}

    def close(self) -> None:
        """End what it started: processes, connections. It may be called again."""


class RewardSum:
    """R(q, a) = Σ weight · reward(q, a) over the configured rewards."""

    def __init__(self, terms: dict[str, tuple[float, Reward]]):
        self.terms = terms
        self.parts: dict[str, Tensor] = {}  # of the last call: each reward's own values, (N, G)

    def load(self, device: torch.device) -> None:
        for _, reward in self.terms.values():
            reward.load(device)

    def __call__(
        self,
        queries: list[str],
        answers: list[list[str]],
        keys: list[str | None] | None = None,
    ) -> Tensor:
        """R of G answers to each of N queries, shape (N, G). `keys` are (N,), all None by default.

        Raises RewardError for a reward that raises or returns something other than one number
        an answer, NonFiniteError for one that is not finite, ServiceError for one that is away.
        """
        self.parts = {}
        total = torch.zeros(len(queries), len(answers[0]) if answers else 0)
        if queries:
            keys = [None] * len(queries) if keys is None else keys
            for name, (weight, reward) in self.terms.items():
                values = reward(queries, answers, keys)
                self.parts[name] = checked(
                    reward.setting or f"reward.{name}", values, queries, answers
                )
                total += weight * self.parts[name]
        return total

    def costs(self) -> dict[str, float]:
        """`NAME_what` -> number, of the last call; nothing if there was nothing to ask about."""
        return {
            f"{name}_{what}": value
            for name in self.parts
            for what, value in self.terms[name][1].costs().items()
        }

    def batches(self) -> dict[str, RowBatches]:
        """The batches of those rewards that make passes of a model, by name."""
        return {name: reward.batches for name, (_, reward) in self.terms.items() if reward.batches}

    def close(self) -> None:
        for _, reward in self.terms.values():
            reward.close()


def build_reward(config: Config) -> RewardSum:
    """The configured rewards, checked but not loaded.

    Raises RewardError, ConfigError, InputFileError or ModelError for one that can't be had.
    """
    terms: dict[str, tuple[float, Reward]] = {}
    for name, section in config.reward.items():
        build: Any = import_module(KINDS[section.kind]).build
        terms[name] = (section.weight, build(name, section, config))
    return RewardSum(terms)


def checked(
    setting: str, returned: Sequence[Sequence[float]], queries: list[str], answers: list[list[str]]
) -> Tensor:
    """A reward's values as float32, (N, G). Raises RewardError or NonFiniteError."""
    try:
        values_NG = torch.tensor([[float(v) for v in row] for row in returned])
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise RewardError(
            f"{setting}: returned {shown(returned)}; it must return one number for each answer"
        ) from None
    if values_NG.shape != (len(queries), len(answers[0])):
        raise RewardError(
            f"{setting}: returned numbers of shape {tuple(values_NG.shape)} for"
            f" {len(queries)} queries with {len(answers[0])} answers each"
        )
    rows = zip(queries, answers, returned, values_NG, strict=True)
    for place, (query, group, values, numbers) in enumerate(rows):
        for answer, value, number in zip(group, values, numbers.tolist(), strict=True):
            if not math.isfinite(number):
                raise NonFiniteError(
                    f"{setting}: returned {value} for query {shown(query)} and answer"
                    f" {shown(answer)}; a reward must be finite in float32",
                    [("solver", place)],
                )
    return values_NG


def shown(value: object, limit: int = 200) -> str:
    """`value` as it appears in messages, cut short."""
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "…"
