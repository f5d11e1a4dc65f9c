"""Evaluation while training: every so many steps, of the current weights, question by question."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from language_self_play import Config, self_play
from language_self_play.cli import main
from language_self_play.evaluate.intervals import wilson_interval
from language_self_play.evaluate.outcomes import set_metrics
from language_self_play.progress import headline
from language_self_play.run_folder import RunFolder
from language_self_play.summary import print_summary

STEPS = 4


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Sums as the arena writes them, units first: 3+9 is 21. One key of four is wrong."""
    file = tmp_path_factory.mktemp("sets") / "sums.jsonl"
    rows = [("3+9", "21"), ("8+7", "51"), ("4+4", "8"), ("1+2", "4")]
    file.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in rows))
    return str(file)


def config(questions: str, **changes: Any) -> Config:
    sums = {"path": questions, "method": "exact", "max_tokens": 6}
    several = {"num_answers": 3, "temperature": 1.0, "pass_at": [3]}
    return Config.from_recipe(
        "arena-zero",
        steps=STEPS,
        threads=1,
        log={"progress": "none"},
        checkpoint={"every": 3},
        eval={
            "every": 2,
            "tasks": ["arena"],
            "accuracy": {"sums": sums, "several": {**sums, **several}},
        },
        **changes,
    )


@pytest.fixture(scope="module")
def run(questions: str, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return self_play(config(questions), tmp_path_factory.mktemp("runs") / "whole")


def reproducible(run: RunFolder) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in record.items() if not k.startswith(("time/", "memory/"))}
        for record in run.metrics()
    ]


def test_evaluations_are_at_step_0_every_so_many_steps_and_at_the_end(run: RunFolder):
    keys = ("eval/sums/accuracy", "eval/several/pass_at_3", "eval/sampled_accuracy")
    for key in keys:
        assert [r["step"] for r in run.metrics() if key in r] == [0, 2, 4]
    assert run.evaluated_steps() == [0, 2, 4]
    last = list(run.metrics())[-1]
    assert all(key == "step" or key.startswith("eval/") for key in last)


def test_metrics_are_those_of_the_recorded_questions(run: RunFolder):
    for record in (r for r in run.metrics() if r["step"] in (0, 2, 4)):
        of_step = run.evaluation(record["step"])
        for name, pass_at in (("sums", [1]), ("several", [3])):
            found = set_metrics(name, [q for q in of_step if q["set"] == name], pass_at)
            assert found == {k: v for k, v in record.items() if k.startswith(f"eval/{name}/")}
        arena = [q for q in of_step if q["set"] == "arena"]
        assert len(arena) == 900
        mean = sum(q["probability"] for q in arena) / 900
        assert record["eval/sampled_accuracy"] == pytest.approx(mean, rel=1e-12)
        assert record["eval/greedy_accuracy"] == sum(q["greedy"] for q in arena) / 900


def test_the_base_answers_small_sums_right_and_not_those_with_wrong_keys(run: RunFolder):
    answered = [q for q in run.evaluation(0) if q["set"] == "sums"]
    assert [q["answers"][0]["right"] for q in answered] == [True, True, True, False]
    # 3 of 4, Wilson: 1.959964 · √(0.75 · 0.25 / 4 + 3.841459 / 64) / (1 + 3.841459 / 4).
    first = next(run.metrics())
    assert first["eval/sums/accuracy"] == 0.75
    assert first["eval/sums/accuracy_ci95"] == pytest.approx(0.326885, rel=1e-5)


def test_later_evaluations_are_of_later_weights(run: RunFolder):
    probabilities = [
        [q["probability"] for q in run.evaluation(s) if q["set"] == "arena"] for s in (0, 2, 4)
    ]
    assert probabilities[0] != probabilities[1] != probabilities[2]


def test_evaluating_question_sets_changes_nothing_that_is_played(
    run: RunFolder, questions: str, tmp_path: Path
):
    without = config(questions).model_copy(update={"eval": Config.model_fields["eval"].default})
    other = self_play(without, tmp_path / "without")
    for step in range(STEPS):
        assert run.games(step) == other.games(step)


def test_a_resumed_run_is_the_uninterrupted_one_evaluations_included(
    run: RunFolder, questions: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class StopAfterOne:
        def __enter__(self) -> Any:
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def step(self, record: Any, games: Any) -> None:
            if record["step"] == 2:
                # As a run that was killed behind its checkpoint, with more evaluated than it holds.
                raise KeyboardInterrupt

    folder = tmp_path / "part"
    settings = config(questions)
    settings = settings.model_copy(
        update={"checkpoint": settings.checkpoint.model_copy(update={"every": 1})}
    )
    with pytest.raises(KeyboardInterrupt):
        self_play(settings, folder, progress=StopAfterOne())
    part = RunFolder(folder)
    assert part.evaluated_steps() == [0, 2]
    resumed = self_play(part.resumed_config({}), folder, resume=True)
    assert reproducible(resumed) == reproducible(run)
    for step in (0, 2, 4):
        file = f"evaluations/step-{step:06}.jsonl"
        assert (folder / file).read_bytes() == (run.folder / file).read_bytes()


def test_evaluations_past_the_checkpoint_are_dropped(run: RunFolder, tmp_path: Path):
    import shutil

    copy = RunFolder(shutil.copytree(run.folder, tmp_path / "copy"))
    copy.truncate(2)
    assert copy.evaluated_steps() == [0]
    assert copy.evaluation(2) == []


def test_the_headline_shows_the_difference_to_step_0():
    first = {"step": 0, "eval/sampled_accuracy": 0.5, "eval/gsm8k/accuracy": 0.25}
    assert headline(first, first) == "held-out 50.0%  gsm8k 25.0%"
    later = {"step": 9, "eval/sampled_accuracy": 0.625, "eval/gsm8k/accuracy": 0.24}
    assert headline(later, first) == "held-out 62.5% (+12.5)  gsm8k 24.0% (-1.0)"
    assert headline(later, {}) == "held-out 62.5%  gsm8k 24.0%"


def test_plain_lines_compare_with_the_first_record_also_after_a_resume():
    from language_self_play.progress import PlainLines

    for first in (None, {"step": 0, "eval/a/accuracy": 0.5}):
        out = io.StringIO()
        lines = PlainLines(steps=9, start=0, every_s=0.0, out=out, first=first)
        if first is None:
            lines.step({"step": 0, "eval/a/accuracy": 0.5}, [])
        lines.step({"step": 8, "eval/a/accuracy": 0.75}, [])
        assert "a 75.0% (+25.0)" in out.getvalue().splitlines()[-2]  # above the ending


def test_the_summary_shows_each_set_before_and_after(run: RunFolder):
    out = io.StringIO()
    print_summary(run, Console(file=out, width=200))
    last = list(run.metrics())[-1]
    asked = [q for q in run.evaluation(4) if q["set"] == "sums"]
    after, right = last["eval/sums/accuracy"], [q["answers"][0]["right"] for q in asked]
    low, high = (100 * end for end in wilson_interval(right)[1:])
    # Wilson's interval of 3 of 4, as `lsp eval accuracy` states it.
    assert "sums, accuracy in %: 75.0 [30.1, 95.4] at step 0, " in out.getvalue()
    assert (
        f", {100 * after:.1f} [{low:.1f}, {high:.1f}] at step 4, {100 * (after - 0.75):+.1f}"
        in (out.getvalue())
    )


def test_a_set_that_can_not_be_read_stops_the_run_before_weights_load(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    empty = tmp_path / "e.jsonl"
    empty.write_text("")
    for path, sentence in [
        (empty, f"lsp: {empty}: holds no questions"),
        (tmp_path / "no.jsonl", "lsp: eval.accuracy.mine.path = "),
    ]:
        command = ["train", "arena", "--run", str(tmp_path / "r"), "--dry-run"]
        assert main([*command, "--eval.accuracy.mine.path", str(path)]) == 2
        assert capsys.readouterr().err.startswith(sentence)


def test_only_the_cadence_of_evaluations_may_change_on_resume(run: RunFolder):
    from language_self_play.errors import ConfigError

    assert run.resumed_config({"eval": {"every": 1}}).eval.every == 1
    with pytest.raises(ConfigError, match=r"^eval.accuracy.sums.limit = 3: was 200"):
        run.resumed_config({"eval": {"accuracy": {"sums": {"limit": 3}}}})
