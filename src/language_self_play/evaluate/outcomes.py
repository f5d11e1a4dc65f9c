"""What an evaluation found, question by question, and the metrics made of it. Never torch.

A question's record says `set` and `id`. In the arena it has `tier`, `task`, the exact `probability` of
the right answer, and whether `greedy` decoding gives it; in a question set `query`, `key` and `answers`,
each `text right tokens finish_reason`. Of a win rate it has the policy's `answer` and the `baseline`'s,
`tokens` and `finish_reason`, the `judge` and its `preference`, from 1 (the baseline's) to 2, null without a
verdict; `baseline_first` and `model_first`, the preferences in either order of a judge that sees both
answers; and `dataset`, the prompt's subset, where there are subsets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from language_self_play.evaluate.intervals import Interval, mean_interval
from language_self_play.evaluate.pass_at_k import pass_at_k

Record = dict[str, Any]
ARENA = "arena"


class Evaluation(NamedTuple):
    """One evaluation of one model: its metrics, every question's record, and what could not be had."""

    metrics: Record
    questions: list[Record]
    trouble: Sequence[str] = ()


def passes(question: Record, k: int) -> float:
    """pass@k of one question of a set, from all its answers. Raises ValueError as pass_at_k."""
    right = [answer["right"] for answer in question["answers"]]
    return pass_at_k(len(right), sum(right), k)


def set_intervals(
    name: str, questions: Sequence[Record], pass_at: Sequence[int]
) -> dict[str, Interval]:
    """Metric -> mean over questions and 95 % interval, of pass@1, which is accuracy, and of each k."""
    return {
        f"eval/{name}/{'accuracy' if k == 1 else f'pass_at_{k}'}": mean_interval(
            [passes(question, k) for question in questions]
        )
        for k in sorted({1, *pass_at})
    }


def set_metrics(name: str, questions: Sequence[Record], pass_at: Sequence[int]) -> Record:
    """The metrics of a question set. docs/metrics.md defines each."""
    metrics: Record = {}
    for key, interval in set_intervals(name, questions, pass_at).items():
        metrics |= {key: interval.mean, f"{key}_ci95": interval.half_width}
    answers = [answer for question in questions for answer in question["answers"]]
    cut = [answer["finish_reason"] == "length" for answer in answers]
    metrics[f"eval/{name}/truncated"] = sum(cut) / len(cut)
    metrics[f"eval/{name}/length"] = sum(answer["tokens"] for answer in answers) / len(answers)
    return metrics
