"""The same loss written plainly: prompts repeated for each completion, padded, all logits at once."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from language_self_play.config import Learner as LearnerSection
from language_self_play.optimizer import Optimizer
from language_self_play.types import Groups
from speed.models import PAD_ID, Work
from speed.ours import LEARNING_RATE

# What the reference's weights are multiplied with.
AWAY = 1.25


class Padded:
    """-A log π + β k3, summed over a completion's tokens, averaged over completions, as ours."""

    def __init__(self, work: Work, folder: Path, rows: int):
        self.work, self.rows = work, rows  # rows: completions of a micro-batch
        load = AutoModelForCausalLM.from_pretrained
        self.model = load(folder, dtype=work.torch_dtype).eval()
        self.reference = load(folder, dtype=work.torch_dtype).eval() if work.beta else None
        if self.reference is not None:
            move_away(self.reference)
        section = LearnerSection()
        self.optimizer = Optimizer(self.model, section)
        self.max_grad_norm = section.max_grad_norm

    def step(self, roles: list[Groups]) -> None:
        """One update by the sum of the roles' losses."""
        self.optimizer.zero_grad()
        for groups in roles:
            self._backward(groups)
        self.optimizer.clip(self.max_grad_norm)
        self.optimizer.step(LEARNING_RATE)
        self.optimizer.zero_grad()

    def _backward(self, groups: Groups) -> None:
        assert groups.advantages is not None
        advantages = groups.advantages.flatten()
        sequences = [(g.prompt, c.tokens) for g in groups.groups for c in g.completions]
        for start in range(0, len(sequences), self.rows):
            some = slice(start, start + self.rows)
            tokens, mask, of_completion = _pad(sequences[some])
            logprobs = _logprobs(self.model, tokens, mask)
            terms = -logprobs * advantages[some, None]
            if self.reference is not None:
                with torch.no_grad():
                    r = _logprobs(self.reference, tokens, mask)
                r = r - logprobs
                terms = terms + self.work.beta * (torch.exp(r) - r - 1)
            (torch.where(of_completion[:, 1:], terms, 0.0).sum() / len(sequences)).backward()


@torch.no_grad()
def move_away(reference: torch.nn.Module) -> None:
    """Make a reference differ from the policy: where they are equal the KL term has no gradient."""
    for weight in reference.parameters():
        weight.mul_(AWAY)


def _pad(sequences: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, what is no padding, and what is of a completion: prompts left, completions right."""
    P = max(len(prompt) for prompt, _ in sequences)
    T = max(len(completion) for _, completion in sequences)
    tokens = torch.full((len(sequences), P + T), PAD_ID)
    mask = torch.zeros(len(sequences), P + T, dtype=torch.bool)
    for row, (prompt, completion) in enumerate(sequences):
        place = slice(P - len(prompt), P + len(completion))
        tokens[row, place] = torch.tensor(prompt + completion)
        mask[row, place] = True
    of_completion = mask & (torch.arange(P + T) >= P)
    return tokens, mask, of_completion


def _logprobs(model: torch.nn.Module, tokens: Tensor, mask: Tensor) -> Tensor:
    """log softmax of every token but the first, (rows, length - 1)."""
    inputs = {
        "input_ids": tokens[:, :-1],
        "attention_mask": mask[:, :-1].long(),
        "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)[:, :-1],
    }
    logits = model(**inputs, use_cache=False).logits.float()
    return logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
