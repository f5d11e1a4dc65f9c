"""What judged pairs come to: win rates, subsets, length control, and what should make one doubt them.

As a report in %, or as the metrics of a run, from 0 to 1.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from language_self_play.evaluate.length_control import length_controlled_win_rate
from language_self_play.evaluate.outcomes import Record
from language_self_play.evaluate.outputs import Annotation
from language_self_play.evaluate.win_rate import TIE, position_bias, win_rate, win_rate_interval

# One answer to more than this share of the instructions is no answer to most of them.
SUSPECT_SHARE = 0.1


def pair_report(
    annotations: Sequence[Annotation],
    difficulties: Sequence[float] | None = None,
    unjudged: int = 0,
) -> dict[str, Any]:
    """Every figure of at least one judged pair, under the names that docs/evaluation.md defines."""
    first = annotations[0]
    preferences = [a.preference for a in annotations]
    baseline_lengths = [len(a.output_1) for a in annotations]
    model_lengths = [len(a.output_2) for a in annotations]
    rates = win_rate(preferences)
    controlled = length_controlled_win_rate(
        preferences, baseline_lengths, model_lengths, difficulties
    )
    report: dict[str, Any] = {
        "model": first.generator_2,
        "baseline": first.generator_1,
        "annotator": first.annotator,
        **_rates(preferences),
        "win_rate_ci95": list(win_rate_interval(preferences)),
        "discrete_win_rate": rates.discrete_win_rate,
        # Of judgements: a pair whose winner is always the one shown first is won once.
        "strict_win_rate": 100 * math.fsum(a.strict_win for a in annotations) / len(annotations),
        "length_controlled_win_rate": controlled.win_rate,
        "lc_standard_error": controlled.standard_error,
        "length_control": {
            "constant": controlled.constant,
            "length": controlled.length,
            "difficulty": controlled.difficulty,
            "difficulties": "table"
            if difficulties is not None
            else "length of the baseline's answer",
        },
        "n_unjudged": unjudged,
        "n_equal": sum(a.output_1 == a.output_2 for a in annotations),
        "avg_length": sum(model_lengths) / len(model_lengths),
        "avg_length_baseline": sum(baseline_lengths) / len(baseline_lengths),
        "repeated_answer": repeated_answer([a.output_2 for a in annotations]),
        "repeated_answer_baseline": repeated_answer([a.output_1 for a in annotations]),
    }
    # Equal answers that nobody was asked about say nothing of the judge.
    if orders := [a.orders for a in annotations if a.orders is not None]:
        baseline_first, model_first = zip(*orders, strict=True)
        bias = position_bias(baseline_first, model_first)
        report["position_bias"] = {"n": len(orders), **asdict(bias)}
    subsets = dict.fromkeys(a.dataset for a in annotations if a.dataset is not None)
    report["subsets"] = {
        name: _rates([a.preference for a in annotations if a.dataset == name]) for name in subsets
    }
    return report


def _rates(preferences: list[float]) -> dict[str, Any]:
    return asdict(win_rate(preferences))


def repeated_answer(answers: Sequence[str]) -> dict[str, Any]:
    """The commonest answer, and how many instructions got it; white space does not tell answers apart.

    It is `suspect` where more than one instruction, and more than SUSPECT_SHARE of them, got it.
    """
    [(answer, count)] = Counter(" ".join(a.split()) for a in answers).most_common(1)
    share = count / len(answers)
    suspect = count > 1 and share > SUSPECT_SHARE
    return {"count": count, "share": share, "suspect": suspect, "answer": answer[:200]}


def win_rate_metrics(name: str, questions: Sequence[Record]) -> Record:
    """The metrics of a set of prompts, from its records (outcomes.py). docs/metrics.md defines each.

    Without one verdict those of the answers alone.
    """
    answers = [q["answer"] for q in questions]
    judged = [q for q in questions if q["preference"] is not None]
    cut = [q["finish_reason"] == "length" for q in questions]
    metrics: Record = {
        f"eval/{name}/truncated": sum(cut) / len(cut),
        f"eval/{name}/length": sum(q["tokens"] for q in questions) / len(questions),
        f"eval/{name}/equal_answers": sum(q["answer"] == q["baseline"] for q in questions)
        / len(questions),
        f"eval/{name}/repeated_answer": repeated_answer(answers)["share"],
        f"eval/{name}/unjudged": 1 - len(judged) / len(questions),
    }
    if not judged:
        return metrics
    groups = {"": judged}
    for q in judged:
        if "dataset" in q:
            groups.setdefault(f"/{q['dataset']}", []).append(q)
    for group, some in groups.items():
        preferences = [q["preference"] for q in some]
        low, high = win_rate_interval(preferences)
        metrics[f"eval/{name}/win_rate{group}"] = win_rate(preferences).win_rate / 100
        metrics[f"eval/{name}/win_rate_ci95{group}"] = (high - low) / 200
    wins = [sum(p > TIE for p in orders) / len(orders) for orders in map(_in_either_order, judged)]
    metrics[f"eval/{name}/strict_win_rate"] = math.fsum(wins) / len(wins)
    controlled = length_controlled_win_rate(
        [q["preference"] for q in judged],
        [len(q["baseline"]) for q in judged],
        [len(q["answer"]) for q in judged],
    )
    metrics[f"eval/{name}/length_controlled_win_rate"] = controlled.win_rate / 100
    return metrics


def _in_either_order(question: Record) -> list[float]:
    """A preference for each order that the judge was asked in; equal answers tie unasked."""
    if question.get("baseline_first") is None:
        return [question["preference"]]
    return [question["baseline_first"], question["model_first"]]


def leaderboard_row(report: dict[str, Any]) -> dict[str, Any]:
    """The report's figures under the columns of alpaca_eval's leaderboards."""
    same = ("win_rate", "standard_error", "n_wins", "n_wins_base", "n_draws", "n_total")
    return {
        **{name: report[name] for name in same},
        "discrete_win_rate": report["discrete_win_rate"],
        "mode": "community",
        "avg_length": int(report["avg_length"]),
        "length_controlled_winrate": report["length_controlled_win_rate"],
        "lc_standard_error": report["lc_standard_error"],
    }
