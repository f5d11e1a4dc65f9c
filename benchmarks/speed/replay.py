"""Play that was never sampled: groups of random tokens, for learning alone."""

from __future__ import annotations

import torch

from language_self_play.advantages import centre
from language_self_play.types import Completion, Group, Groups, Role
from speed.models import Work, prompts

SEED = 1


def played(work: Work, uneven: bool = False) -> list[Groups]:
    """The Challenger's group and the Solver's, with advantages. Of `work.length` each, or up to it."""
    challenger, solver = prompts(work, SEED)
    return [
        _groups("challenger", [challenger], work.num_queries, work, uneven),
        _groups("solver", solver, work.group_size, work, uneven),
    ]


def _groups(role: Role, of: list[list[int]], K: int, work: Work, uneven: bool) -> Groups:
    generator = torch.Generator().manual_seed(SEED)

    def completion() -> Completion:
        shortest = work.length // 8 if uneven else work.length
        length = int(torch.randint(shortest, work.length + 1, (), generator=generator))
        tokens = torch.randint(1, work.vocab_size, (length,), generator=generator).tolist()
        return Completion(tokens, "", [0.0] * length, "length")

    groups = [Group(prompt, [completion() for _ in range(K)]) for prompt in of]
    advantages = centre(torch.randn(len(of), K, generator=generator))
    return Groups(role, groups, 1.0, advantages if role == "solver" else advantages[0])
