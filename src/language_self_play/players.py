"""The two players. Prompts in, groups out; and what a valid query is."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from language_self_play.config import Challenger, Solver
from language_self_play.errors import ConfigError
from language_self_play.prompts import parse_query
from language_self_play.sampling import Sampler
from language_self_play.types import Posed, Query, Solved


class ChallengerPrompt(NamedTuple):
    """The prompt of one step's Challenger, and the (task, template) pair that it asks for."""

    text: str
    task: str
    template: str


def pose_queries(
    sampler: Sampler,
    prompt: ChallengerPrompt,
    settings: Challenger,
    system_prompt: str | None,
    is_held_out: Callable[[str], bool],
) -> Posed:
    """q_i ~ π_θ(· | challenger prompt), i = 1 … N: one group. Paper, Section 2.

    A malformed query is invalid, with its reason; so is one that spells a special token, which the
    chat template would read as a role mark. A held-out one is left out of the group.
    Raises ConfigError if the prompt does not fit into the model's context.
    """
    tokens = sampler.chat.encode(prompt.text)
    check_challenger_prompt(tokens, sampler.context_length)
    [group] = sampler.sample(
        [tokens], settings.num_queries, "challenger", settings, settings.max_tokens
    )
    queries, held_out, kept = [], [], []
    for completion in group.completions:
        truncated = completion.finish_reason == "length"
        text, reason = parse_query(completion.text, prompt.template, truncated)
        if reason is None and sampler.chat.without_special(text) != text:
            reason = "special_tokens"
        if reason is None and is_held_out(text):
            held_out.append(Query(text, valid=False, reason="held_out", task=prompt.task))
            continue
        if reason is None and not _fits(sampler, text, system_prompt):
            reason = "too_long"
        queries.append(Query(text, reason is None, reason, prompt.task))
        kept.append(completion)
    return Posed(
        role="challenger",
        groups=[group._replace(completions=kept)],
        temperature=settings.temperature,
        all_queries=queries,
        held_out=held_out,
    )


def check_challenger_prompt(tokens: list[int], context_length: int) -> None:
    """Raises ConfigError if the prompt leaves no room for a query in the model's context."""
    if len(tokens) >= context_length:
        raise ConfigError(
            f"challenger.prompt: takes {len(tokens)} tokens, and the model's context has only"
            f" {context_length}; use a shorter prompt (`arena` is one for the arena's model), or a model"
            " with a longer context"
        )


def check_query(named: str, tokens: list[int], context_length: int) -> None:
    """Raises ConfigError, about a query so `named`, if it leaves no room for an answer."""
    if len(tokens) >= context_length:
        raise ConfigError(
            f"{named} takes {len(tokens)} tokens with the chat template, and the model's context has"
            f" only {context_length}; remove it, or use a model with a longer context"
        )


def answer_queries(sampler: Sampler, queries: list[str], settings: Solver) -> Solved:
    """a_ij ~ π_θ(· | q_i), j = 1 … G: one group for each query. Paper, Section 2.

    The query is a plain user message; nothing tells the model that it is the Solver. Answers cut
    off by the length limit leave the loss if settings.truncated is "mask". Raises ConfigError for
    a query that leaves no room in the context; posed ones have been checked.
    """
    prompts = [sampler.chat.encode(query, settings.system_prompt) for query in queries]
    for query, prompt in zip(queries, prompts, strict=True):
        check_query(f"the query {query[:60]!r}", prompt, sampler.context_length)
    groups = sampler.sample(prompts, settings.group_size, "solver", settings, settings.max_tokens)
    keep = None
    if settings.truncated == "mask":
        keep = [[c.finish_reason == "stop" for c in g.completions] for g in groups]
    return Solved(role="solver", groups=groups, temperature=settings.temperature, keep=keep)


def truncation_penalties(solved: Solved, settings: Solver) -> Tensor:
    """What each answer's reward loses, in the Solver's advantage only, for being cut off, (N, G)."""
    penalty = settings.truncation_penalty if settings.truncated == "penalize" else 0.0
    cut = [[c.finish_reason == "length" for c in g.completions] for g in solved.groups]
    return penalty * torch.tensor(cut, dtype=torch.float32).view(
        len(cut), len(cut[0]) if cut else 0
    )


def _fits(sampler: Sampler, query: str, system_prompt: str | None) -> bool:
    return len(sampler.chat.encode(query, system_prompt)) < sampler.context_length
