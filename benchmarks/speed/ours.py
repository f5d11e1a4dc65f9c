"""Our side: the sampler, the advantages and the learner that `lsp train` plays with."""

from __future__ import annotations

import copy
from pathlib import Path

import torch

from language_self_play.advantages import challenger_advantages, solver_advantages
from language_self_play.chat import Chat
from language_self_play.config import Config
from language_self_play.learner import Learner
from language_self_play.policy import Policy
from language_self_play.pretrained import load_model
from language_self_play.sampling.transformers import TransformersSampler
from language_self_play.types import Posed, Query, Solved
from speed.models import Work, build_tokenizer, prompts

LEARNING_RATE = 1e-6


class Ours:
    """A policy and all that a step of play needs."""

    def __init__(self, work: Work, folder: Path):
        self.work = work
        self.config = Config.from_table(
            {
                "algorithm": "lsp-zero",
                "device": "cpu",
                "dtype": work.dtype,
                "policy": {"path": str(folder)},
                "challenger": {
                    "num_queries": work.num_queries,
                    "max_tokens": work.length,
                    "beta": work.beta,
                },
                "solver": {
                    "group_size": work.group_size,
                    "max_tokens": work.length,
                    "beta": work.beta,
                },
                # Not our default of 16,384, which took the same time; rows.py tries another.
                "learner": {"lr": LEARNING_RATE, "tokens_per_micro_batch": 2048},
                "reward": {"main": {"kind": "arena"}},  # not asked: `reward` below is
            }
        )
        tokenizer = build_tokenizer(work.vocab_size)
        chat = Chat(tokenizer, [work.vocab_size], {})
        model = load_model(str(folder), work.torch_dtype, torch.device("cpu"))
        reference = copy.deepcopy(model).requires_grad_(False) if work.beta else None
        self.policy = Policy(model, chat, reference)
        batch_size = self.config.rollout.batch_size
        self.sampler = TransformersSampler(model, chat, self.config.seed, batch_size)
        self.learner = Learner(self.policy, self.config)
        self.steps = 0

    def pose(self, prompt: list[int]) -> Posed:
        """The Challenger's turn, every query valid."""
        section, work = self.config.challenger, self.work
        groups = self.sampler.sample(
            [prompt], section.num_queries, "challenger", section, work.length
        )
        queries = [Query(completion.text) for completion in groups[0].completions]
        return Posed("challenger", groups, section.temperature, all_queries=queries)

    def answer(self, their_prompts: list[list[int]]) -> Solved:
        """The Solver's turn."""
        section, work = self.config.solver, self.work
        groups = self.sampler.sample(
            their_prompts, section.group_size, "solver", section, work.length
        )
        return Solved("solver", groups, section.temperature)

    def sample(self, with_challenger: bool = True) -> tuple[Posed | None, Solved]:
        """Both turns, from new prompts at each call."""
        self.steps += 1
        self.sampler.sync(self.policy.model, self.steps)
        prompt, their_prompts = prompts(self.work, self.steps)
        posed = self.pose(prompt) if with_challenger else None
        return posed, self.answer(their_prompts)

    def score(self, posed: Posed | None, solved: Solved) -> None:
        """Rewards and advantages of what was sampled."""
        R = reward(solved)
        nothing = torch.zeros_like(R)
        solved.advantages = solver_advantages(R, nothing)
        if posed is not None:
            posed.advantages = challenger_advantages(R, nothing, posed.valid)

    def step(self, with_challenger: bool = True) -> None:
        """A whole step: sampling, rewards, the loss of both roles, one update."""
        posed, solved = self.sample(with_challenger)
        self.score(posed, solved)
        self.learner.step(solved, posed, self.config.challenger.alpha)


def reward(solved: Solved) -> torch.Tensor:
    """A reward that costs nothing and differs within a group, (N, G)."""
    return torch.tensor([[token_reward(c.tokens) for c in g.completions] for g in solved.groups])


def token_reward(tokens: list[int]) -> float:
    return float(tokens[0] % 2)
