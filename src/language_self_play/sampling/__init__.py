"""Sampling completions: `Sampler` is what the players need of a backend."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from language_self_play.chat import Chat
    from language_self_play.config import Sampling
    from language_self_play.types import Group, Role


class Sampler(Protocol):
    """Draws n completions of each prompt from the weights of the last `sync`."""

    chat: Chat
    context_length: int
    batch_size: int  # completions decoded at once; lower than configured where memory ran out
    step: int  # of the last `sync`
    trouble: list[str]  # what went wrong and was mended, until the run has told of it

    def sync(self, model: PreTrainedModel, step: int) -> None:
        """Take over the weights of `model`, version `step`; draws are functions of `step`."""

    def sample(
        self, prompts: list[list[int]], n: int, role: Role, settings: Sampling, max_tokens: int
    ) -> list[Group]:
        """One group of `n` completions for each prompt, in order."""

    @property
    def version(self) -> int:
        """Of the weights that the last completions came from."""

    def rest(self) -> None:
        """Nothing will be sampled until the next `sync`: its memory is the learner's."""

    def close(self) -> None:
        """End what it has started."""
