"""Accuracy on the arena's held-out questions, exact: one forward pass, no sampling noise."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from language_self_play.arena.questions import held_out_problems
from language_self_play.arena.tasks import TIERS
from language_self_play.chat import Chat
from language_self_play.evaluate.intervals import Interval, mean_interval
from language_self_play.evaluate.outcomes import ARENA, Record
from language_self_play.packing import pad_left
from language_self_play.row_batches import RowBatches

Row = tuple[list[int], list[int]]  # prompt, answer


@dataclass(frozen=True)
class QuestionResult:
    """One question: the exact probability of its right answer, and whether greedy decoding gives it."""

    query: str
    answer: str
    tier: str
    task: str
    probability: float
    greedy: bool


@dataclass(frozen=True)
class Accuracy:
    """Results on a set of questions, as means with 95 % intervals."""

    results: list[QuestionResult]

    def tiers(self) -> list[str]:
        """The tiers, easiest first."""
        return [t for t in TIERS if any(r.tier == t for r in self.results)]

    def sampled(self, tier: str | None = None) -> Interval:
        """The mean probability of the right answer at temperature 1; NaN of a model whose numbers are so."""
        probabilities = [r.probability for r in self._of(tier)]
        if not all(map(math.isfinite, probabilities)):
            return Interval(math.nan, math.nan, math.nan)
        return mean_interval(probabilities)

    def greedy(self, tier: str | None = None) -> Interval:
        """The share of questions that greedy decoding answers right."""
        return mean_interval([r.greedy for r in self._of(tier)])

    def intervals(self) -> dict[str, Interval]:
        """Metric -> mean and 95 % interval, overall and by tier."""
        return {
            f"eval/{name}_accuracy{f'/{tier}' if tier else ''}": measure(tier)
            for name, measure in (("sampled", self.sampled), ("greedy", self.greedy))
            for tier in (None, *self.tiers())
        }

    def records(self) -> list[Record]:
        """Every question's record, as outcomes.py says."""
        return [
            {
                "set": ARENA,
                "id": r.query,
                "tier": r.tier,
                "task": r.task,
                "probability": r.probability if math.isfinite(r.probability) else None,
                "greedy": r.greedy,
            }
            for r in self.results
        ]

    def metrics(self) -> dict[str, float]:
        """The metrics of an evaluation, overall and by tier."""
        metrics: dict[str, float] = {}
        for key, interval in self.intervals().items():
            metrics[key] = interval.mean
            metrics[key.replace("_accuracy", "_accuracy_ci95")] = interval.half_width
        return metrics

    def _of(self, tier: str | None) -> list[QuestionResult]:
        return [r for r in self.results if tier in (None, r.tier)]


def evaluation_batches(tokens: int) -> RowBatches:
    """Batches of questions of at most `tokens` tokens, for `arena_accuracy`."""
    return RowBatches(tokens, "the arena's accuracy", "use a smaller model or another device")


@torch.inference_mode()
def arena_accuracy(
    model: PreTrainedModel, chat: Chat, batches: RowBatches, system_prompt: str | None = None
) -> Accuracy:
    """Accuracy on the held-out questions.

    A question's probability is that of the right answer's tokens and then any stop token, at
    temperature 1; for a tokenizer that can spell an answer in several ways it is a lower bound.
    Greedy decoding gives the answer exactly if each of these tokens is the likeliest.
    """
    problems = held_out_problems()
    rows = []
    for query, problem in problems:
        rows.append(
            (
                chat.encode(query, system_prompt),
                chat.encode_reply(query, problem.answer, system_prompt),
            )
        )
    # Equal lengths go together: a batch is a rectangle of prompts and one of answers.
    by_shape: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, (_, answer) in enumerate(rows):
        by_shape[len(answer), len(rows[i][0])].append(i)
    found: dict[int, tuple[float, bool]] = {}
    for members in by_shape.values():
        some = [rows[i] for i in members]
        found |= zip(members, _in_batches(model, chat, some, batches), strict=True)
    return Accuracy(
        [
            QuestionResult(query, problem.answer, problem.tier, problem.task, *found[i])
            for i, (query, problem) in enumerate(problems)
        ]
    )


def _in_batches(
    model: PreTrainedModel, chat: Chat, rows: list[Row], batches: RowBatches
) -> list[tuple[float, bool]]:
    return batches.map(
        lambda places: _one_batch(model, chat, [rows[i] for i in places]),
        [len(prompt) + len(answer) for prompt, answer in rows],
    )


def _one_batch(model: PreTrainedModel, chat: Chat, rows: list[Row]) -> list[tuple[float, bool]]:
    """Of rows of equal lengths: the answer's probability, and whether greedy decoding gives it."""
    answers = torch.tensor([answer for _, answer in rows])
    eos = torch.tensor(chat.eos_ids)
    tokens, _ = pad_left([prompt + answer for prompt, answer in rows], chat.pad_id, model.device)
    keep = answers.shape[1] + 1
    logits = model(input_ids=tokens, use_cache=False, logits_to_keep=keep).logits.float().cpu()
    logprobs = logits.log_softmax(-1)
    of_answer = logprobs[:, :-1].gather(-1, answers[..., None]).squeeze(-1).sum(-1)
    of_stop = logprobs[:, -1, eos].logsumexp(-1)
    likeliest = logits.argmax(-1)
    right = (likeliest[:, :-1] == answers).all(-1) & torch.isin(likeliest[:, -1], eos)
    return list(zip((of_answer + of_stop).exp().tolist(), right.tolist(), strict=True))
