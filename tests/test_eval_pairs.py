"""`lsp eval win-rate` and `lsp eval alpaca` as they are typed: figures, files, resuming, mistakes."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

import servers
from language_self_play.cli import main
from servers import Endpoint, says, scored, status

pytest.importorskip("openai")

endpoint = servers.endpoint
_surroundings = servers.surroundings

PUBLISHED = ("FuseChat-Llama-3.2-1B-Instruct", "OpenHermes-2.5-Mistral-7B", "alpaca-7b_verbose")
QUERIES = ["27+48", "12+5", "9+9", "3+4", "50+50"]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def prompts(tmp_path):
    rows = [{"instruction": q, "dataset": "ab"[i % 2]} for i, q in enumerate(QUERIES)]
    (tmp_path / "prompts.json").write_text(json.dumps(rows))
    return "prompts.json"


@pytest.fixture
def judge(endpoint: Endpoint, tmp_path):
    """Flags of an endpoint that is shown nothing but the texts."""
    (tmp_path / "pair.txt").write_text("{query}|{first}|{second}")
    named = ["--judge.base_url", endpoint.url, "--judge.model", "grader"]
    return [*named, "--judge.prompt", "pair.txt", "--judge.retries", "0"]


def answers(file, texts, queries=QUERIES, **columns):
    rows = [
        {"instruction": q, "output": text, **columns}
        for q, text in zip(queries, texts, strict=True)
    ]
    file.write_text(json.dumps(rows))
    return str(file.name)


def report(folder="out"):
    with open(f"{folder}/report.json", encoding="utf-8") as stream:
        return json.load(stream)


def refusal(capsys, *arguments):
    assert main(["eval", *arguments]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    return line.removeprefix("lsp: ")


# ---------------------------------------------------------------- published annotations


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_annotations_come_to_the_leaderboards_figures(name, test_data, tmp_path, capsys):
    folder = test_data / "data" / "alpaca_eval"
    file = folder / f"annotations-{name}.json.gz"
    assert main(["eval", "alpaca", "--annotations", str(file), "--json", "figures.json"]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    with (folder / "leaderboard.csv").open() as stream:
        [row] = [row for row in csv.DictReader(stream) if row[""] == name]
    for key in ("win_rate", "standard_error", "discrete_win_rate"):
        assert figures[key] == pytest.approx(float(row[key]), abs=5e-7), key
    for key in ("n_wins", "n_wins_base", "n_draws", "n_total"):
        assert figures[key] == int(row[key]), key
    # The published estimates have a table of difficulties and rows of two more models beside these.
    assert figures["lc_standard_error"] is None  # without the table
    published = float(row["length_controlled_winrate"])
    assert figures["length_controlled_win_rate"] == pytest.approx(published, abs=1)
    sizes = {"selfinstruct": 252, "oasst": 188, "koala": 156, "helpful_base": 129, "vicuna": 80}
    parts = figures["subsets"]
    assert set(parts) == set(sizes)
    if figures["n_total"] == 805:
        assert {part: parts[part]["n_total"] for part in parts} == sizes
    whole = sum(part["win_rate"] * part["n_total"] for part in parts.values())
    assert whole / figures["n_total"] == pytest.approx(figures["win_rate"])
    assert figures["win_rate_ci95"][0] < figures["win_rate"] < figures["win_rate_ci95"][1]
    assert not figures["repeated_answer"]["suspect"]
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "WARNING" not in out
    assert all(part in out for part in sizes)


def test_subsets_and_the_unjudged_come_from_the_instructions(test_data, capsys):
    folder = test_data / "data" / "alpaca_eval"
    file = str(folder / "annotations-alpaca-7b_verbose.json.gz")
    instructions = ["--instructions", str(folder / "instructions.json")]
    assert main(["eval", "alpaca", "--annotations", file, *instructions]) == 0
    assert "3 of the 805 instructions were not judged" in capsys.readouterr().out


def test_difficulties_by_number_count_in_the_file_of_instructions(test_data, tmp_path, capsys):
    folder = test_data / "data" / "alpaca_eval"
    file = ["--annotations", str(folder / "annotations-alpaca-7b_verbose.json.gz")]
    known = [row["instruction"] for row in json.loads((folder / "instructions.json").read_text())]
    hard = [len(text) ** 0.5 for text in known]
    rows = "".join(f"{i},{value}\n" for i, value in enumerate(hard))
    (tmp_path / "d.csv").write_text("index,instruction_difficulty\n" + rows)
    (tmp_path / "d.json").write_text(json.dumps(dict(zip(known, hard, strict=True))))
    by_number = ["--instruction-difficulty", "d.csv"]
    assert "has no difficulty for 802" in refusal(capsys, "alpaca", *file, *by_number)
    instructions = ["--instructions", str(folder / "instructions.json")]
    by_text = ["--instruction-difficulty", "d.json"]
    found, errors = [], []
    for table in ([*by_number, *instructions], by_text, []):
        assert main(["eval", "alpaca", *file, *table, "--json", "figures.json"]) == 0
        figures = json.loads((tmp_path / "figures.json").read_text())
        used = figures["length_control"]["difficulties"]
        found.append((used, figures["length_controlled_win_rate"]))
        errors.append(figures["lc_standard_error"])
    assert found[0] == found[1]
    assert found[0][0] == "table"
    assert found[2][0] == "length of the baseline's answer"
    assert abs(found[0][1] - found[2][1]) > 0.5
    assert errors[0] == errors[1] > 0
    assert errors[2] is None
    told = f"%, standard error {errors[0]:.2f} as AlpacaEval's ("
    assert " ".join(capsys.readouterr().out.split()).count(told) == 2


def test_one_answer_to_everything_is_told_whatever_the_judge_says(tmp_path, capsys):
    rows = [
        {
            "instruction": f"q{i}",
            "output_1": f"a{i}",
            "generator_1": "base",
            "output_2": "I win.",
            "generator_2": "NullModel",
            "preference": 2.0,
        }
        for i in range(20)
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert main(["eval", "alpaca", "--annotations", "a.json"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "WARNING: the model gives one and the same answer to 20 of 20 instructions" in out
    assert "the baseline gives" not in out


# ---------------------------------------------------------------- answers that are there


def test_files_of_answers_are_judged_in_both_orders_and_written_for_alpaca_eval(
    prompts, judge, endpoint, tmp_path, capsys
):
    def reply(handler):
        _, first, second = handler.prompt.split("|")
        scored(0 if first == "good" else 2 if second == "good" else 1)(handler)

    endpoint.default = reply
    mine = answers(tmp_path / "mine.json", ["good", "bad", "x", "same", "y"], generator="mine")
    # In another order than the prompts, which is nobody's concern.
    theirs = answers(tmp_path / "theirs.json", ["w", "same", "z", "good", "bad"], QUERIES[::-1])
    command = ["eval", "win-rate", mine, theirs, "--prompts", prompts, *judge, "--out", "out"]
    assert main([*command, "--json", "figures.json"]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures == report()
    # won, lost, tied, equal, tied: (1 + 0 + .5 + .5 + .5) / 5
    assert figures["win_rate"] == pytest.approx(50.0)
    assert (figures["n_wins"], figures["n_wins_base"], figures["n_draws"]) == (1, 1, 3)
    assert figures["strict_win_rate"] == pytest.approx(20.0)
    assert (figures["model"], figures["baseline"]) == ("mine", "theirs")
    assert figures["annotator"] == "grader"
    bias = figures["position_bias"]
    # Of the four that were asked about, in 8 judgements: 2 ties in both orders.
    assert (bias["n"], bias["first"], bias["flipped"], bias["tied"]) == (4, 0.5, 0.0, 0.5)
    assert {k: v["n_total"] for k, v in figures["subsets"].items()} == {"a": 3, "b": 2}
    # The equal answers were not asked about: 4 pairs in 2 orders.
    assert len(endpoint.requests) == figures["costs"]["requests"] == 8
    said = capsys.readouterr()
    assert max(map(len, said.out.splitlines())) <= 80
    assert "figures.json: written" in said.err
    out = " ".join(said.out.split())
    assert "4 pairs in both orders: 8 requests to grader" in out
    assert "1 pair of equal answers ties unasked" in out
    assert "Order, of 4 pairs asked:" in out
    assert figures["n_equal"] == 1
    assert "1 of the 5 pairs has equal answers." in out
    low, high = figures["win_rate_ci95"]
    assert f"Win rate 50.00 % [{low:.2f}, {high:.2f}], a 95 % interval over" in out
    assert out.index("8 requests") < out.index("Win rate")
    annotations = json.loads((tmp_path / "out" / "annotations.json").read_text())
    assert annotations[0] == {
        "instruction": "27+48",
        "output_1": "bad",
        "generator_1": "theirs",
        "output_2": "good",
        "generator_2": "mine",
        "preference": 2.0,
        "annotator": "grader",
        "dataset": "a",
        "baseline_first": 2.0,
        "model_first": 2.0,
    }
    with (tmp_path / "out" / "leaderboard.csv").open() as stream:
        [row] = csv.DictReader(stream)
    assert (row[""], row["win_rate"], row["n_total"]) == ("mine", "50.0", "5")
    # What was written is scored to the same figures.
    again = ["eval", "alpaca", "--annotations", "out/annotations.json", "--json", "again.json"]
    assert main(again) == 0
    assert json.loads((tmp_path / "again.json").read_text())["win_rate"] == figures["win_rate"]


def test_equal_answers_all_tie_and_nobody_is_asked(prompts, judge, endpoint, tmp_path, capsys):
    mine = answers(tmp_path / "mine.json", list("abcde"))
    theirs = answers(tmp_path / "theirs.json", list("abcde"))
    command = ["eval", "win-rate", mine, theirs, "--prompts", prompts, *judge, "--out", "out"]
    assert main(command) == 0
    assert endpoint.requests == []
    assert (report()["win_rate"], report()["n_draws"], report()["strict_win_rate"]) == (50.0, 5, 0)
    out = capsys.readouterr().out
    assert "5 pairs of equal answers tie unasked" in out
    assert "0 pairs" not in out


def test_a_judge_of_the_first_answer_is_a_draw_with_its_bias_reported(
    prompts, judge, endpoint, tmp_path, capsys
):
    endpoint.default = scored(0)
    mine = answers(tmp_path / "mine.json", list("abcde"))
    theirs = answers(tmp_path / "theirs.json", list("vwxyz"))
    assert main(["eval", "win-rate", mine, theirs, "--prompts", prompts, *judge]) == 0
    [folder] = tmp_path.glob("evaluations/win-rate-mine-theirs-prompts-*/grader-*")
    figures = report(folder)
    assert figures["win_rate"] == 50.0
    assert figures["n_draws"] == 5
    assert figures["strict_win_rate"] == 50.0  # of ten judgements five are for the model
    assert figures["position_bias"]["first"] == 1.0
    assert figures["position_bias"]["flipped"] == 1.0
    out = " ".join(capsys.readouterr().out.split())
    assert "the answer shown first is preferred 100.0 %" in out
    # The orders are in the file, and scored to the same figures.
    again = ["eval", "alpaca", "--annotations", str(folder / "annotations.json")]
    assert main([*again, "--json", "again.json"]) == 0
    of_file = json.loads((tmp_path / "again.json").read_text())
    assert of_file == {name: value for name, value in figures.items() if name != "costs"}


def test_a_dry_run_says_what_judging_costs_and_asks_nothing(
    prompts, judge, endpoint, tmp_path, capsys
):
    mine = answers(tmp_path / "mine.json", list("abcde"))
    theirs = answers(tmp_path / "theirs.json", list("vwxyz"))
    command = ["eval", "win-rate", mine, theirs, "--prompts", prompts, *judge, "--dry-run"]
    prices = ["--judge.usd_per_million_input_tokens", "1.0"]
    assert main([*command, *prices]) == 0
    assert "10 requests to grader" in (out := " ".join(capsys.readouterr().out.split()))
    assert "0.00 to 0.00 USD" in out
    assert endpoint.requests == []


def test_what_an_endpoint_judged_before_it_went_away_is_not_paid_for_twice(
    prompts, judge, endpoint, tmp_path, capsys
):
    endpoint.script = [scored(1)] * 4
    endpoint.default = status(503, "gone fishing")
    mine = answers(tmp_path / "mine.json", list("abcde"))
    theirs = answers(tmp_path / "theirs.json", list("vwxyz"))
    command = ["eval", "win-rate", mine, theirs, "--prompts", prompts, *judge, "--out", "out"]
    command += ["--judge.concurrency", "1"]
    assert main(command) == 75
    assert "gone fishing" in (said := capsys.readouterr().err)
    assert "the same command goes on from them" in said
    endpoint.default = scored(1)
    asked = len(endpoint.requests)
    assert main(command) == 0
    assert len(endpoint.requests) - asked == 6
    out = " ".join(capsys.readouterr().out.split())
    assert "6 requests to grader (4 more are in the cache)" in out
    assert sorted(set(endpoint.prompts[:4] + endpoint.prompts[asked:])) == sorted(
        f"{q}|{one}|{two}"
        for q, a, b in zip(QUERIES, "abcde", "vwxyz", strict=True)
        for one, two in ((a, b), (b, a))
    )


def test_prose_in_place_of_a_verdict_is_quoted(prompts, judge, endpoint, tmp_path, capsys):
    endpoint.default = says("Both are fine.")
    mine = answers(tmp_path / "mine.json", list("abcde"))
    theirs = answers(tmp_path / "theirs.json", list("vwxyz"))
    assert main(["eval", "win-rate", mine, theirs, "--prompts", prompts, *judge]) == 75
    said = capsys.readouterr().err
    assert "brought no score from 0 to 2: 'Both are fine.'" in said
    assert "lsp: --judge: grader at " in said


@pytest.mark.filterwarnings("always::UserWarning")  # shown as the command shows them
def test_a_pair_without_a_verdict_is_told_counted_and_left_out(
    prompts, judge, endpoint, tmp_path, capsys
):
    def reply(handler):
        query, first, _ = handler.prompt.split("|")
        wins = query in QUERIES[:2]  # else no difficulty would tell pairs apart
        verdict = scored(0 if wins == (first in "abcde") else 2)
        (says("Hm.") if query == "9+9" else verdict)(handler)

    endpoint.default = reply
    mine = answers(tmp_path / "mine.json", list("abcde"))
    theirs = answers(tmp_path / "theirs.json", list("vwxyz"))
    command = ["eval", "win-rate", mine, theirs, "--prompts", prompts, *judge, "--out", "out"]
    assert main(command) == 0
    figures = report()
    assert (figures["n_total"], figures["n_unjudged"]) == (4, 1)
    said = capsys.readouterr()
    assert "lsp: warning: --judge: grader at " in said.err
    assert "1 pair has no verdict and is left out." in said.out
    written = json.loads((tmp_path / "out" / "annotations.json").read_text())
    assert [row["instruction"] for row in written] == [q for q in QUERIES if q != "9+9"]
    # The table of difficulties goes along.
    hard = {q: float(i) for i, q in enumerate(QUERIES)}
    (tmp_path / "d.json").write_text(json.dumps(hard))
    table = ["--instruction-difficulty", "d.json"]
    command = ["eval", "alpaca", mine, "--baseline", theirs, *table, *judge, "--out", "out"]
    assert main(command) == 0
    of_model = report()
    assert of_model["length_control"]["difficulties"] == "table"
    assert abs(of_model["length_control"]["difficulty"]) > 0.1
    again = ["eval", "alpaca", "--annotations", "out/annotations.json", *table]
    (tmp_path / "d.json").write_text(json.dumps({q: v for q, v in hard.items() if q != "9+9"}))
    assert main([*again, "--json", "again.json"]) == 0
    of_file = json.loads((tmp_path / "again.json").read_text())
    assert of_file["length_control"] == of_model["length_control"]


def test_a_judges_score_that_is_not_finite_has_an_exit_code_of_its_own(prompts, tmp_path, capsys):
    (tmp_path / "nan_judge.py").write_text(
        "def score(q, a): return [1e39 if x == 'c' else 1 for x in a]"
    )
    mine = answers(tmp_path / "mine.json", list("abcde"))
    theirs = answers(tmp_path / "theirs.json", list("vwxyz"))
    judge = ["--judge.kind", "python", "--judge.function", "nan_judge:score"]
    assert main(["eval", "win-rate", mine, theirs, "--prompts", prompts, *judge]) == 3
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("lsp: --judge.function = 'nan_judge:score': returned 1e+39 for")


def test_figures_go_where_the_shell_leads_them(tmp_path):
    rows = [
        {
            "instruction": "q",
            "output_1": "a",
            "generator_1": "base",
            "output_2": "b",
            "generator_2": "m",
            "preference": 2.0,
        }
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "real.json").write_text("old")
    (tmp_path / "link.json").symlink_to("real.json")
    command = ["eval", "alpaca", "--annotations", "a.json", "--json"]
    assert main([*command, "link.json"]) == 0
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads((tmp_path / "real.json").read_text())["win_rate"] == 100.0
    done = subprocess.run(
        [sys.executable, "-m", "language_self_play", *command, "/dev/stderr"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert '"win_rate": 100.0' in done.stderr
    assert {file.name for file in tmp_path.iterdir()} == {"a.json", "real.json", "link.json"}


def test_every_judge_and_every_file_of_prompts_has_a_folder_of_its_own(prompts, tmp_path):
    (tmp_path / "two_judges.py").write_text(
        "def longer(q, a): return [len(x) for x in a]\ndef shorter(q, a): return [-len(x) for x in a]\n"
    )
    mine = answers(tmp_path / "mine.json", ["a"] * 5)
    theirs = answers(tmp_path / "theirs.json", ["bb"] * 5)
    command = ["eval", "win-rate", mine, theirs, "--judge.kind", "python", "--prompts"]
    for judge in ("longer", "shorter"):
        assert main([*command, prompts, "--judge.function", f"two_judges:{judge}"]) == 0
    assert main([*command, mine, "--judge.function", "two_judges:longer"]) == 0
    found = {}
    for file in tmp_path.rglob("report.json"):
        of_models, of_judge = (folder.name[:-9] for folder in (file.parents[1], file.parent))
        found[of_models, of_judge] = report(file.parent)["win_rate"]
    assert found == {
        ("win-rate-mine-theirs-prompts", "two_judges-longer"): 0.0,
        ("win-rate-mine-theirs-prompts", "two_judges-shorter"): 100.0,
        ("win-rate-mine-theirs-mine", "two_judges-longer"): 0.0,
    }


def test_names_that_look_alike_and_other_settings_have_folders_of_their_own(tmp_path):
    from argparse import Namespace

    from language_self_play.cli.eval_pairs import _default_folder, _folder_name
    from language_self_play.config import Rollout

    def folder(*named, **changed):
        how = {"temperature": 0.0, "max_tokens": 8, "seed": 0, "device": "cpu", "dtype": "auto"}
        options = Namespace(**{**how, "rollout": Rollout(), **changed})
        return _default_folder("win-rate", named, options)

    folders = [
        folder("a-b", "c", "p"),
        folder("a", "b-c", "p"),
        folder("a-b", "c"),
        folder("x/a-b", "c", "p"),
        folder("a-b", "c", "p", temperature=1.0),
    ]
    assert len(set(folders)) == len(folders)
    assert folder("a-b", "c", "p") == folders[0]
    judges = [
        _folder_name(["m"], table)
        for table in (
            {"kind": "local", "path": "m"},
            {"kind": "reward_model", "path": "m"},
            {"model": "m", "base_url": "http://one/v1"},
            {"model": "m", "base_url": "http://two/v1"},
        )
    ]
    assert len(set(judges)) == len(judges)


def test_long_paths_need_no_out(tmp_path):
    deep = tmp_path / "/".join(["a" * 100] * 3)
    deep.mkdir(parents=True)
    texts = ["a"] * 5
    answers(deep / f"{'m' * 200}.json", texts)
    answers(deep / f"{'语' * 80}.json", texts)
    sides = [str(deep / f"{'m' * 200}.json"), str(deep / f"{'语' * 80}.json")]
    command = ["eval", "win-rate", *sides, "--prompts", sides[0], "--judge.kind", "arena"]
    assert main(command) == 0
    [folder] = tmp_path.glob("evaluations/*")
    assert folder.name[:-9] == f"win-rate-{'m' * 40}-{'语' * 13}-{'m' * 40}"


def test_a_second_judge_reads_the_answers_that_the_first_was_shown(
    prompts, judge, endpoint, tmp_path, monkeypatch
):
    from language_self_play.evaluate import generation

    endpoint.default = scored(1)
    theirs = answers(tmp_path / "theirs.json", list("vwxyz"))
    command = ["eval", "win-rate", "arena", theirs, "--prompts", prompts, "--max-tokens", "8"]
    assert main([*command, "--judge.kind", "arena"]) == 0
    monkeypatch.setattr(generation, "load_chat_model", None)  # weights must not be loaded again
    assert main([*command, *judge]) == 0
    [kept] = tmp_path.glob("evaluations/*")
    assert kept.name[:-9] == "win-rate-arena-theirs-prompts"
    kinds = sorted(path.name.split("-")[0] for path in kept.iterdir())
    assert kinds == ["answers", "arena", "grader"]
    one, other = (path for path in kept.iterdir() if path.is_dir())
    assert (one / "model_outputs.json").read_bytes() == (other / "model_outputs.json").read_bytes()


def test_a_second_judge_does_not_replace_the_verdicts_of_the_first(
    prompts, judge, endpoint, tmp_path, capsys
):
    endpoint.default = scored(1)
    theirs = answers(tmp_path / "theirs.json", list("vwxyz"))
    command = ["eval", "win-rate", theirs, theirs, "--prompts", prompts, "--out", "o"]
    for _ in range(2):
        assert main([*command, "--judge.kind", "arena"]) == 0
    before = (tmp_path / "o" / "annotations.json").read_bytes()
    capsys.readouterr()
    assert main([*command, *judge]) == 2
    said = "lsp: --out o: holds the verdicts of arena, and grader would replace them"
    assert capsys.readouterr().err.startswith(said)
    assert (tmp_path / "o" / "annotations.json").read_bytes() == before


def test_commands_that_answer_at_the_same_time_answer_once(prompts, tmp_path):
    theirs = answers(tmp_path / "theirs.json", list("vwxyz"))
    command = [sys.executable, "-m", "language_self_play", "eval", "win-rate", "arena", theirs]
    command += ["--prompts", prompts, "--max-tokens", "8", "--batch-size", "1", "--device", "cpu"]
    (tmp_path / "my_judge.py").write_text("def score(q, a): return [len(x) for x in a]\n")
    judges = (
        ["--judge.kind", "arena"],
        ["--judge.kind", "python", "--judge.function", "my_judge:score"],
    )
    both = [subprocess.Popen([*command, *judge]) for judge in judges]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    [file] = tmp_path.glob("evaluations/*/answers-*.jsonl")
    assert len(file.read_text().splitlines()) == 1 + 5


@pytest.mark.filterwarnings("always::UserWarning")  # shown as the command shows them
def test_prompts_that_the_arena_can_not_judge_are_told_first(tmp_path, capsys):
    queries = ["27+48", "Why?"]
    mine = answers(tmp_path / "mine.json", ["57", "a"], queries)
    theirs = answers(tmp_path / "theirs.json", ["1", "b"], queries)
    command = ["eval", "win-rate", mine, theirs, "--prompts", mine, "--judge.kind", "arena"]
    assert main(command) == 0
    assert capsys.readouterr().err.startswith(
        "lsp: warning: --judge.kind = 'arena': 1 of the 2 prompts is no query of the arena, such as"
        " 'Why?'; all answers to them are wrong, and tie\n"
    )


# ---------------------------------------------------------------- models that answer


def test_a_model_answers_once_and_later_commands_find_its_answers(
    prompts, judge, endpoint, tmp_path, capsys, monkeypatch
):
    endpoint.default = scored(1)
    theirs = answers(tmp_path / "theirs.json", ["57", "71", "no", "7", "001"])
    command = ["eval", "win-rate", "arena", theirs, "--prompts", prompts, *judge, "--out", "out"]
    command += ["--max-tokens", "8", "--device", "cpu"]
    assert main([*command, "--batch-size", "2"]) == 0
    written = json.loads((tmp_path / "out" / "model_outputs.json").read_text())
    # Units first: 27+48 = 75, 12+5 = 17, 9+9 = 18, 3+4 = 7, 50+50 = 100; the arena's model knows.
    assert [row["output"] for row in written] == ["57", "71", "81", "7", "001"]
    assert [row["instruction"] for row in written] == QUERIES
    assert {row["generator"] for row in written} == {"arena"}
    assert "arena: answered 5 of 5" in capsys.readouterr().err
    from language_self_play.evaluate import generation

    monkeypatch.setattr(generation, "load_chat_model", None)  # weights must not be loaded again
    assert main([*command, "--batch-size", "2"]) == 0
    assert report()["n_total"] == 5


def test_answers_go_on_after_the_last_whole_batch(prompts, judge, endpoint, tmp_path):
    endpoint.default = scored(1)
    theirs = answers(tmp_path / "theirs.json", list("vwxyz"))
    command = ["eval", "win-rate", "arena", theirs, "--prompts", prompts, *judge, "--out", "out"]
    command += ["--max-tokens", "8", "--temperature", "1", "--batch-size", "2", "--device", "cpu"]
    assert main(command) == 0
    whole = (tmp_path / "out" / "model_outputs.json").read_text()
    [file] = (tmp_path / "out").glob("answers-*.jsonl")
    lines = file.read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 5  # what was asked, and the answers
    # Killed while the fourth was written; the third, which is half a batch, is drawn again with it.
    file.write_text("".join(lines[:4]) + lines[4][:-2])
    assert main(command) == 0
    assert (tmp_path / "out" / "model_outputs.json").read_text() == whole
    assert file.read_text() == "".join(lines)


def test_other_settings_or_another_model_are_answered_anew(prompts, judge, endpoint, tmp_path):
    endpoint.default = scored(1)
    theirs = answers(tmp_path / "theirs.json", list("vwxyz"))
    command = ["eval", "win-rate", "arena", theirs, "--prompts", prompts, *judge, "--out", "out"]
    command += ["--device", "cpu"]
    for more in (["--max-tokens", "8"], ["--max-tokens", "1"], ["--max-tokens", "8"]):
        assert main([*command, *more]) == 0
    assert len(list((tmp_path / "out").glob("answers-*.jsonl"))) == 2
    assert json.loads((tmp_path / "out" / "model_outputs.json").read_text())[0]["output"] == "57"


def test_a_model_that_was_trained_on_is_answered_anew_in_its_old_folder(
    prompts, judge, endpoint, tmp_path
):
    from language_self_play.pretrained import resolve_model

    endpoint.default = scored(1)
    shutil.copytree(resolve_model("arena"), tmp_path / "model")
    theirs = answers(tmp_path / "theirs.json", list("vwxyz"))
    command = ["eval", "win-rate", "./model", theirs, "--prompts", prompts, *judge, "--out", "out"]
    command += ["--device", "cpu", "--max-tokens", "8"]
    for _ in range(2):
        assert main(command) == 0
        assert len(list((tmp_path / "out").glob("answers-*.jsonl"))) == 1
    os.utime(tmp_path / "model" / "model.safetensors", (1, 1))  # as written at another time
    assert main(command) == 0
    assert len(list((tmp_path / "out").glob("answers-*.jsonl"))) == 2


def test_each_batch_has_draws_of_its_own(tmp_path, monkeypatch):
    from language_self_play.config import Policy, Rollout
    from language_self_play.evaluate import answers as answering
    from language_self_play.evaluate import generation

    steps = []

    class Recorded(generation.TransformersSampler):
        def sync(self, model, step):
            steps.append(step)
            super().sync(model, step)

    monkeypatch.setattr(generation, "TransformersSampler", Recorded)
    rollout = Rollout(batch_size=2)
    how = answering.Answering(temperature=1.0, max_tokens=4, rollout=rollout, device="cpu")
    found = answering.answer(Policy(path="arena"), None, QUERIES, how, tmp_path)
    assert len(found) == 5
    assert steps == [0, 2, 4]


def test_answers_are_kept_by_all_that_decides_on_them():
    from language_self_play.config import Policy, Rollout
    from language_self_play.evaluate.answers import Answering, _identity

    arena, how = Policy(path="arena"), Answering()
    kept = [
        _identity(arena, None, QUERIES, how),
        _identity(arena, "Be brief.", QUERIES, how),
        _identity(arena, None, QUERIES[::-1], how),
        _identity(
            Policy(path="arena", chat_template_kwargs={"thinking": False}), None, QUERIES, how
        ),
        *(
            _identity(arena, None, QUERIES, Answering(**{name: value}))
            for name, value in {
                "temperature": 1.0,
                "max_tokens": 8,
                "seed": 1,
                "dtype": "bfloat16",
                "rollout": Rollout(batch_size=2),
            }.items()
        ),
    ]
    assert len(set(kept)) == len(kept)
    assert _identity(arena, None, QUERIES, Answering()) == kept[0]


def test_the_copy_draws_answers_of_its_own(prompts, judge, endpoint, tmp_path):
    endpoint.default = scored(1)
    command = ["eval", "alpaca", "arena", "--baseline", "own-copy", "--instructions", prompts]
    command += ["--max-tokens", "8", "--temperature", "1.5", "--device", "cpu", "--out", "out"]
    assert main([*command, *judge]) == 0
    ours, theirs = (
        [row["output"] for row in json.loads((tmp_path / "out" / f"{side}.json").read_text())]
        for side in ("model_outputs", "reference_outputs")
    )
    assert ours != theirs


def test_a_model_against_its_own_copy_is_below_50_when_ties_are_no_wins(
    prompts, judge, endpoint, tmp_path, capsys
):
    # The judge ties all but two queries, where it takes the first answer.
    def reply(handler):
        first = handler.prompt.startswith(("27+48|", "9+9|"))
        scored(0 if first else 1)(handler)

    endpoint.default = reply
    command = ["eval", "alpaca", "arena", "--baseline", "own-copy", "--instructions", prompts]
    command += ["--max-tokens", "8", "--temperature", "0.01", "--device", "cpu", "--out", "out"]
    assert main([*command, *judge]) == 0
    figures = report()
    assert figures["baseline"] == "arena (own copy)"
    assert figures["win_rate"] == 50.0
    # Equal answers are asked about here: the first wins 2 of 5, in one of the two orders each.
    assert figures["strict_win_rate"] == pytest.approx(20.0)
    assert figures["position_bias"]["tied"] == pytest.approx(0.6)
    assert figures["position_bias"]["first"] == pytest.approx(0.7)  # (2 + 3/2) / 5
    out = " ".join(capsys.readouterr().out.split())
    assert "with ties as losses 20.00 %" in out
    assert (
        "5 pairs in both orders: 5 requests" in out
    )  # both orders of equal answers are one question
    assert "tie unasked" not in out


@pytest.mark.filterwarnings("always::UserWarning")  # shown as the command shows them
def test_a_query_that_the_context_does_not_hold_is_answered_by_nothing(
    judge, endpoint, tmp_path, capsys
):
    endpoint.default = scored(1)
    queries = ["27+48", "1+" * 3000]
    (tmp_path / "p.json").write_text(json.dumps([{"instruction": q} for q in queries]))
    theirs = answers(tmp_path / "theirs.json", ["57", "x"], queries)
    command = ["eval", "win-rate", "arena", theirs, "--prompts", "p.json", *judge, "--out", "out"]
    assert main([*command, "--max-tokens", "8", "--device", "cpu"]) == 0
    said = capsys.readouterr().err
    assert "1 of the 2 instructions leave no room for an answer in arena's context of 128" in said
    written = json.loads((tmp_path / "out" / "model_outputs.json").read_text())
    assert [row["output"] for row in written] == ["57", ""]


def test_interrupted_while_it_is_judged_it_ends_at_once_and_keeps_what_came(
    prompts, judge, endpoint, tmp_path
):
    def reply(handler):
        if len(handler.server.requests) > 3:
            servers.hang(handler)
        scored(1)(handler)

    endpoint.default = reply
    mine = answers(tmp_path / "mine.json", list("abcde"))
    theirs = answers(tmp_path / "theirs.json", list("vwxyz"))
    command = ["eval", "win-rate", mine, theirs, "--prompts", prompts, *judge]
    command += ["--judge.concurrency", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "language_self_play", *command],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"JUDGE_KEY": servers.KEY},
        text=True,
    )
    deadline = time.monotonic() + 60
    while len(endpoint.requests) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in said
    asked = len(endpoint.requests)
    endpoint.default = scored(1)
    assert main(command) == 0
    assert len(endpoint.requests) - asked == 7  # of ten, three were kept


# ---------------------------------------------------------------- mistakes


def test_answers_to_other_instructions_are_named(prompts, judge, tmp_path, capsys):
    answers(tmp_path / "few.json", list("abcd"), QUERIES[:4])
    answers(tmp_path / "more.json", list("abcdef"), [*QUERIES, "1+1"])
    answers(tmp_path / "mine.json", list("abcde"))
    for names in (["few.json", "mine.json"], ["mine.json", "few.json"]):
        said = refusal(capsys, "win-rate", *names, "--prompts", prompts, *judge)
        assert said.startswith("few.json: has no answer to the 5 instructions of this evaluation")
        assert "1 of them, such as '50+50'" in said
    said = refusal(capsys, "win-rate", "mine.json", "more.json", "--prompts", prompts, *judge)
    assert said.startswith("more.json: has answers beside the 5 instructions")
    assert "1 of them, such as '1+1'" in said


MISTAKES = {
    "win-rate": "the following arguments are required: MODEL, BASELINE, --prompts",
    "win-rate a.json b.json": "the following arguments are required: --prompts",
    "win-rate a.json b.json --prompts nothere.json": "--prompts nothere.json: no such file",
    "win-rate a.json b.json --prompts empty.json": "--prompts empty.json: the file is empty",
    "win-rate a.json b.json --prompts folder": "--prompts folder: is a folder; name a JSON or JSONL file whose rows have a column instruction, prompt, query or question",
    "win-rate a.json b.json --prompts keys.json": "keys.json, row 1: has no prompt, its columns are key, text; name a JSON or JSONL file whose rows have a column instruction,",
    "win-rate a.json nothere.json --prompts a.json": "BASELINE nothere.json: no such file",
    "win-rate empty.json a.json --prompts a.json": "MODEL empty.json: the file is empty",
    "win-rate ./nothere a.json --prompts a.json": "./nothere: no such folder",
    "win-rate folder a.json --prompts a.json": "folder: the folder holds no config.json",
    "win-rate a.json own-copy --prompts a.json": "own-copy: a.json is a file of answers; only",
    "win-rate a.json a.json --prompts a.json": "--judge: no judge is named",
    "win-rate a.json a.json --prompts a.json --temperature -1": "--temperature -1: must be 0",
    "win-rate a.json a.json --prompts a.json --temperature nan": "--temperature nan: must be 0",
    "win-rate a.json a.json --prompts a.json --max-tokens 0": "--max-tokens 0: must be at least 1",
    "win-rate a.json a.json --prompts a.json --batch-size 0": "--batch-size 0: must be at least 1",
    "win-rate a.json a.json --prompts a.json --seed -1": "--seed -1: must be from 0",
    "win-rate a.json a.json --prompts a.json --seed 2147483647": "--seed 2147483647: must be from 0 to 2147483646",
    "win-rate a.json a.json --prompts a.json --engine vllm": "--engine vllm: both sides are files of answers",
    "win-rate a.json a.json --prompts a.json --vllm.python": "--vllm.python: needs a value",
    "win-rate a.json a.json --prompts a.json --dtype int8": "argument --dtype: invalid choice",
    "win-rate arena a.json --prompts a.json --judge.kind arena --device abacus": "--device = 'abacus'",
    "win-rate a.json a.json --prompts a.json --solver.beta 1": "--solver.beta: no such flag",
    "win-rate a.json a.json --prompts a.json --judge x": "--judge: no such flag",
    "win-rate a.json a.json --prompts a.json --promts x": "--promts: no such flag; did you mean --prompts?",
    "win-rate a.json a.json --prompts a.json --batchsize=3": "--batchsize: no such flag; did you mean --batch-size?",
    "win-rate a.json a.json --prompts a.json --juge.model x": "--juge.model: no such flag; did you mean --judge.model?",
    "win-rate a.json a.json --prompts a.json --json no/where.json": "--json no/where.json: there",
    "win-rate a.json a.json --prompts a.json --judge.kind arena --out a.json": "--out a.json: a.json is a file; name a folder",
    "win-rate a.json a.json --prompts broken.json --out a.json/b": "--out a.json/b: ",
    f"win-rate a.json a.json --prompts broken.json --json {'j' * 252}": f"--json {'j' * 252}: can't be written (File name too long)",
    f"win-rate a.json a.json --prompts a.json --judge.kind arena --out {'o' * 256}": f"--out {'o' * 256}: can't be written (File name too long)",
    f"alpaca --annotations broken.json --json {'j' * 252}": f"--json {'j' * 252}: can't be written",
    f"win-rate a.json a.json --prompts {'p' * 300}": f"--prompts {'p' * 300}: can't be read (File name too long)",
    f"win-rate {'m' * 300} a.json --prompts a.json": f"{'m' * 300}: no such folder",
    f"win-rate a.json {'b' * 300} --prompts a.json": f"{'b' * 300}: no such folder",
    f"win-rate {'m' * 300}.json a.json --prompts a.json": f"MODEL {'m' * 300}.json: can't be read (File name too long)",
    f"win-rate a.json a.json --prompts a.json --json {'j' * 300}/x.json": f"--json {'j' * 300}/x.json: there is no folder",
    f"win-rate a.json a.json --prompts a.json --judge.kind reward_model --judge.path {'m' * 300}": f"--judge.path = {'m' * 300}: no such folder",
    f"alpaca {'m' * 300}.json --baseline a.json": f"MODEL {'m' * 300}.json: can't be read (File name too long)",
    f"alpaca {'m' * 300} --baseline a.json": f"{'m' * 300}: no such folder",
    f"alpaca a.json --baseline {'b' * 300} --instructions a.json": f"{'b' * 300}: no such folder",
    f"harness {'m' * 300} --tasks ifeval": f"{'m' * 300}: no such folder",
    f"harness arena --tasks ifeval --include-path {'t' * 300}": f"--include-path {'t' * 300}: no such folder",
    f"table {'r' * 300}": f"{'r' * 300}: no such run or file of results",
    f"table r={'r' * 300}": f"{'r' * 300}: no such run or file of results",
    "alpaca": "MODEL: name the model to measure, or a file of annotations by --annotations",
    "alpaca --annotations nothere.json": "--annotations nothere.json: no such file",
    "alpaca --annotations empty.json": "--annotations empty.json: the file is empty",
    "alpaca --annotations folder": "--annotations folder: is a folder; name a JSON or JSONL file whose rows have the columns instruction, output_1,",
    "alpaca --annotations a.json": "a.json, row 1: has no column 'output_1'",
    "alpaca a.json --annotations a.json": "MODEL: is not used with --annotations",
    "alpaca --baseline b --annotations a.json": "--baseline: is not used with --annotations",
    "alpaca --out b --annotations a.json": "--out: is not used with --annotations",
    "alpaca --temperature 1 --annotations a.json": "--temperature: is not used with --annotations",
    "alpaca --batch-size 3 --annotations a.json": "--batch-size: is not used with --annotations",
    "alpaca --dry-run --annotations a.json": "--dry-run: is not used with --annotations",
    "alpaca --judge.kind local --annotations a.json": "--judge: is not used with --annotations",
    "alpaca a.json": "alpaca_eval_gpt4_baseline.json of tatsu-lab/alpaca_eval can't be had",
    "alpaca a.json --baseline a.json --instruction-difficulty nothere.csv": "--instruction-difficulty nothere.csv: no such file",
}  # fmt: skip


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_on_the_command_line_is_one_sentence(line, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    answers(tmp_path / "a.json", list("abcde"))
    (tmp_path / "empty.json").write_text("")
    (tmp_path / "keys.json").write_text('[{"key": "a", "text": "b"}]')
    (tmp_path / "folder").mkdir()
    assert refusal(capsys, *line.split()).startswith(MISTAKES[line])


@pytest.mark.skipif(sys.platform != "linux", reason="/proc, where nobody can write, is Linux's")
def test_a_folder_that_can_not_be_written_is_told_before_anything_is_read(capsys):
    said = refusal(capsys, *"win-rate a.json b.json --prompts no.json --out /proc/o".split())
    assert said.startswith("--out /proc/o: can't be written (")


def test_a_device_that_is_not_there_is_told_before_anything_is_answered(tmp_path, capsys):
    answers(tmp_path / "a.json", list("abcde"))
    command = ["win-rate", "arena", "a.json", "--prompts", "a.json", "--judge.kind", "arena"]
    assert main(["eval", *command, "--device", "abacus"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("lsp: --device = 'abacus': can't be used here")
    assert not (tmp_path / "evaluations").exists()


@pytest.mark.parametrize("measure", ["win-rate", "alpaca"])
def test_help_tells_judges_and_exit_codes(measure, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["eval", measure, "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    for word in (
        "--judge.base_url",
        "reward_model",
        "own-copy",
        "75 the endpoint is away",
        "3 a judge's",
    ):
        assert word in out
