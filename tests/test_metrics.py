"""What a step records: each formula by hand, and every key with a definition in docs/metrics.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from language_self_play.arena.tasks import describe
from language_self_play.learner import StepResult
from language_self_play.metrics import Turn, game_records, step_record
from language_self_play.types import Completion, Group, Posed, Query, Solved

DOCS = Path(__file__).parent.parent / "docs" / "metrics.md"


def completion(text: str, length: int, finish_reason="stop") -> Completion:
    return Completion([5] * length, text, [-0.5] * length, finish_reason)


@pytest.fixture
def turn() -> Turn:
    """Four posed, one held out: two valid (one unsolvable), one empty; two answers to each."""
    posed = Posed(
        role="challenger",
        groups=[Group([1], [completion("1+1", 4), completion("3-7", 4), completion("", 1)])],
        temperature=1.0,
        advantages=torch.tensor([0.5, -0.25, -0.25]),
        all_queries=[Query("1+1"), Query("3-7"), Query("", False, "empty")],
        held_out=[Query("2+2", False, "held_out")],
    )
    solved = Solved(
        role="solver",
        groups=[
            Group([1, 2], [completion("2", 2), completion("3", 2)]),
            Group([1, 3], [completion("4", 2), completion("4444", 4, "length")]),
        ],
        temperature=1.0,
        advantages=torch.tensor([[0.6, -0.6], [0.1, -0.1]]),
    )
    R = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    R_Q = torch.tensor([[0.9, 0.5], [0.1, 0.1]])
    result = StepResult(0.25, 2.0, {"solver": 0.01}, {"solver": 0.3, "challenger": 1.5})
    parts = {"right": R, "short": torch.tensor([[2.0, 1.0], [0.0, 1.0]])}
    result.learning_rate = 3e-6
    costs = {"short_usd": 0.125}
    return Turn(7, ["1+1", "3-7"], posed, solved, R, R_Q, 0.25, result, parts, costs)


def record_of(turn: Turn) -> dict:
    seconds = {"step_s": 2.0, "learn_s": 1.5, "other_s": 0.5}
    return step_record(turn, seconds, torch.device("cpu"), describe)


def test_each_metric_is_its_formula(turn):
    record = record_of(turn)
    memory = record.pop("memory/peak_gib")
    assert 0.01 < memory < 100
    assert record == pytest.approx(
        {
            "step": 7,
            "reward/mean": 0.25,  # (1 + 0 + 0 + 0) / 4
            "reward/std": 0.4330127,  # sqrt(1/4 - 1/16)
            "reward/right/mean": 0.25,
            "reward/right/std": 0.4330127,
            "reward/short/mean": 1.0,  # (2 + 1 + 0 + 1) / 4
            "reward/short/std": 0.7071068,  # sqrt(6/4 - 1)
            "quality/mean": 0.4,  # (0.9 + 0.5 + 0.1 + 0.1) / 4
            "quality/std": 0.3316625,  # sqrt((0.81 + 0.25 + 0.01 + 0.01) / 4 - 0.16)
            "quality/ratio": 0.7659417,  # 0.3316625 / 0.4330127
            "quality/unparsable_fraction": 0.25,
            "queries/valid_fraction": 2 / 3,  # of the three that are not held out
            "queries/heldout_fraction": 1 / 4,
            "queries/distinct_fraction": 1.0,
            "queries/invalid/empty": 1 / 3,
            "queries/unsolvable_fraction": 1 / 2,  # 3-7
            "kl/solver": 0.01,
            "entropy/solver": 0.3,
            "entropy/challenger": 1.5,
            "length/challenger": 3.0,  # (4 + 4 + 1) / 3
            "truncated/challenger": 0.0,
            "length/solver": 2.5,  # (2 + 2 + 2 + 4) / 4
            "truncated/solver": 1 / 4,
            "loss": 0.25,
            "grad_norm": 2.0,
            "learning_rate": 3e-6,
            "time/step_s": 2.0,
            "time/learn_s": 1.5,
            "time/other_s": 0.5,
            "time/short_usd": 0.125,
            "time/tokens_per_s": 9.5,  # (9 + 10) / 2
        },
        rel=1e-4,
    )


def test_games_pair_each_query_with_its_own_answers(turn):
    games = game_records(turn, describe)
    assert [(g["index"], g["query"], g["valid"], g["reason"]) for g in games] == [
        (0, "1+1", True, None),
        (1, "3-7", True, None),
        (2, "", False, "empty"),
        (3, "2+2", False, "held_out"),
    ]
    # r = V_Q - V: 0.7 - 0.5 and 0.1 - 0; the invalid one gets the smaller.
    assert [g["challenger_reward"] for g in games] == [
        pytest.approx(0.2),
        pytest.approx(0.1),
        pytest.approx(0.1),
        None,
    ]
    assert [g["challenger_advantage"] for g in games] == [0.5, -0.25, -0.25, None]
    assert [[a["text"] for a in g["answers"]] for g in games] == [["2", "3"], ["4", "4444"], [], []]
    assert games[0]["answers"][0] == {
        "text": "2",
        "reward": 1.0,
        "quality": pytest.approx(0.9),
        "advantage": pytest.approx(0.6),
        "tokens": 2,
        "finish_reason": "stop",
        "rewards": {"right": 1.0, "short": 2.0},
    }
    assert [(g["tier"], g["unsolvable"]) for g in games[:2]] == [
        ("easy", None),
        (None, "negative difference"),
    ]


def test_the_challengers_objective_is_what_its_games_say(turn):
    turn.objective = "learnability"
    rewards = [g["challenger_reward"] for g in game_records(turn, describe)]
    # V_Q + 4 p (1 - p): 0.7 + 1 and 0.1 + 0; the invalid one gets the smaller.
    assert rewards == [pytest.approx(1.7), pytest.approx(0.1), pytest.approx(0.1), None]


def test_every_recorded_key_is_defined_in_the_documentation(turn):
    text = DOCS.read_text("utf-8")
    documented = set(re.findall(r"`([^`\s]+)`", text))
    for name in re.findall(r"`([^`]*\{[^`]*)`", text):
        head, choices, tail = re.fullmatch(r"([^{]*)\{([^}]*)\}(.*)", name).groups()
        documented |= {f"{head}{choice}{tail}" for choice in choices.split(",")}
    for key in record_of(turn):
        general = re.sub(r"(?<=/)(solver|challenger)$", "<role>", key)
        general = re.sub(r"invalid/\w+$", "invalid/<reason>", general)
        general = re.sub(r"^reward/\w+/", "reward/<name>/", general)
        general = re.sub(r"^time/short_\w+$", "time/<reward>_<cost>", general)
        assert general in documented, key
