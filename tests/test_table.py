"""`lsp eval table`: made-up results with literal figures, and real runs."""

from __future__ import annotations

import csv
import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from language_self_play import Config, self_play
from language_self_play.cli import main
from language_self_play.errors import ConfigError, InputFileError, RunFolderError
from language_self_play.evaluate.intervals import (
    bootstrap_interval,
    paired_bootstrap_p,
    wilson_interval,
)
from language_self_play.evaluate.outputs import SUBSETS
from language_self_play.evaluate.scores import (
    STRICT_WIN_RATE,
    WIN_RATE,
    read_measured,
    run_label,
    scores_of,
)
from language_self_play.evaluate.table import ALL, build_tables
from language_self_play.run_folder import RunFolder


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def answered(right: list[list[int]], name: str = "gsm8k") -> list[dict[str, Any]]:
    return [
        {"set": name, "id": str(i), "answers": [{"right": bool(r)} for r in row]}
        for i, row in enumerate(right)
    ]


def accuracy_file(file: str, right: list[list[int]], name: str = "gsm8k") -> str:
    report = {"set": name, "questions": answered(right, name)}
    Path(file).write_text(json.dumps(report))
    return file


PAIR = {"output_1": "x", "generator_1": "base", "output_2": "y", "generator_2": "mine"}


def annotations(
    file: str,
    preferences: list[float | None],
    datasets: Any,
    annotator: str = "judge",
    baseline: str = "base",
) -> str:
    pair = PAIR | {"annotator": annotator, "generator_1": baseline}
    rows = [
        {"instruction": f"do {i}", "preference": p, "dataset": d, **pair}
        for i, (p, d) in enumerate(zip(preferences, datasets, strict=True))
    ]
    text = json.dumps(rows).encode()
    Path(file).write_bytes(gzip.compress(text) if file.endswith(".gz") else text)
    return file


# ---------------------------------------------------------------- figures


def test_accuracies_are_compared_with_the_base_question_by_question():
    accuracy_file("base.json", [[0], [0], [1], [1]])
    accuracy_file("lsp.json", [[0], [1], [1], [1]])
    [table] = build_tables(["base=base.json", "LSP=lsp.json"])
    assert (table.measure, table.groups) == ("gsm8k, accuracy", [ALL])
    base, lsp = (row.cells[ALL] for row in table.rows)
    assert (base.n, base.mean, base.p, base.difference) == (4, 0.5, None, None)
    assert (lsp.mean, lsp.difference) == (0.75, 0.25)
    assert (lsp.mean, lsp.low, lsp.high) == wilson_interval([0, 1, 1, 1])
    assert (lsp.difference_low, lsp.difference_high) == bootstrap_interval([0, 1, 0, 0])
    assert lsp.p == paired_bootstrap_p([0, 1, 1, 1], [0, 0, 1, 1])


def test_questions_are_paired_by_name_whatever_their_order():
    accuracy_file("base.json", [[0], [1], [0], [1]])
    rows = answered([[0], [1], [0], [1]])[::-1]
    Path("lsp.json").write_text(json.dumps({"set": "gsm8k", "questions": rows}))
    [table] = build_tables(["base=base.json", "LSP=lsp.json"])
    # Every difference is 0; in the files' order none would be.
    lsp = table.rows[1].cells[ALL]
    assert (lsp.difference_low, lsp.difference_high, lsp.p) == (0.0, 0.0, 1.0)


def test_several_answers_give_pass_at_their_number_too():
    accuracy_file("a.json", [[0, 1], [0, 0], [1, 1]])
    measures = {t.measure: t.rows[0].cells[ALL].mean for t in build_tables(["a.json"])}
    # pass@1: (1/2 + 0 + 1) / 3; pass@2: 2 of 3.
    assert measures == {
        "gsm8k, accuracy": pytest.approx(0.5),
        "gsm8k, pass@2": pytest.approx(2 / 3),
    }


def test_win_rates_have_the_papers_subsets_and_the_papers_figures_beside_them(capsys: Any):
    datasets = ["vicuna", "koala", "vicuna", "koala"]
    annotations("copy.json.gz", [1.5, 1.5, 1.5, 1.5], datasets)
    annotations("lsp.json", [2, 1, 1.5, 1.0], datasets)
    table, strict = build_tables(["base=copy.json.gz", "LSP=lsp.json"])
    assert table.measure == f"AlpacaEval {WIN_RATE}"
    assert strict.measure == f"AlpacaEval {STRICT_WIN_RATE}"
    assert table.groups == ["koala", "vicuna", ALL]
    # 2, 1, 1.5 and 1 are wins of 1, 0, ½ and 0: vicuna (1 + ½) / 2, koala 0, all 1.5 / 4.
    means = {group: cell.mean for group, cell in table.rows[1].cells.items()}
    assert means == {"koala": 0.0, "vicuna": 0.75, ALL: 0.375}
    assert table.rows[1].paper == {}  # where ties are half a win, which is another quantity
    # Only the 2 is more than a tie: vicuna 1 of 2, all 1 of 4.
    means = {group: cell.mean for group, cell in strict.rows[1].cells.items()}
    assert means == {"koala": 0.0, "vicuna": 0.5, ALL: 0.25}
    assert strict.rows[1].paper == {("v1", ALL): 40.6, ("v1", "vicuna"): 46.3, ("v3", ALL): 36.4}
    assert strict.rows[0].paper == {("v3", ALL): 26.5}
    assert main(["eval", "table", "base=copy.json.gz", "LSP=lsp.json"]) == 0
    out = capsys.readouterr().out
    assert (
        "| model | koala | vicuna | all | Δ | p | paper v1 | paper v1, vicuna | paper v3 |" in out
    )
    assert re.search(r"\| LSP \| 0\.0 .* \| 40\.6 \| 46\.3 \| 36\.4 \|", out)


def test_ties_as_losses_are_counted_in_both_orders():
    rows = [
        {"instruction": "a", "preference": 1.5, "baseline_first": 1, "model_first": 2},
        {"instruction": "b", "preference": 1.75, "baseline_first": 1.5, "model_first": 2},
        {"instruction": "c", "preference": 2},
        {"instruction": "d", "preference": 1.5, "baseline_first": 1, "model_first": 2},
    ]
    Path("orders.jsonl").write_text("\n".join(json.dumps(row | PAIR) for row in rows))
    table, strict = build_tables(["orders.jsonl"])
    # ½ + ¾ + 1 + ½ of 4; one of two orders, one of two, 1, and one of two: 2½ of 4.
    assert table.rows[0].cells[ALL].mean == pytest.approx(0.6875)
    assert strict.rows[0].cells[ALL].mean == pytest.approx(0.625)


def test_win_rates_on_other_prompts_are_not_alpacaevals_and_no_figure_of_the_paper_stands_beside_them(
    capsys: Any,
):
    annotations("lsp.json", [2, 1], ["koala", "mine"])
    assert main(["eval", "table", "LSP=lsp.json"]) == 0
    out = capsys.readouterr().out
    assert "### win rate (2 questions)" in out
    assert "Alpaca" not in out
    assert "paper" not in out.lower()


def test_rows_of_several_baselines_are_told_and_not_tested_against_each_other(capsys: Any):
    annotations("base.json", [1.5, 1.5], ["koala"] * 2, baseline="./weak/ (own copy)")
    annotations("a.json", [2, 1.5], ["koala"] * 2, baseline="weak")
    annotations("b.json", [2, 1.5], ["koala"] * 2, baseline="strong")
    table, _ = build_tables(["base=base.json", "a.json", "b.json"])
    # The base's own copy is the base, by whichever name of its folder.
    assert [row.cells[ALL].difference for row in table.rows] == [None, 0.25, None]
    told = "Judged against several baselines: base, a against weak; b against strong."
    assert table.notes == [f"{told} Compare rows of the same one only."]
    assert main(["eval", "table", "base=base.json", "a.json", "b.json", "--write", "t.csv"]) == 0
    said = capsys.readouterr()
    assert said.out.count(told) == 2
    assert said.err == "t.csv: written\n"
    rows = csv.DictReader(Path("t.csv").read_text().splitlines())
    assert {(r["model"], r["baseline"]) for r in rows} == {
        ("base", "weak"), ("a", "weak"), ("b", "strong"),
    }  # fmt: skip
    one, _ = build_tables(["base=base.json", "a.json"])
    assert one.notes == []


def test_subsets_are_those_of_any_row(capsys: Any):
    annotations("plain.json", [2, 1, 1], [None] * 3)
    annotations("lsp.json", [2, 1, 1.5], ["koala", "vicuna", "koala"])
    table, _ = build_tables(["plain.json", "lsp.json"])
    assert table.groups == ["koala", "vicuna", ALL]
    # The first row has no subsets of its own: its 2 and 1 are koala's.
    assert [row.cells["koala"].mean for row in table.rows] == [0.5, 0.75]
    annotations("other.json", [2, 1, 1], ["vicuna", "vicuna", "koala"])
    with pytest.raises(
        InputFileError, match=r"other.json: 'do 0' is of 'vicuna', and of 'koala' in"
    ):
        build_tables(["lsp.json", "other.json"])


def test_the_folder_that_judging_left_stands_for_its_annotations(capsys: Any):
    Path("out").mkdir()
    annotations("out/annotations.json", [2, 1], ["koala"] * 2)
    Path("out/report.json").write_text('{"win_rate": 50.0}')
    [table, _] = build_tables(["out"])
    assert (table.rows[0].label, table.rows[0].cells[ALL].mean) == ("out", 0.5)
    assert main(["eval", "table", "out/report.json"]) == 2
    assert capsys.readouterr().err.endswith("no paired test; name out/annotations.json\n")


# ---------------------------------------------------------------- which questions are the same


def keyed(file: str, name: str, queries: list[str], right: list[int]) -> str:
    rows = [
        {"set": name, "id": str(i), "query": q, "key": "k", "answers": [{"right": bool(r)}]}
        for i, (q, r) in enumerate(zip(queries, right, strict=True), 1)
    ]
    Path(file).write_text(json.dumps({"set": name, "questions": rows}))
    return file


def test_one_set_under_two_names_is_one_table_which_says_so(capsys: Any):
    keyed("base.json", "gsm8k", ["a", "b"], [0, 1])
    keyed("lsp.json", "test", ["a", "b"], [1, 1])
    [table] = build_tables(["base=base.json", "lsp.json"])
    assert table.measure == "gsm8k, accuracy"
    assert [row.cells[ALL].mean for row in table.rows] == [0.5, 1.0]
    assert table.notes == ["test, accuracy of lsp.json has the same questions."]
    assert main(["eval", "table", "base=base.json", "lsp.json"]) == 0
    assert "test, accuracy of lsp.json has the same questions." in capsys.readouterr().out


def test_other_questions_under_the_same_names_are_not_compared():
    keyed("a.json", "test", ["a", "b"], [0, 1])
    keyed("b.json", "test", ["a", "c"], [1, 1])
    with pytest.raises(
        InputFileError, match=r"b.json: test, accuracy is .* '2' is the name of two"
    ):
        build_tables(["a.json", "b.json"])


def test_a_model_that_was_asked_the_same_questions_twice_has_two_tables():
    one, two = (json.loads(Path(keyed("a.json", n, ["a"], [1])).read_text()) for n in ("x", "y"))
    questions = one["questions"] + two["questions"]
    for name in ("a", "b"):
        Path(f"{name}.json").write_text(json.dumps({"questions": questions}))
    keyed("c.json", "z", ["a"], [1])
    tables = build_tables(["a.json", "b.json", "c.json"])
    assert [(t.measure, len(t.rows)) for t in tables] == [("x, accuracy", 3), ("y, accuracy", 2)]
    # Also where a row before it has one of its names, and the other comes first.
    Path("b.json").write_text(json.dumps({"questions": two["questions"] + one["questions"]}))
    keyed("c.json", "x", ["a"], [1])
    tables = build_tables(["c.json", "b.json"])
    assert [(t.measure, len(t.rows)) for t in tables] == [("x, accuracy", 2), ("y, accuracy", 1)]


def test_for_a_terminal_no_line_is_longer_than_80_columns():
    from io import StringIO

    from rich.console import Console

    from language_self_play.cli.eval_table import _print

    datasets = [*SUBSETS] * 20
    annotations("base.json", [1, 2] * 50, datasets)
    annotations("lsp.json", [2, 1.5, 1, 2] * 25, datasets)
    out = StringIO()
    _print(build_tables(["base=base.json", "LSP=lsp.json"]), Console(file=out, width=80))
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    assert max(map(len, lines)) <= 80
    assert re.search(
        r"^   LSP +62\.5 \[\S+, \S+\] +\+12\.5 \[\S+, \S+\] +0\.\d+$", "\n".join(lines), re.M
    )
    # The paper's figures are one line each, below the row of their name.
    [place] = [i for i, line in enumerate(lines) if re.fullmatch(r" +paper, v3 +36\.4", line)]
    assert re.match(r"   LSP  ", lines[place - 2])


def test_the_papers_win_rates_stand_beside_no_accuracy(capsys: Any):
    accuracy_file("a.json", [[1], [0]])
    assert main(["eval", "table", "LSP=a.json"]) == 0
    assert "paper" not in capsys.readouterr().out.lower()


def test_pairs_without_a_verdict_are_left_out_of_their_row_and_of_its_difference():
    annotations("base.json", [1, 2, 2, 1], ["koala"] * 4)
    annotations("a.json", [2, 1.5, None, float("nan")], ["koala"] * 4)
    table, _ = build_tables(["base=base.json", "a.json"])
    base, cell = (row.cells[ALL] for row in table.rows)
    # 0 1 1 0, and 1 ½: the differences of the two that both have are 1 and −½.
    assert (base.n, base.mean, cell.n, cell.mean, cell.difference) == (4, 0.5, 2, 0.75, 0.25)


def test_a_subset_without_any_verdict_is_an_empty_cell(capsys: Any):
    annotations("base.json", [1, 2], ["koala", "vicuna"])
    annotations("a.json", [2, None], ["koala", "vicuna"])
    assert main(["eval", "table", "base=base.json", "a.json"]) == 0
    assert re.search(r"\| a \| 100\.0 \S+ \S+ \|  \| 100\.0", capsys.readouterr().out)


def test_published_annotations_give_the_published_win_rate(test_data: Path):
    file = test_data / "data" / "alpaca_eval" / "annotations-OpenHermes-2.5-Mistral-7B.json.gz"
    table, _ = build_tables([str(file)])
    [row] = table.rows
    assert row.label == "annotations-OpenHermes-2.5-Mistral-7B"
    # leaderboard.csv: 10.340415705751552.
    assert row.cells[ALL].mean == pytest.approx(0.10340415705751552, rel=1e-9)
    sizes = {group: cell.n for group, cell in row.cells.items()}
    assert sizes == {
        "helpful_base": 129,
        "koala": 156,
        "oasst": 188,
        "selfinstruct": 252,
        "vicuna": 80,
        ALL: 805,
    }


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunFolder]:
    folder = tmp_path_factory.mktemp("runs")
    common: dict[str, Any] = {
        "steps": 2,
        "threads": 1,
        "log": {"progress": "none"},
        "eval": {"every": 1, "tasks": ["arena"]},
    }
    made = {
        name: self_play(Config.from_recipe(recipe, **common), folder / name)
        for name, recipe in (("grpo", "arena-grpo"), ("zero", "arena-zero"))
    }
    after = Config.from_recipe(
        "arena-zero", **common, policy={"path": str(made["grpo"].model_folder)}
    )
    return made | {"next": self_play(after, folder / "next")}


def test_runs_are_named_by_algorithm_and_what_they_began_with(runs: dict[str, RunFolder]):
    labels = {name: run_label(run) for name, run in runs.items()}
    assert labels == {"grpo": "GRPO", "zero": "LSP-Zero", "next": "GRPO then LSP-Zero"}


def test_the_base_is_version_0_of_the_first_run_that_began_with_no_other(runs: Any):
    # The later stage is named first, and its own version 0 is the GRPO run's end.
    tables = build_tables([str(runs[name].folder) for name in ("next", "grpo", "zero")])
    assert [t.measure for t in tables] == ["arena, sampled", "arena, greedy"]
    sampled = tables[0]
    assert [row.label for row in sampled.rows] == ["base", "GRPO then LSP-Zero", "GRPO", "LSP-Zero"]
    assert sampled.groups == ["easy", "medium", "hard", ALL]
    assert sampled.rows[0].source == f"{runs['grpo'].folder}, step 0"
    first = next(runs["grpo"].metrics())
    base = sampled.rows[0].cells
    for group, suffix in (("easy", "/easy"), ("hard", "/hard"), (ALL, "")):
        assert base[group].mean == pytest.approx(first[f"eval/sampled_accuracy{suffix}"])
    last = list(runs["next"].metrics())[-1]
    row = sampled.rows[1].cells[ALL]
    assert row.mean == pytest.approx(last["eval/sampled_accuracy"])
    change = last["eval/sampled_accuracy"] - first["eval/sampled_accuracy"]
    assert row.difference == pytest.approx(change)
    # The normal interval of 900 questions.
    assert row.high - row.mean == pytest.approx(last["eval/sampled_accuracy_ci95"], rel=0.1)


def test_a_subset_is_compared_with_the_base_s_answers_to_the_same_subset():
    subsets = ["koala", "vicuna", "koala", "vicuna", "koala"]
    base = annotations("base.json", [1.0, 2.0, 1.0, 1.0, 2.0], subsets)
    mine = annotations("mine.json", [1.0, 1.0, 2.0, 1.0, 2.0], subsets)
    cells = {t.measure: t.rows[1].cells for t in build_tables([f"base={base}", f"mine={mine}"])}
    of = cells[f"AlpacaEval {WIN_RATE}"]
    # koala: 0, 0, 1 before and 0, 1, 1 now; vicuna: 1, 0 and 0, 0.
    assert (of["koala"].n, of["vicuna"].n) == (3, 2)
    assert of["koala"].difference == pytest.approx(1 / 3)
    assert of["vicuna"].difference == pytest.approx(-1 / 2)
    assert of["koala"].p == paired_bootstrap_p([0, 1, 1], [0, 0, 1])
    assert of["vicuna"].p == paired_bootstrap_p([0, 0], [1, 0])
    low, high = bootstrap_interval([0, 1, 0])
    assert (of["koala"].difference_low, of["koala"].difference_high) == (low, high)


def test_pairs_of_a_run_without_a_verdict_were_asked_all_the_same():
    pairs = {"a": 2.0, "b": 1.0}
    asked = [{"set": "x", "id": i, "preference": p, "judge": "j"} for i, p in pairs.items()]
    [whole] = scores_of(asked, Path("run")).values()
    [less] = scores_of([asked[0], asked[1] | {"preference": None}], Path("run")).values()
    assert (whole.values, less.values) == ({"a": 1.0, "b": 0.0}, {"a": 1.0})
    assert less.asked == whole.asked
    assert less.judge == whole.judge == "j"


def test_a_base_that_is_named_is_the_base_wherever_it_stands(runs: Any):
    grpo, zero = (str(runs[name].folder) for name in ("grpo", "zero"))
    for arguments in ([f"base={zero}", grpo], [grpo, f"base={zero}"]):
        base, row = build_tables(arguments)[0].rows
        assert (base.label, base.source, row.label) == ("base", zero, "GRPO")


def test_the_table_is_written_as_markdown_csv_and_picture(runs: Any, capsys: Any):
    pytest.importorskip("matplotlib", reason="the extra plot is not installed")
    written = [arg for end in ("md", "csv", "png") for arg in ("--write", f"t.{end}")]
    grpo, zero = (str(runs[name].folder) for name in ("grpo", "zero"))
    assert main(["eval", "table", grpo, zero, *written]) == 0
    assert Path("t.md").read_text("utf-8") == capsys.readouterr().out
    rows = list(csv.DictReader(Path("t.csv").read_text("utf-8").splitlines()))
    # Two measures, three models, three tiers and all.
    assert len(rows) == 2 * 3 * 4
    [grpo_all] = [
        r
        for r in rows
        if (r["measure"], r["model"], r["group"]) == ("arena, sampled", "GRPO", "all")
    ]
    last = list(runs["grpo"].metrics())[-1]
    assert float(grpo_all["mean"]) == pytest.approx(last["eval/sampled_accuracy"])
    assert 0 < float(grpo_all["p"]) <= 1
    assert Path("t.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_run_and_the_file_of_its_evaluation_agree(runs: Any, capsys: Any):
    assert main(["eval", "accuracy", str(runs["grpo"].folder), "--json", "a.json"]) == 0
    capsys.readouterr()
    tables = build_tables([str(runs["grpo"].folder), "again=a.json"])
    for table in tables:
        one, again = (row.cells[ALL] for row in table.rows[1:])
        assert again.mean == pytest.approx(one.mean, rel=1e-5)
        assert again.n == one.n == 900


def test_a_run_that_has_not_finished_says_where_it_is(runs: Any, tmp_path: Path):
    import shutil

    copy = RunFolder(shutil.copytree(runs["zero"].folder, tmp_path / "copy"))
    copy.truncate(2)
    measured, _ = read_measured(str(copy.folder))
    assert measured.label == "LSP-Zero (step 1 of 2)"


def test_two_runs_of_one_kind_are_told_apart_by_their_folders(runs: Any, tmp_path: Path):
    import shutil

    shutil.copytree(runs["zero"].folder, tmp_path / "other")
    [table, _] = build_tables([str(runs["zero"].folder), "other"])
    assert table.rows[2].label == "LSP-Zero (other)"


# ---------------------------------------------------------------- what is refused


def bad_files() -> dict[str, tuple[Any, str]]:
    question, pair = answered([[1]])[0], PAIR | {"instruction": "x"}
    return {
        "empty": (b"", r"a.json: can't be read as JSON \(it is empty\)"),
        "no JSON": (b"{", r"a.json: can't be read as JSON"),
        "no text": (b"\xff\xfe", r"a.json: can't be read as JSON"),
        "something else": ({"x": 1}, r"a.json: holds no results question by question"),
        "an empty list": ([], r"a.json: holds no results question by question"),
        "figures without judgements": (
            {"win_rate": 50.0},
            r"a.json: holds a win rate, not its judgements, .* name the folder of answers and annotations"
            r" that `lsp eval win-rate` or `alpaca` told, or the file that --annotations named there",
        ),
        "no preference": ([pair], r"a.json, row 1: has no column 'preference'"),
        "a preference of 3": (
            [pair | {"preference": 3}],
            r"a.json, row 1: preference = 3; must be",
        ),
        "an instruction twice": ([pair | {"preference": 1}] * 2, r"a.json, row 2: repeats the"),
        "no verdict": (
            [pair | {"preference": None}],
            r"a.json: holds 1 row, and none with a preference",
        ),
        "a question twice": (
            {"set": "gsm8k", "questions": [question, question]},
            r"a.json: has question '0' of gsm8k twice",
        ),
        "no answers": (
            {"set": "gsm8k", "questions": [{"set": "gsm8k", "id": "1", "answers": []}]},
            r"a.json: question 1 has no score",
        ),
        "numbers for questions": ({"questions": [3]}, r"a.json: question 1 has no score"),
    }


@pytest.mark.parametrize("what", bad_files())
def test_a_bad_file_is_one_sentence_and_exit_code_2(what: str, capsys: Any):
    content, sentence = bad_files()[what]
    Path("a.json").write_bytes(
        content if isinstance(content, bytes) else json.dumps(content).encode()
    )
    assert main(["eval", "table", "LSP=a.json"]) == 2
    error = capsys.readouterr().err.rstrip()
    assert re.match(f"lsp: {sentence}", error), error
    assert "\n" not in error


def test_results_of_other_questions_are_not_compared():
    accuracy_file("a.json", [[1], [0]])
    accuracy_file("b.json", [[1], [0], [1]])
    sentence = (
        r"b.json: gsm8k, accuracy is of other questions than a.json's \(3 and 2, 2 in common\)"
    )
    with pytest.raises(InputFileError, match=sentence):
        build_tables(["a.json", "b.json"])


def test_verdicts_of_two_judges_are_not_compared():
    annotations("a.json", [1, 2], ["koala"] * 2)
    annotations("b.json", [1, 2], ["koala"] * 2, annotator="another")
    with pytest.raises(
        InputFileError, match=r"b.json: was judged by another, and a.json by judge;"
    ):
        build_tables(["a.json", "b.json"])


def test_folders_without_evaluations_are_refused(runs: Any, tmp_path: Path):
    with pytest.raises(RunFolderError, match="no run here"):
        build_tables([str(tmp_path)])
    import shutil

    copy = RunFolder(shutil.copytree(runs["zero"].folder, tmp_path / "copy"))
    (copy.evaluations_folder / "step-000000.jsonl").unlink()
    with pytest.raises(RunFolderError, match=r"has no evaluations/step-000000.jsonl"):
        build_tables([str(copy.folder)])
    shutil.rmtree(copy.evaluations_folder)
    with pytest.raises(RunFolderError, match="nothing was evaluated question by question"):
        build_tables([str(copy.folder)])
    with pytest.raises(InputFileError, match=r"^nowhere: no such run"):
        build_tables(["nowhere"])


def test_one_file_named_twice_is_refused():
    accuracy_file("a.json", [[1], [0]])
    with pytest.raises(ConfigError, match=r"^a.json: is named twice"):
        build_tables(["a.json", "a.json"])


def test_a_score_that_is_not_finite_is_named():
    row = {"set": "arena", "id": "1+1", "tier": "easy", "probability": None, "greedy": False}
    with pytest.raises(InputFileError, match=r"x: question 1 has no score; .*not finite"):
        scores_of([row], Path("x"))


@pytest.mark.parametrize(
    ("file", "sentence"),
    [
        ("t.pdf", "--write t.pdf: must end in .md, .csv, .png"),
        ("no/t.md", "--write no/t.md: there is no folder no"),
        ("d.md", "--write d.md: is a folder; name a file"),
        (f"{'t' * 250}.md", f"--write {'t' * 250}.md: can't be written (File name too long)"),
    ],
)
def test_a_file_that_can_not_be_written_is_named_before_anything_is_read(file, sentence, capsys):
    Path("d.md").mkdir()
    assert main(["eval", "table", "nowhere", "--write", file]) == 2
    assert capsys.readouterr().err == f"lsp: {sentence}\n"


@pytest.mark.parametrize("flag", [["--out", "t.md"], ["--json=t.json"]])
def test_a_flag_of_other_measures_is_answered_by_the_one_that_writes_a_table(flag, capsys):
    assert main(["eval", "table", "nowhere", *flag]) == 2
    said = capsys.readouterr().err
    assert (
        said == f"lsp: {flag[0][:6].strip('=')}: no such flag; a table is written by --write FILE\n"
    )


def test_a_mistyped_run_is_named_and_nothing_else(capsys):
    assert main(["eval", "table", "runs/lps"]) == 2
    assert capsys.readouterr().err == "lsp: runs/lps: no such run or file of results\n"


def test_a_picture_without_matplotlib_names_the_extra(monkeypatch: Any, capsys: Any):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["eval", "table", "nowhere", "--write", "t.png"]) == 2
    assert "pip install 'language-self-play[plot]'" in capsys.readouterr().err
