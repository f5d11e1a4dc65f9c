"""The commands that measure and play, doing their job on the built-in model."""

from __future__ import annotations

import io
import json

import pytest

from language_self_play import Config, self_play
from language_self_play.cli import main


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A paused-looking run: two steps of GRPO, with a checkpoint and no model/ yet."""
    folder = tmp_path_factory.mktemp("runs") / "grpo"
    quiet = {"progress": "none"}
    config = Config.from_recipe("arena-grpo", steps=2, threads=1, log=quiet, eval={"tasks": []})
    return self_play(config, folder)


def test_eval_accuracy_prints_tiers_and_writes_every_question(tmp_path, capsys):
    assert main(["eval", "accuracy", "arena", "--json", str(tmp_path / "a.json")]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("easy", "medium", "hard", "multiply", "900"))
    report = json.loads((tmp_path / "a.json").read_text())
    assert len(report["questions"]) == 900
    mean = sum(q["probability"] for q in report["questions"]) / 900
    assert report["eval/sampled_accuracy"] == pytest.approx(mean)


def games_of(said: str) -> list[str]:
    """The lines of games, which are numbered, without the legend before them."""
    return [line for line in said.splitlines() if line[:4].strip().isdecimal()]


def test_play_shows_as_many_games_as_asked_for(capsys):
    assert main(["play", "arena", "--games", "5"]) == 0
    lines = games_of(capsys.readouterr().out)
    assert len(lines) == 5
    assert all("→" in line or "invalid" in line for line in lines)


def test_a_run_without_its_final_model_is_played_from_its_checkpoint(run, capsys):
    from language_self_play.durable import remove_folder

    remove_folder(run.model_folder)
    assert main(["play", str(run.folder), "--games", "2"]) == 0
    assert len(games_of(capsys.readouterr().out)) == 2
    [checkpoint] = run.checkpoints_folder.glob("step-*")
    assert main(["play", str(checkpoint / "model"), "--games", "2"]) == 0
    assert main(["eval", "accuracy", str(run.folder)]) == 0


def test_a_person_can_answer_and_is_scored(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("75\n" * 3))
    assert main(["play", "arena", "--answer", "--games", "3"]) == 0
    out = capsys.readouterr().out
    assert "After 3 games: you " in out
    assert out.count("the Solver says") + out.count("invalid:") == 3
