"""One step of play as a metrics record and as games. docs/metrics.md defines every key."""

from __future__ import annotations

import math
import resource
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from language_self_play.advantages import challenger_rewards
from language_self_play.run_folder import Record
from language_self_play.types import Posed, Query, Solved

if TYPE_CHECKING:
    from language_self_play.learner import StepResult

BYTES_PER_GIB = 2**30

Describe = Callable[[str], Record] | None


@dataclass
class Turn:
    """Everything that one step played and learned."""

    step: int
    queries: list[str]
    posed: Posed | None
    solved: Solved
    R_NG: Tensor
    R_Q_NG: Tensor
    unparsable_fraction: float | None
    result: StepResult
    parts: dict[str, Tensor] = field(default_factory=dict)  # of a summed reward, by name, (N, G)
    costs: dict[str, float] = field(default_factory=dict)  # what the reward took, by name
    objective: str = "hardness"
    trouble: Record = field(default_factory=dict)  # what went wrong, by metric; nothing as a rule
    version: int | None = (
        None  # of the weights that played, as the sampler says; None is the step's
    )


def step_record(
    turn: Turn, seconds: dict[str, float], device: torch.device, describe: Describe
) -> Record:
    """The metrics of one step. `describe` tells what the world knows of a query.

    A number that is not finite is left out: JSON has none.
    """
    posed, solved, result = turn.posed, turn.solved, turn.result
    record: Record = {"step": turn.step, **_reward_metrics(turn)}
    if posed is not None:
        record |= _query_metrics(posed)
    if describe and turn.queries:
        unsolvable = [describe(query)["unsolvable"] is not None for query in turn.queries]
        record["queries/unsolvable_fraction"] = sum(unsolvable) / len(unsolvable)
    record |= {f"kl/{role}": kl for role, kl in sorted(result.kl.items())}
    record |= {f"entropy/{role}": entropy for role, entropy in sorted(result.entropy.items())}
    if result.logprob_difference is not None:
        record["sync/logprob_difference"] = result.logprob_difference
    if result.capped_fraction is not None:
        record["sync/capped_fraction"] = result.capped_fraction
    num_sampled = 0
    for groups in (posed, solved):
        if groups is not None and (completions := groups.completions()):
            lengths = [len(c.tokens) for c in completions]
            cut = [c.finish_reason == "length" for c in completions]
            record[f"length/{groups.role}"] = sum(lengths) / len(lengths)
            record[f"truncated/{groups.role}"] = sum(cut) / len(cut)
            num_sampled += sum(lengths)
    record |= {"loss": result.loss, "grad_norm": result.grad_norm}
    record["learning_rate"] = result.learning_rate
    record |= {f"time/{name}": value for name, value in (seconds | turn.costs).items()}
    record["time/tokens_per_s"] = num_sampled / seconds["step_s"]
    record["memory/peak_gib"] = _peak_memory_gib(device)
    return finite(record | turn.trouble)


def finite(record: Record) -> Record:
    """The record without what is not finite."""
    return {k: v for k, v in record.items() if not isinstance(v, float) or math.isfinite(v)}


def _reward_metrics(turn: Turn) -> Record:
    if not turn.R_NG.numel():
        return {}
    record = {
        "reward/mean": turn.R_NG.mean().item(),
        "reward/std": turn.R_NG.std(correction=0).item(),
    }
    for name, values_NG in turn.parts.items():
        record[f"reward/{name}/mean"] = values_NG.mean().item()
        record[f"reward/{name}/std"] = values_NG.std(correction=0).item()
    if turn.unparsable_fraction is not None:
        record["quality/mean"] = turn.R_Q_NG.mean().item()
        record["quality/std"] = turn.R_Q_NG.std(correction=0).item()
        if record["reward/std"] > 0:
            record["quality/ratio"] = record["quality/std"] / record["reward/std"]
        record["quality/unparsable_fraction"] = turn.unparsable_fraction
    return record


def _query_metrics(posed: Posed) -> Record:
    num_posed = len(posed.all_queries) + len(posed.held_out)
    reasons = Counter(q.reason for q in posed.all_queries if q.reason)
    distinct = len({q.text for q in posed.all_queries})
    return {
        "queries/valid_fraction": len(posed.queries) / max(1, len(posed.all_queries)),
        "queries/heldout_fraction": len(posed.held_out) / num_posed,
        "queries/distinct_fraction": distinct / max(1, len(posed.all_queries)),
        **{
            f"queries/invalid/{r}": n / max(1, len(posed.all_queries))
            for r, n in sorted(reasons.items())
        },
    }


def game_records(turn: Turn, describe: Describe) -> list[Record]:
    """One record a query: those of the group in order, then the held-out ones."""
    posed = turn.posed
    answers = iter(_answers(turn))
    if posed is None:
        games = [_game(Query(q), None, None, next(answers)) for q in turn.queries]
    else:
        rewards = challenger_rewards(turn.R_NG, turn.R_Q_NG, posed.valid, turn.objective).tolist()
        assert posed.advantages is not None
        advantages = posed.advantages.tolist()
        games = [
            _game(query, reward, advantage, next(answers) if query.valid else [])
            for query, reward, advantage in zip(posed.all_queries, rewards, advantages, strict=True)
        ]
        games += [_game(query, None, None, []) for query in posed.held_out]
    version = turn.step if turn.version is None else turn.version
    return [
        {"step": turn.step, "index": i, "version": version, **game}
        | (describe(game["query"]) if describe else {})
        for i, game in enumerate(games)
    ]


def _game(
    query: Query, reward: float | None, advantage: float | None, answers: list[Record]
) -> Record:
    return {
        "task": query.task,
        "query": query.text,
        "valid": query.valid,
        "reason": query.reason,
        "challenger_reward": _or_null(reward),
        "challenger_advantage": _or_null(advantage),
        "answers": answers,
    }


def _or_null(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None


def _answers(turn: Turn) -> list[list[Record]]:
    assert turn.solved.advantages is not None
    return [
        [
            {
                "text": completion.text,
                "reward": _or_null(reward),
                "quality": _or_null(quality),
                "advantage": _or_null(advantage),
                "tokens": len(completion.tokens),
                "finish_reason": completion.finish_reason,
            }
            | (
                {"rewards": {k: _or_null(v[i, j].item()) for k, v in turn.parts.items()}}
                if turn.parts
                else {}
            )
            for j, (completion, reward, quality, advantage) in enumerate(zip(*columns, strict=True))
        ]
        for i, columns in enumerate(
            zip(
                [group.completions for group in turn.solved.groups],
                turn.R_NG.tolist(),
                turn.R_Q_NG.tolist(),
                turn.solved.advantages.tolist(),
                strict=True,
            )
        )
    ]


def _peak_memory_gib(device: torch.device) -> float:
    """Peak memory so far: of the accelerator on CUDA, of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / BYTES_PER_GIB
    return peak_resident_bytes() / BYTES_PER_GIB


def peak_resident_bytes() -> int:
    """The most memory that this process has had."""
    status = Path("/proc/self/status")
    if status.exists():
        # On Linux getrusage counts what the process was before it became this program, too.
        words = status.read_text().split()
        return int(words[words.index("VmHWM:") + 1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes, others KiB.
    return peak if sys.platform == "darwin" else peak * 1024
