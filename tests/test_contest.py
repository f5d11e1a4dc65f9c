"""Win rates of a run, apart from the run: prompts, baselines, records, metrics, what a judge may not stop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from language_self_play.config import WinRateSet
from language_self_play.errors import ConfigError, InputFileError, ModelError, RewardError
from language_self_play.evaluate.contest import Contest
from language_self_play.evaluate.length_control import length_controlled_win_rate
from language_self_play.evaluate.pair_report import win_rate_metrics
from language_self_play.run_folder import RunFolder
from language_self_play.types import Completion, Group

LENGTHS = "def reward(queries, answers):\n    return [float(len(a)) for a in answers]\n"
PYTHON = {"kind": "python", "function": "judging_lengths:reward"}
ROWS = [
    {"instruction": "short?", "dataset": "a"},
    {"instruction": "long?", "dataset": "b"},
    {"prompt": "same?"},
]


@pytest.fixture
def prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "judging_lengths.py").write_text(LENGTHS)
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(file)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def contest(path: str, **settings: Any) -> Contest:
    return Contest("mine", WinRateSet(**{"path": path, "judge": PYTHON, **settings}), "cpu")


def answered(*texts: str, cut: bool = False) -> list[Group]:
    finish = "length" if cut else "stop"
    return [Group([1], [Completion([5] * len(t), t, [0.0] * len(t), finish)]) for t in texts]


def test_answers_are_compared_with_step_0s_and_equal_ones_tie(prompts: str, run: RunFolder):
    mine = contest(prompts)
    first = mine.compare(answered("xx", "yyyy", "z"), 0, run)
    assert [q["preference"] for q in first.questions] == [1.5, 1.5, 1.5]
    assert [q["baseline"] for q in first.questions] == ["xx", "yyyy", "z"]
    later = mine.compare(answered("x", "yyyyy", "z", cut=True), 4, run)
    # By length: shorter loses (1), longer wins (2), the same ties (1.5).
    assert later.questions[0] == {
        "set": "mine",
        "id": "short?",
        "dataset": "a",
        "answer": "x",
        "baseline": "xx",
        "tokens": 1,
        "finish_reason": "length",
        "judge": "judging_lengths:reward",
        "preference": 1.0,
    }
    assert [q["preference"] for q in later.questions] == [1.0, 2.0, 1.5]
    assert later.metrics["eval/mine/win_rate"] == 0.5
    assert later.metrics["eval/mine/win_rate/a"] == 0
    assert later.metrics["eval/mine/win_rate/b"] == 1
    assert later.metrics["eval/mine/equal_answers"] == pytest.approx(1 / 3)
    assert (first.trouble, later.trouble) == ([], [])


def judged(preference: float | None, **fields: Any) -> dict[str, Any]:
    record = {"answer": "four", "baseline": "other", "tokens": 3, "finish_reason": "stop"}
    return record | {"preference": preference} | fields


def test_metrics_are_fractions_over_the_judged_pairs_and_strict_ones_count_both_orders():
    questions = [
        judged(2.0, dataset="a", baseline_first=2.0, model_first=2.0, answer="a long answer"),
        judged(1.75, dataset="a", baseline_first=2.0, model_first=1.5, answer="other"),
        judged(1.0, dataset="b", baseline_first=1.0, model_first=1.0, finish_reason="length"),
        judged(None, dataset="b", baseline_first=None, model_first=None, tokens=7),
    ]
    found = win_rate_metrics("m", questions)
    assert found == {
        "eval/m/truncated": 0.25,
        "eval/m/length": 4.0,  # (3 + 3 + 3 + 7) / 4
        "eval/m/equal_answers": 0.25,
        "eval/m/repeated_answer": 0.5,  # "four" twice
        "eval/m/unjudged": 0.25,
        "eval/m/win_rate": pytest.approx(1.75 / 3),
        # The bootstrap's interval of 1, 0.75 and 0 is [0, 1]: 1 in 27 draws is 0 three times, 1 in 27 is 1.
        "eval/m/win_rate_ci95": 0.5,
        "eval/m/win_rate/a": 0.875,
        "eval/m/win_rate_ci95/a": 0.125,  # of 1 and 0.75 the ends themselves
        "eval/m/win_rate/b": 0.0,
        # Wilson's of one 0: 3.841459 / 2 / (1 + 3.841459)
        "eval/m/win_rate_ci95/b": pytest.approx(0.396726, rel=1e-5),
        "eval/m/strict_win_rate": 0.5,  # 3 of 6 judgements
        "eval/m/length_controlled_win_rate": pytest.approx(
            length_controlled_win_rate([2.0, 1.75, 1.0], [5, 5, 5], [13, 5, 4]).win_rate / 100
        ),
    }


def test_without_a_verdict_there_are_metrics_of_the_answers_alone():
    assert set(win_rate_metrics("m", [judged(None), judged(None, baseline=None)])) == {
        *("eval/m/truncated", "eval/m/length", "eval/m/equal_answers", "eval/m/repeated_answer"),
        "eval/m/unjudged",
    }


def test_step_0s_answers_come_from_the_run_folder_once_they_are_there(prompts: str, run: RunFolder):
    first = contest(prompts).compare(answered("xx", "yyyy", "z"), 0, run)
    run.evaluations_folder.mkdir(parents=True)
    file = run.evaluations_folder / "step-000000.jsonl"
    other = {**first.questions[0], "set": "other", "answer": "not mine"}
    file.write_text("".join(json.dumps(q) + "\n" for q in [*first.questions, other]))
    later = contest(prompts).compare(answered("x", "yyyyy", "z"), 4, run)
    assert [q["baseline"] for q in later.questions] == ["xx", "yyyy", "z"]
    assert [q["preference"] for q in later.questions] == [1.0, 2.0, 1.5]


@pytest.mark.parametrize(
    "kept", [None, "", '{"set": "mine", "id": "short?", "answer": "xx"}\n', "{"]
)
def test_without_step_0s_answers_the_run_goes_on_and_says_what_to_put_back(
    prompts: str, run: RunFolder, kept: str | None
):
    run.evaluations_folder.mkdir(parents=True)
    file = run.evaluations_folder / "step-000000.jsonl"
    if kept is not None:
        file.write_text(kept)
    with pytest.warns(UserWarning, match=r"evaluations/step-000004.jsonl has the answers"):
        found = contest(prompts).compare(answered("x", "y", "z"), 4, run)
    [reason] = found.trouble
    assert reason.startswith(f"eval.win_rate.mine has no win rate at step 4: {file}")
    assert [q["preference"] for q in found.questions] == [None] * 3
    assert [q["answer"] for q in found.questions] == ["x", "y", "z"]
    assert "eval/mine/win_rate" not in found.metrics


def test_a_files_answers_are_beaten_from_step_0_on(prompts: str, run: RunFolder, tmp_path: Path):
    texts = {"long?": "bb", "same?": "c", "short?": "a"}  # in an order of its own
    rows = [{"instruction": q, "output": t, "generator": "them"} for q, t in texts.items()]
    (tmp_path / "b.json").write_text(json.dumps(rows))
    found = contest(prompts, baseline=str(tmp_path / "b.json")).compare(
        answered("aa", "b", "c"), 0, run
    )
    assert [q["baseline"] for q in found.questions] == ["a", "bb", "c"]
    assert [q["preference"] for q in found.questions] == [2.0, 1.0, 1.5]


def test_a_limit_takes_the_same_prompts_and_their_baseline(prompts: str, tmp_path: Path):
    rows = [{"instruction": q, "output": q.upper()} for q in ("short?", "long?", "same?")]
    (tmp_path / "b.json").write_text(json.dumps(rows))
    one, other = (contest(prompts, limit=2, baseline=str(tmp_path / "b.json")) for _ in "12")
    assert [p.instruction for p in one.prompted] == [p.instruction for p in other.prompted]
    assert one.baseline == [p.instruction.upper() for p in one.prompted]
    assert len(one.prompted) == 2


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("raise KeyError('no such thing')", "judge.function = 'fails_31:reward': raised KeyError"),
        ("return [float('nan')] * len(answers)", "returned nan"),
        ("return 3", "it must return a list of numbers"),
    ],
)
def test_a_judge_that_fails_costs_a_point_of_the_curve_and_no_run(
    prompts: str, run: RunFolder, tmp_path: Path, body: str, reason: str
):
    # A function is called once when it is found, with "a query" first.
    program = f"    if queries[0] != 'a query':\n        {body}\n    return [0.0] * len(answers)\n"
    (tmp_path / f"fails_{len(body)}.py").write_text(f"def reward(queries, answers):\n{program}")
    judge = {"kind": "python", "function": f"fails_{len(body)}:reward"}
    mine = contest(prompts, judge=judge)
    mine.compare(answered("a", "b", "c"), 0, run)
    with pytest.warns(UserWarning, match=r"^eval\.win_rate\.mine has no win rate at step 2"):
        found = mine.compare(answered("b", "b", "c"), 2, run)
    assert reason in found.trouble[0]
    assert "eval.win_rate.mine.judge" in found.trouble[0]
    assert found.metrics["eval/mine/unjudged"] == 1


def test_prompts_that_the_arena_can_not_judge_are_told_when_the_run_begins(prompts: str):
    with pytest.warns(
        UserWarning,
        match=r"^eval\.win_rate\.mine\.judge\.kind = 'arena': 3 of the 3 prompts are no queries",
    ):
        contest(prompts, judge={"kind": "arena"})


def test_a_verdict_does_not_move_with_the_place_among_others(prompts: str, run: RunFolder):
    mine = contest(prompts)
    mine.compare(answered("a", "bb", "c"), 0, run)
    found = mine.compare(answered("aa", "bb", "c"), 2, run)
    assert [q["preference"] for q in found.questions] == [2.0, 1.5, 1.5]


def test_the_plan_says_how_often_the_judge_compares(prompts: str):
    # Of two evaluations step 0's own asks nothing.
    assert (
        contest(prompts)
        .plan(2)
        .startswith("eval.win_rate.mine: 3 answers against step-0, judged once. At most")
    )
    assert "step-0, judged 2 times. At most" in contest(prompts).plan(3)


def test_the_length_control_of_ties_alone_is_a_half(prompts: str, run: RunFolder):
    found = contest(prompts).compare(answered("a", "bb", "c"), 0, run)
    assert found.metrics["eval/mine/length_controlled_win_rate"] == pytest.approx(0.5, abs=1e-9)
    # Wilson's of three ½: 1.959964 √(¼ / 3 + 3.841459 / 36) / (1 + 3.841459 / 3)
    assert found.metrics["eval/mine/win_rate_ci95"] == pytest.approx(0.374666, rel=1e-5)


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no file": (
        {"path": "no.jsonl"},
        InputFileError,
        "eval.win_rate.mine.path = no.jsonl: no such",
    ),
    "a folder": ({"path": "."}, InputFileError, "eval.win_rate.mine.path = .: is a folder"),
    "no baseline": ({"baseline": "b.json"}, InputFileError, "eval.win_rate.mine.baseline = b.json"),
    "a kind that is none": (
        {"judge": {"kind": "magic"}},
        ConfigError,
        "eval.win_rate.mine.judge.kind = 'magic': is none of judge, local,",
    ),
    "an endpoint without a model": (
        {"judge": {"base_url": "http://localhost:1/v1"}},
        ConfigError,
        "eval.win_rate.mine.judge.model: missing",
    ),
    "a mistyped field": (
        {"judge": {"base_url": "http://localhost:1/v1", "model": "m", "max_token": 9}},
        ConfigError,
        "eval.win_rate.mine.judge.max_token: no such setting; did you mean eval.win_rate.mine.judge.max",
    ),
    "a weight": (
        {"judge": {**PYTHON, "weight": 2.0}},
        ConfigError,
        "eval.win_rate.mine.judge.weight",
    ),
    "no module": (
        {"judge": {"kind": "python", "function": "nowhere_at_all:f"}},
        RewardError,
        "eval.win_rate.mine.judge.function = 'nowhere_at_all:f'",
    ),
    "no model": (
        {"judge": {"kind": "local", "path": "./no-model"}},
        ModelError,
        "./no-model: no such folder",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_one_sentence_with_the_settings_name(
    case: str, prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    settings, kind, sentence = BAD[case]
    with pytest.raises(kind) as caught:
        contest(**{"path": prompts, **settings})
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)


def test_a_baseline_without_an_answer_is_refused(prompts: str, tmp_path: Path):
    (tmp_path / "b.json").write_text(json.dumps([{"instruction": "short?", "output": "x"}]))
    with pytest.raises(InputFileError, match=r"has no answer to the 3 instructions .* 2 of them"):
        contest(prompts, baseline=str(tmp_path / "b.json"))
