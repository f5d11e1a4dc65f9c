"""The unit that flows through the program: the group.

    Group = (role, prompt tokens P, K completions, K rewards, K advantages)

The Challenger's turn is one group, the challenger prompt and its N queries; the Solver's turn is
N groups, a query and its G answers; GRPO is the Solver's groups with queries from a file.

Axis letters, used as suffixes of tensor names wherever more than one axis exists:

    N  queries of a step            B  rows of a batch (groups, or group slices)
    G  answers to each query        P  tokens of a prompt
    K  completions of a group       T  tokens of a completion
    V  vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

Role = Literal["challenger", "solver", "judge", "evaluation"]
FinishReason = Literal["stop", "length"]


class Completion(NamedTuple):
    """What was sampled after a prompt. `tokens` ends with the stop token unless cut off."""

    tokens: list[int]
    text: str
    logprobs: list[float]  # log softmax(logits / τ) of each token, in nats
    finish_reason: FinishReason


class Group(NamedTuple):
    """One prompt and its completions."""

    prompt: list[int]
    completions: list[Completion]


@dataclass
class Groups:
    """What one role played in a step: groups that all have K completions.

    `advantages` is (number of groups, K), or (K,) for a single group; `keep` marks the
    completions that enter the loss, all by default.
    """

    role: Role
    groups: list[Group]
    temperature: float
    advantages: Tensor | None = None
    keep: list[list[bool]] | None = None

    @property
    def texts(self) -> list[list[str]]:
        """The completions' texts, by group."""
        return [[c.text for c in g.completions] for g in self.groups]

    def completions(self) -> list[Completion]:
        """All completions, group after group."""
        return [c for g in self.groups for c in g.completions]


class Query(NamedTuple):
    """A query as the Solver sees it; `reason` says why an invalid one is."""

    text: str
    valid: bool = True
    reason: str | None = None
    task: str = ""


@dataclass
class Posed(Groups):
    """The Challenger's turn: one group, and the query read out of each completion.

    Held-out queries are not in the group: they are counted and left out of learning.
    """

    all_queries: list[Query] = field(default_factory=list)
    held_out: list[Query] = field(default_factory=list)

    @property
    def queries(self) -> list[str]:
        """The valid queries: those that are answered."""
        return [q.text for q in self.all_queries if q.valid]

    @property
    def valid(self) -> list[bool]:
        """One flag for each completion of the group."""
        return [q.valid for q in self.all_queries]


@dataclass
class Solved(Groups):
    """The Solver's turn: one group for each query."""

    @property
    def answers(self) -> list[list[str]]:
        return self.texts
