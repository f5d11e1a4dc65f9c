"""Win rates and lm-eval's tasks while a run trains: real endpoints, kills, resumes, ranks."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import test_harness
import test_judge
from language_self_play import Config, self_play
from language_self_play.cli import main
from language_self_play.errors import ConfigError
from language_self_play.evaluate.pair_report import win_rate_metrics
from language_self_play.progress import headline
from language_self_play.run_folder import RunFolder
from servers import Endpoint, hang, scored, status

pytest.importorskip("openai")

endpoint = test_judge.endpoint
_surroundings = test_judge._surroundings
tasks = test_harness.tasks

STEPS = 4
QUERIES = ["3+9", "27+48", "12+5", "9+9", "50+50", "8+7"]


def longer(handler: Any) -> None:
    """The longer answer is better, wherever it stands."""
    _, first, second = handler.prompt.split("|")
    scored(0 if len(first) > len(second) else 2 if len(second) > len(first) else 1)(handler)


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    rows = [{"instruction": q, "dataset": "ab"[i % 2]} for i, q in enumerate(QUERIES)]
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps(rows))
    (tmp_path / "pair.txt").write_text("{query}|{first}|{second}")
    return str(file)


@pytest.fixture
def table(prompts: str, endpoint: Endpoint, tmp_path: Path) -> dict[str, Any]:
    """A run that changes its answers within a step, whose judge is shown nothing but the texts."""
    endpoint.default = longer
    judge = {"base_url": endpoint.url, "model": "grader", "prompt": str(tmp_path / "pair.txt")}
    return {
        "algorithm": "lsp-zero",
        "steps": STEPS,
        "threads": 1,
        "device": "cpu",
        "policy": {"path": "arena"},
        "challenger": {"prompt": "arena", "num_queries": 4, "max_tokens": 16},
        "solver": {"group_size": 3, "max_tokens": 8},
        "reward": {"main": {"kind": "arena"}},
        "learner": {"lr": 1e-3},
        "log": {"progress": "none"},
        "checkpoint": {"every": 1, "keep_last": 9},
        "eval": {
            "every": 2,
            "win_rate": {
                "mine": {
                    "path": prompts,
                    "max_tokens": 6,
                    "temperature": 1.0,
                    "judge": {**judge, "retries": 0},
                }
            },
        },
    }


def changed(table: dict[str, Any], **settings: Any) -> Config:
    mine = {**table["eval"]["win_rate"]["mine"], **settings}
    return Config.from_table({**table, "eval": {**table["eval"], "win_rate": {"mine": mine}}})


def reproducible(run: RunFolder) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in record.items() if not k.startswith(("time/", "memory/"))}
        for record in run.metrics()
    ]


def steps_with(run: RunFolder, key: str) -> list[int]:
    return [record["step"] for record in run.metrics() if key in record]


def events(run: RunFolder, kind: str) -> list[dict[str, Any]]:
    lines = run.events_file.read_text().splitlines()
    return [event for line in lines if (event := json.loads(line))["event"] == kind]


class StopsAfter:
    """A watcher at whom the run ends once a step is recorded, as if it were killed there."""

    def __init__(self, step: int):
        self.last = step

    def __enter__(self) -> StopsAfter:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def step(self, record: Any, games: Any) -> None:
        if record["step"] == self.last:
            raise KeyboardInterrupt


def test_answers_of_each_evaluation_are_judged_against_step_0s_in_both_orders(
    table: dict[str, Any], endpoint: Endpoint, tmp_path: Path
):
    run = self_play(Config.from_table(table), tmp_path / "run")
    assert steps_with(run, "eval/mine/win_rate") == [0, 2, 4]
    assert run.evaluated_steps() == [0, 2, 4]
    of_step_0 = {q["id"]: q["answer"] for q in run.evaluation(0)}
    expected = set()
    for record in (r for r in run.metrics() if r["step"] in (0, 2, 4)):
        questions = run.evaluation(record["step"])
        assert [q["id"] for q in questions] == QUERIES
        found = win_rate_metrics("mine", questions)
        assert found == {k: v for k, v in record.items() if k.startswith("eval/mine/")}
        for q in questions:
            ours, theirs = q["answer"], of_step_0[q["id"]]
            assert q["baseline"] == theirs
            better = (len(ours) > len(theirs)) - (len(ours) < len(theirs))
            assert q["preference"] == 1.5 + better / 2
            # Equal answers tie unasked.
            asked = None if ours == theirs else q["preference"]
            assert q["baseline_first"] == q["model_first"] == asked
            if ours != theirs:
                expected |= {f"{q['id']}|{theirs}|{ours}", f"{q['id']}|{ours}|{theirs}"}
    assert len(endpoint.prompts) == len(expected)
    assert set(endpoint.prompts) == expected
    assert len(expected) > 0
    first, *later = run.metrics()
    assert first["eval/mine/win_rate"] == 0.5
    assert "time/eval_mine_requests" not in first
    assert sum(r.get("time/eval_mine_requests", 0) for r in later) == len(expected)


def test_a_run_plays_the_same_with_and_without_a_judge(table: dict[str, Any], tmp_path: Path):
    run = self_play(Config.from_table(table), tmp_path / "run")
    without = self_play(Config.from_table({**table, "eval": {}}), tmp_path / "without")
    for step in range(STEPS):
        assert run.games(step) == without.games(step)


def test_a_set_may_have_a_cadence_of_its_own(table: dict[str, Any], tmp_path: Path):
    config = changed(table, every=3)
    sums = tmp_path / "sums.jsonl"
    sums.write_text('{"question": "3+9", "answer": "21"}\n')
    exam = {"path": str(sums), "method": "exact", "max_tokens": 6}
    config = Config.from_table(
        {
            **config.model_dump(exclude_none=True),
            "eval": {
                **config.eval.model_dump(exclude_none=True),
                "tasks": ["arena"],
                "accuracy": {"sums": exam},
            },
        }
    )
    run = self_play(config, tmp_path / "run")
    assert steps_with(run, "eval/mine/win_rate") == [0, 3, 4]
    assert steps_with(run, "eval/sums/accuracy") == [0, 2, 4]
    assert steps_with(run, "eval/greedy_accuracy") == [0, 2, 4]
    assert run.resumed_config({"eval": {"win_rate": {"mine": {"every": 1}}}})
    with pytest.raises(ConfigError, match=r"^eval\.win_rate\.mine\.limit = 3: was 200"):
        run.resumed_config({"eval": {"win_rate": {"mine": {"limit": 3}}}})


def test_a_resumed_run_is_the_uninterrupted_one_and_pays_for_no_verdict_twice(
    table: dict[str, Any], endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = self_play(Config.from_table(table), tmp_path / "whole")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    before = len(endpoint.prompts)
    folder = tmp_path / "part"
    with pytest.raises(KeyboardInterrupt):
        self_play(Config.from_table(table), folder, progress=StopsAfter(2))
    # As killed behind its checkpoint: the evaluation of step 2, which was judged, comes again.
    for newer in ("step-000002", "step-000003"):
        shutil.rmtree(folder / "checkpoints" / newer, ignore_errors=True)
    part = RunFolder(folder)
    resumed = self_play(part.resumed_config({}), folder, resume=True)
    assert reproducible(resumed) == reproducible(whole)
    for step in (0, 2, 4):
        file = f"evaluations/step-{step:06}.jsonl"
        assert (folder / file).read_bytes() == (whole.folder / file).read_bytes()
    asked = endpoint.prompts[before:]
    assert asked
    assert sorted(asked) == sorted(set(asked)) == sorted(endpoint.prompts[:before])


@pytest.mark.slow
def test_a_run_killed_while_its_judge_is_asked_asks_only_what_had_no_reply(
    table: dict[str, Any], endpoint: Endpoint, tmp_path: Path
):
    """Real processes: kill -9 at the third request, then lsp train --resume."""
    endpoint.script = [longer, longer, hang]
    config = changed(table, judge={**table["eval"]["win_rate"]["mine"]["judge"], "concurrency": 1})
    (tmp_path / "r.toml").write_text(config.to_toml())
    lsp = [sys.executable, "-m", "language_self_play", "train"]
    folder = tmp_path / "run"
    first = subprocess.Popen(
        [*lsp, str(tmp_path / "r.toml"), "--run", str(folder)],
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while len(endpoint.prompts) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert first.poll() is None
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    endpoint.released.set()
    subprocess.run([*lsp, "--resume", str(folder)], check=True, stdout=subprocess.DEVNULL)
    run = RunFolder(folder)
    assert steps_with(run, "eval/mine/win_rate") == [0, 2, 4]
    again = [p for p in endpoint.prompts if endpoint.prompts.count(p) > 1]
    assert set(again) == {endpoint.prompts[2]}
    assert run.evaluation(2)[0]["judge"] == "grader"


@pytest.mark.parametrize("code", [503, 401])  # away, a wrong key
def test_a_judge_that_is_away_or_refuses_costs_a_point_of_the_curve_and_no_step(
    table: dict[str, Any], endpoint: Endpoint, tmp_path: Path, code: int
):
    reference = self_play(Config.from_table(table), tmp_path / "reference")
    asked_by_step_2 = sum(2 for q in reference.evaluation(2) if q["answer"] != q["baseline"])
    assert asked_by_step_2 > 0
    cache = str(tmp_path / "cache.sqlite")
    judge = {**table["eval"]["win_rate"]["mine"]["judge"], "cache": cache, "concurrency": 1}
    endpoint.script = [status(code, "gone")]
    with pytest.warns(
        UserWarning, match=r"^eval\.win_rate\.mine has no win rate at step 2: "
    ) as told:
        run = self_play(changed(table, judge=judge), tmp_path / "run")
    assert "step 2: eval.win_rate.mine.judge: " in str(told[0].message)
    assert "same command" not in str(told[0].message)
    assert steps_with(run, "eval/mine/win_rate") == [0, 4]
    assert steps_with(run, "eval/mine/length") == [0, 2, 4]
    assert [q["preference"] for q in run.evaluation(2)] == [None] * 6
    assert [q["answer"] for q in run.evaluation(2)] == [
        q["answer"] for q in reference.evaluation(2)
    ]
    [event] = events(run, "unjudged")
    assert event["step"] == 2
    assert f"answered {code}: 'gone'" in event["reason"]
    for step in range(STEPS):
        assert run.games(step) == reference.games(step)
    assert run.evaluation(4) == reference.evaluation(4)


def test_pairs_with_prose_for_a_verdict_are_left_out_and_counted(
    table: dict[str, Any], endpoint: Endpoint, tmp_path: Path
):
    def reply(handler: Any) -> None:
        prose = handler.prompt.startswith("27+48|")
        (test_judge.says("Both are lovely.") if prose else longer)(handler)

    endpoint.default = reply
    config = changed(table, temperature=3.0)  # other answers each time
    with pytest.warns(
        UserWarning, match=r"'Both are lovely\.'; this pair, and others like it, are"
    ):
        run = self_play(config, tmp_path / "run")
    found = {q["id"]: q["preference"] for q in run.evaluation(4)}
    assert [q for q, preference in found.items() if preference is None] == ["27+48"]
    last = list(run.metrics())[-1]
    assert last["eval/mine/unjudged"] == pytest.approx(1 / 6)
    assert last["time/eval_mine_unjudged"] == 2  # requests without a score: one in each order
    assert main(["eval", "table", str(run.folder)]) == 0


def test_the_headline_shows_win_rates_with_their_difference_to_step_0():
    first = {"step": 0, "eval/mine/win_rate": 0.5, "eval/harness/lsp_sums/acc": 0.75}
    later = {"step": 9, "eval/mine/win_rate": 0.625, "eval/harness/lsp_sums/acc": 0.5}
    later |= {"eval/mine/win_rate/a": 0.1, "eval/mine/strict_win_rate": 0.2}
    assert headline(later, first) == "mine win rate 62.5% (+12.5)  lsp_sums acc 50.0% (-25.0)"


def test_the_headline_says_which_version_a_win_rate_is_of_and_what_was_not_judged():
    record = {"step": 9, "eval/mine/win_rate": 0.5, "eval/mine/unjudged": 0.125}
    record["eval/mine/equal_answers"] = 0.75
    said = "75% of pairs equal, not asked, 12% without a verdict"
    assert headline(record, record) == f"mine win rate 50.0% ({said})"
    judged = dict.fromkeys(record, 4)
    assert headline(record, record, judged) == f"mine win rate 50.0% (version 4, {said})"
    # The newest evaluation has no win rate, and its pairs are not those of the one that is shown.
    in_vain = judged | {"eval/mine/unjudged": 8, "eval/mine/equal_answers": 8}
    assert headline(record, record, in_vain) == (
        "mine win rate 50.0% (version 4, no verdict of version 8)"
    )


def test_the_dry_run_tells_what_judging_takes(
    table: dict[str, Any], tmp_path: Path, endpoint: Endpoint, capsys: pytest.CaptureFixture[str]
):
    judge = table["eval"]["win_rate"]["mine"]["judge"]
    prices = {"usd_per_million_input_tokens": 1e4, "usd_per_million_output_tokens": 1e3}
    (tmp_path / "r.toml").write_text(
        changed(table, judge={**judge, **prices, "max_tokens": 100}).to_toml()
    )
    assert main(["train", str(tmp_path / "r.toml"), "--dry-run"]) == 0
    # Steps 2 and 4 are judged: 2 · 12 requests. "27+48||" and the others have 23 + 6 · 2 = 35 characters,
    # read twice each time at 4 a token, with 2 answers of 6 tokens: 2 · 2 · (35 / 4 + 6 · 12) = 323.
    # 24 · 100 are written: 323 · 0.01 + 2,400 · 0.001 = 5.63.
    assert (
        "eval.win_rate.mine: 6 answers against step-0, judged 2 times. At most 12 requests to grader"
        " each time, 24 in all, with about 323 tokens to read and 2,400 to write, 5.63 USD;"
    ) in capsys.readouterr().out
    assert endpoint.requests == []


def test_a_prompt_that_leaves_no_room_is_refused_before_weights_load(
    table: dict[str, Any], prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    Path(prompts).write_text(json.dumps([{"instruction": "1+" * 4000}]))
    (tmp_path / "r.toml").write_text(Config.from_table(table).to_toml())
    assert main(["train", str(tmp_path / "r.toml"), "--run", str(tmp_path / "r")]) == 2
    assert capsys.readouterr().err.startswith("lsp: eval.win_rate.mine: the prompt '1+1+")
    assert not (tmp_path / "r").exists()


# ---------------------------------------------------------------- several ranks

LENGTHS = "def reward(queries, answers):\n    return [float(len(a)) for a in answers]\n"


@pytest.mark.slow
def test_two_ranks_come_to_the_win_rates_of_one(table: dict[str, Any], tmp_path: Path):
    import test_distributed

    (tmp_path / "judging_by_length.py").write_text(LENGTHS)
    judge = {"kind": "python", "function": "judging_by_length:reward"}
    (tmp_path / "r.toml").write_text(changed(table, judge=judge, temperature=0.5).to_toml())
    folders = []
    for ranks in (1, 2):
        folders.append(tmp_path / f"ranks-{ranks}")
        process = test_distributed.lsp(
            tmp_path, ranks, "train", tmp_path / "r.toml", "--run", folders[-1]
        )
        said, _ = process.communicate(timeout=240)
        assert process.returncode == 0, said
    one, two = map(RunFolder, folders)
    assert steps_with(two, "eval/mine/win_rate") == [0, 2, 4]
    for step in (0, 2, 4):
        assert one.evaluation(step) == two.evaluation(step)
    assert any(q["preference"] != 1.5 for q in two.evaluation(4))


# ---------------------------------------------------------------- lm-eval


def without_judge(table: dict[str, Any], **evaluation: Any) -> Config:
    return Config.from_table({**table, "eval": {"every": 2, **evaluation}})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # lm-eval's own, and those of what it imports
def test_tasks_of_lm_eval_are_given_to_the_policy_itself_and_change_nothing(
    table: dict[str, Any], tasks: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    import torch

    harness = {"tasks": ["lsp_sums"], "include_path": tasks, "chat": True}
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    drawn = random.random(), np.random.random(), float(torch.rand(1))
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    run = self_play(without_judge(table, harness=harness), tmp_path / "run")
    assert (random.random(), np.random.random(), float(torch.rand(1))) == drawn
    assert capfd.readouterr().err == ""
    assert steps_with(run, "eval/harness/lsp_sums/acc") == [0, 2, 4]
    first = next(run.metrics())
    assert first["eval/harness/lsp_sums/acc"] == 0.75
    # The standard error of 1, 1, 1, 0 is √(0.25 / 4) = 0.25 with n − 1: half an interval is 1.959964 of it.
    assert first["eval/harness/lsp_sums/acc_ci95"] == pytest.approx(0.489991, rel=1e-5)
    without = self_play(without_judge(table), tmp_path / "without")
    for step in range(STEPS):
        assert run.games(step) == without.games(step)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_tasks_measure_the_weights_of_their_step_and_have_a_cadence(
    table: dict[str, Any], tasks: str, tmp_path: Path
):
    harness = {"tasks": ["lsp_sums"], "include_path": tasks, "chat": True, "limit": 3, "every": 3}
    config = without_judge({**table, "learner": {"lr": 0.03}}, harness=harness)
    run = self_play(config, tmp_path / "run")
    assert steps_with(run, "eval/harness/lsp_sums/acc") == [0, 3, 4]
    first, *_, last = run.metrics()
    assert first["eval/harness/lsp_sums/acc"] == 1.0  # of its first three questions
    assert last["eval/harness/lsp_sums/acc"] < 1.0  # at such a rate the weights are ruined


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_task_that_is_none_is_told_before_weights_load(
    table: dict[str, Any], tasks: str, tmp_path: Path
):
    for harness, sentence in (
        (
            {"tasks": ["lsp_sum"], "include_path": tasks},
            r"^eval\.harness\.tasks lsp_sum: .*lsp_sums\?",
        ),
        (
            {"tasks": ["lsp_sums"], "include_path": "nowhere"},
            r"^eval\.harness\.include_path = 'nowh",
        ),
    ):
        with pytest.raises((ConfigError, OSError), match=sentence):
            self_play(without_judge(table, harness=harness), tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_without_lm_eval_the_extra_is_named_before_weights_load(
    table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"^eval\.harness: needs .*language-self-play\[harness\]"):
        self_play(without_judge(table, harness={"tasks": ["gsm8k"]}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
