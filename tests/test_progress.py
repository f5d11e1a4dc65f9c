"""Watching a run: the words, the plain lines, the live bar, and the summary at the end."""

from __future__ import annotations

import io
import re
from types import SimpleNamespace

import pytest
from rich.console import Console

from language_self_play import progress
from language_self_play.cli import main
from language_self_play.config import Config
from language_self_play.evaluate.pair_report import win_rate_metrics
from language_self_play.evaluate.win_rate import win_rate_interval
from language_self_play.progress import (
    LiveBar,
    PlainLines,
    Silent,
    build_progress,
    choose_game,
    game_line,
    headline,
    in_lines,
    printable,
    time_line,
    two_answers,
)
from language_self_play.recipe_files import recipe_names
from language_self_play.run_folder import RunFolder
from language_self_play.summary import accuracy_table, print_summary, three_games

CONFIG = Config.from_table(
    {"steps": 10, "policy": {"path": "m"}, "reward": {"main": {"kind": "arena"}}}
)


def game(query: str, *rewards: float, quality: float = 3.5, texts: str = "57"):
    return {
        "query": query,
        "answers": [{"text": texts, "reward": r, "quality": quality} for r in rewards],
    }


# ---------------------------------------------------------------- words


def test_the_headline_holds_the_numbers_that_matter_in_a_fixed_order():
    record = {
        "step": 3,
        "reward/mean": 0.416,
        "quality/mean": 0.5,
        "kl/challenger": 0.1234,
        "kl/solver": 0.0056,
        "queries/valid_fraction": 0.96875,
        "queries/unsolvable_fraction": 0.0625,
        "eval/sampled_accuracy": 0.4567,
        "loss": 9.9,
    }
    assert headline(record) == (
        "held-out 45.7%  V̄ 0.42  V_Q 0.50  KL 0.006/0.123  valid 97%  unsolvable 6%"
    )


def test_the_time_line_says_where_a_steps_time_went_and_leaves_out_what_took_none():
    record = {
        "step": 3,
        "time/step_s": 2.0,
        "time/sample_challenger_s": 0.2,
        "time/sample_solver_s": 0.5,
        "time/reward_s": 0.001,
        "time/learn_s": 1.2,
        "time/other_s": 0.099,
        "time/tokens_per_s": 12345.6,
        "memory/peak_gib": 0.75,
    }
    # 0.2 / 2 = 10 %, 0.5 / 2 = 25 %, 1.2 / 2 = 60 %, 0.099 / 2 = 5 %; the reward's 0.05 % is left out.
    assert time_line(record) == (
        "2 s a step: pose 10%, answer 25%, learn 60%, other 5%  12,346 tokens/s  0.75 GiB"
    )
    assert time_line({"step": 3}) == ""


def test_the_headline_leaves_out_what_was_not_measured():
    assert headline({"step": 3, "reward/mean": 1.0, "kl/solver": 0.5}) == "V̄ 1.00  KL 0.500"
    assert headline({"step": 3}) == ""


def test_the_game_worth_showing_is_the_first_whose_answers_differ_in_reward():
    unanswered, same, differ, later = game("a"), game("b", 1, 1), game("c", 0, 1), game("d", 1, 0)
    assert choose_game([unanswered, same, differ, later]) is differ
    assert choose_game([unanswered, same]) is same
    assert choose_game([unanswered]) is None
    assert choose_game([]) is None


def test_of_many_answers_the_best_and_the_worst_are_shown():
    answers = [{"text": t, "reward": r} for t, r in (("a", 0.5), ("b", 2.0), ("c", -1.0), ("d", 1))]
    assert [a["text"] for a in two_answers({"answers": answers})] == ["b", "c"]
    assert [a["text"] for a in two_answers({"answers": answers[:1]})] == ["a"]


def test_a_game_is_one_line_with_its_answers_scores_and_value():
    # V = (1 + 0 + 0 + 0) / 4
    assert game_line(game("27+48", 0, 1, 0, 0)) == (
        "27+48  →  57 (R 1, R_Q 3.50)  |  57 (R 0, R_Q 3.50)   V 0.25"
    )
    assert game_line(game("1+1", -0.5, quality=0)) == "1+1  →  57 (R -0.5, R_Q 0.00)   V -0.50"


def test_a_game_without_a_judge_shows_no_quality():
    played = {"1+1": game("1+1", 1, 0, quality=0)}
    shown = "1+1  →  57 (R 1)  |  57 (R 0)   V 0.50"
    assert game_line(played["1+1"], judged=False) == shown
    out = io.StringIO()
    lines = PlainLines(10, 0, 5.0, out=out)
    lines.step({"step": 0, "reward/mean": 0.5}, [played["1+1"]])
    assert shown in out.getvalue()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("27+48", "27+48"),
        ("", "∅"),
        ("été 中 🎲", "été 中 🎲"),
        ("a\nb\tc\rd", r"a\nb\tc\rd"),
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("\x9b2J\x08\x7f\x00", r"\x9b2J\x08\x7f\x00"),
        ("right\u202eleft", r"right\u202eleft"),  # reverses the reading direction
        ("zero\u200bwidth\u2028", r"zero\u200bwidth\u2028"),
        ("\ud800", r"\ud800"),
        ("[red]bold[/red]", "[red]bold[/red]"),
        ("x" * 60, "x" * 60),
        ("x" * 61, "x" * 59 + "…"),
        ("\x1b" * 60, r"\x1b" * 14 + r"\x1" + "…"),
    ],
)
def test_printable_escapes_what_could_steer_a_terminal_and_cuts_at_60(text, shown):
    assert printable(text) == shown
    assert len(shown) <= 60
    assert shown.isprintable()


# ---------------------------------------------------------------- which watcher


@pytest.mark.parametrize(
    ("asked", "terminal", "kind"),
    [
        ("auto", True, LiveBar),
        ("auto", False, PlainLines),
        ("bar", False, LiveBar),
        ("plain", True, PlainLines),
        ("none", True, Silent),
    ],
)
def test_a_bar_is_for_terminals_and_lines_are_for_logs(asked, terminal, kind, monkeypatch):
    stdout = io.StringIO()
    stdout.isatty = lambda: terminal
    monkeypatch.setattr("sys.stdout", stdout)
    config = CONFIG.model_copy(update={"log": CONFIG.log.model_copy(update={"progress": asked})})
    assert type(build_progress(config, 0)) is kind


def test_silence_prints_nothing(capsys):
    with Silent() as watcher:
        watcher.step({"step": 0, "reward/mean": 0.5}, [game("1+1", 1, 0)])
    assert capsys.readouterr().out == ""


# ---------------------------------------------------------------- plain lines


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(s=100.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now.s))
    return now


def test_plain_lines_show_step_time_left_numbers_and_a_game(clock):
    out = io.StringIO()
    watcher = PlainLines(steps=10, start=0, every_s=5.0, out=out)
    clock.s += 20
    watcher.step({"step": 0, "reward/mean": 0.5, "quality/mean": 3}, [game("27+48", 1, 0)])
    # One step took 20 s, so the other nine will take 180 s.
    assert out.getvalue() == (
        "step 1/10  3:00 left  V̄ 0.50  V_Q 3.00\n"
        "    27+48  →  57 (R 1, R_Q 3.50)  |  57 (R 0, R_Q 3.50)   V 0.50\n"
    )


def test_plain_lines_wait_between_lines_but_never_miss_the_last_step(clock):
    out = io.StringIO()
    watcher = PlainLines(steps=10, start=0, every_s=5.0, out=out)
    for step in range(10):
        clock.s += 2
        watcher.step({"step": step}, [])
    shown = re.findall(r"step (\d+)/10", out.getvalue())
    # Steps end every 2 s; the first is shown, then the first that ends 5 s later, and the last.
    assert shown == ["1", "4", "7", "10"]


def test_plain_lines_measure_speed_from_where_a_resumed_run_began(clock):
    out = io.StringIO()
    watcher = PlainLines(steps=3700, start=90, every_s=5.0, out=out)
    clock.s += 4
    watcher.step({"step": 91}, [])
    # Two steps in 4 s; 3700 - 92 = 3608 steps are left, 7216 s.
    assert out.getvalue() == "step 92/3700  2:00:16 left\n"


def test_plain_lines_keep_the_last_evaluation_in_sight_with_its_version(clock):
    out = io.StringIO()
    watcher = PlainLines(steps=10, start=0, every_s=1.0, out=out)
    watcher.step({"step": 0, "reward/mean": 0.5, "eval/sampled_accuracy": 0.25}, [])
    clock.s += 9
    watcher.step({"step": 1, "reward/mean": 0.75}, [])
    assert out.getvalue().splitlines()[1].endswith("held-out 25.0% (version 0)  V̄ 0.75")


def test_plain_lines_show_no_games_if_none_are_wanted(clock):
    out = io.StringIO()
    PlainLines(steps=10, start=0, every_s=0.0, out=out).step({"step": 0}, [game("1+1", 1, 0)])
    assert len(out.getvalue().splitlines()) == 1


def test_plain_lines_end_with_the_evaluation_after_the_last_step(clock):
    out = io.StringIO()
    watcher = PlainLines(steps=10, start=0, every_s=5.0, out=out)
    watcher.step({"step": 9, "reward/mean": 0.5}, [])
    watcher.step({"step": 10, "eval/sampled_accuracy": 0.5}, [])
    ending = f"step 10/10  V̄ 0.50\n{progress.ENDING}\n"
    assert out.getvalue() == ending + "step 10/10  held-out 50.0%  V̄ 0.50\n"


# ---------------------------------------------------------------- live bar


def play_with_a_bar(*games, every_s=1e-9, width=200, record=None):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=width, color_system=None)
    with LiveBar(steps=10, start=0, every_s=every_s, console=console) as bar:
        for step, shown in enumerate(games):
            bar.step(
                {"step": step, "reward/mean": 0.25, "quality/mean": 0.5} | (record or {}), [shown]
            )
    return out.getvalue()


def test_the_live_bar_shows_steps_and_numbers_and_a_game_on_80_columns():
    numbers = {
        "eval/sampled_accuracy": 0.457,
        "quality/mean": 0.5,
        "kl/solver": 0.006,
        "kl/challenger": 0.123,
        "queries/valid_fraction": 0.97,
        "queries/unsolvable_fraction": 0.06,
    }
    games = game("27+48", 1, 0), game("3+4", 1, 0)
    lines = play_with_a_bar(*games, width=80, record=numbers).splitlines()
    assert any("27+48  →  57 (R 1, R_Q 3.50)  |  57 (R 0, R_Q 3.50)   V 0.50" in s for s in lines)
    bar = [i for i, line in enumerate(lines) if "2/10" in line][-1]
    assert "step" in lines[bar]
    assert lines[bar].rstrip().endswith("left")
    below = "held-out 45.7%  V̄ 0.25  V_Q 0.50  KL 0.006/0.123  valid 97%  unsolvable 6%"
    assert below in lines[bar + 1]


def test_below_the_live_bar_no_part_is_broken_where_a_line_is_too_short_for_all():
    numbers = {
        "eval/sampled_accuracy": 0.873,
        "eval/gsm8k/accuracy": 0.4,
        "eval/mine/win_rate": 0.52,
        "kl/solver": 0.006,
        "kl/challenger": 0.123,
        "queries/valid_fraction": 0.97,
        "queries/unsolvable_fraction": 0.16,
        "time/step_s": 10.0,
        **{f"time/{part}_s": 1.0 for part in progress.PARTS},
        "time/tokens_per_s": 12345.0,
        "memory/peak_gib": 10.75,
    }
    lines = play_with_a_bar(game("27+48", 1, 0), every_s=0.0, width=80, record=numbers).splitlines()
    bar = [i for i, line in enumerate(lines) if "1/10" in line][-1]
    assert [line.rstrip() for line in lines[bar + 1 : bar + 5]] == [
        "held-out 87.3%  gsm8k 40.0%  mine win rate 52.0%  V̄ 0.25  V_Q 0.50",
        "KL 0.006/0.123  valid 97%  unsolvable 16%",
        "10 s a step: pose 10%, answer 10%, reward 10%, judge 10%, learn 10%, sync 10%,",
        "eval 10%, save 10%, other 10%  12,345 tokens/s  10.75 GiB",
    ]
    lines = in_lines("mine win rate 52.0%  held-out 87.3%", 26)
    assert lines == ["mine win rate 52.0%", "held-out 87.3%"]  # "held-" would fit, too


def test_the_live_bars_shares_of_time_are_of_its_newest_step():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=200, color_system=None)
    with LiveBar(steps=10, start=0, every_s=0.0, console=console) as bar:
        bar.step({"step": 0, "time/step_s": 6.0, "time/learn_s": 1.0, "time/eval_s": 5.0}, [])
        bar.step({"step": 1, "time/step_s": 2.0, "time/learn_s": 1.0}, [])
    last = [line for line in out.getvalue().splitlines() if "a step:" in line][-1]
    assert "learn 50%" in last
    assert "eval" not in last  # 5 s of the step before would be 250 %


def test_the_live_bar_says_of_which_version_an_older_evaluation_is():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=200, color_system=None)
    with LiveBar(steps=10, start=0, every_s=0.0, console=console) as bar:
        bar.step({"step": 0, "eval/m/win_rate": 0.5, "eval/m/equal_answers": 1.0}, [])
        bar.step({"step": 1, "eval/m/win_rate": 0.625, "eval/m/equal_answers": 0.0}, [])
        bar.step({"step": 2}, [])
    assert "\nm win rate 62.5% (+12.5, version 1)\n" in out.getvalue()


def test_the_live_bar_shows_markup_and_emoji_names_as_they_were_written():
    out = play_with_a_bar(game("[red]boo[/red] :smile: [/x]", 1, 0, texts="[bold]57"))
    assert "[red]boo[/red] :smile: [/x]  →  [bold]57 (R 1, R_Q 3.50)" in out


def test_the_live_bar_lets_no_control_character_of_a_model_through():
    out = play_with_a_bar(game("\x1b]0;owned\x07\x1b[2J", 1, 0, texts="a\rb\x9b31m"))
    assert r"\x1b]0;owned\x07\x1b[2J  →  a\rb\x9b31m" in out
    assert "\x1b]0;" not in out
    assert not {"\x07", "\x9b"} & set(out)


def test_the_live_bar_keeps_a_game_on_one_line():
    out = play_with_a_bar(game("q" * 60, 1, 0, texts="a" * 60), width=80)
    lines = [line for line in out.splitlines() if "qqq" in line]
    assert len(lines) == 1
    assert lines[0].rstrip().endswith("…")


@pytest.mark.parametrize("every_s", [0.0, 1000.0])
def test_the_live_bar_shows_games_only_as_often_as_asked(every_s):
    out = play_with_a_bar(game("27+48", 1, 0), game("3+4", 1, 0), every_s=every_s)
    assert "→" not in out
    assert "2/10" in out


def test_the_live_bar_of_a_resumed_run_begins_where_the_run_was():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=200, color_system=None)
    with LiveBar(steps=10, start=6, every_s=0.0, console=console):
        pass
    assert "6/10" in out.getvalue()


def test_the_live_bar_says_what_it_waits_for_when_all_steps_are_played_and_not_after():
    console = Console(file=io.StringIO(), force_terminal=True, width=200, color_system=None)

    def below(bar: LiveBar) -> list[str]:
        return [str(part) for part in bar._view().renderables[1:]]

    with LiveBar(steps=2, start=0, every_s=0.0, console=console) as bar:
        bar.step({"step": 0}, [])
        assert progress.ENDING not in below(bar)
        bar.step({"step": 1}, [])
        assert progress.ENDING in below(bar)
        bar.step({"step": 2, "eval/sampled_accuracy": 0.5}, [])
        assert progress.ENDING not in below(bar)
        bar.step({"step": 1}, [])
    assert progress.ENDING not in below(bar)  # it has ended, without an evaluation


def test_the_live_bar_does_not_count_the_evaluation_after_the_last_step():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=200, color_system=None)
    with LiveBar(steps=2, start=0, every_s=0.0, console=console) as bar:
        for step in range(3):
            bar.step({"step": step}, [])
    assert "2/2" in out.getvalue()
    assert "3/2" not in out.getvalue()


# ---------------------------------------------------------------- summary


def evaluation(step: int, sampled: float, greedy: float, *tiers: str):
    record = {"step": step}
    for suffix in ("", *(f"/{tier}" for tier in tiers)):
        record[f"eval/sampled_accuracy{suffix}"] = sampled
        record[f"eval/sampled_accuracy_ci95{suffix}"] = 0.021
        record[f"eval/greedy_accuracy{suffix}"] = greedy
        record[f"eval/greedy_accuracy_ci95{suffix}"] = 0.032
    return record


def numbers(text: str, tier: str) -> list[str]:
    """The cells of the accuracy table's row."""
    [row] = [line for line in text.splitlines() if re.match(rf"\W*{tier}\b.*±", line)]
    return re.findall(r"[\d.]+ ± [\d.]+|[-+][\d.]+", row)


def test_the_accuracy_table_compares_before_and_after_tier_by_tier():
    before, after = evaluation(0, 0.25, 0.5, "easy", "hard"), evaluation(9, 0.375, 0.4444, "easy")
    after |= {f"{k}/hard": v for k, v in evaluation(9, 0.125, 1.0).items() if k != "step"}
    out = io.StringIO()
    Console(file=out, width=80).print(accuracy_table(before, after))
    row = ["25.0 ± 2.1", "37.5 ± 2.1", "+12.5", "50.0 ± 3.2", "44.4 ± 3.2", "-5.6"]
    assert numbers(out.getvalue(), "easy") == numbers(out.getvalue(), "all") == row
    assert numbers(out.getvalue(), "hard") == [
        *["25.0 ± 2.1", "12.5 ± 2.1", "-12.5"],
        *["50.0 ± 3.2", "100.0 ± 3.2", "+50.0"],
    ]
    assert "medium" not in out.getvalue()


@pytest.fixture
def finished_run(tmp_path):
    def make(name: str = "first") -> RunFolder:
        run = RunFolder(tmp_path / name)
        run.create(CONFIG)
        run.record({"step": 0, **evaluation(0, 0.25, 0.5, "easy")}, [game("9+9", 0, 0)])
        games = [game(f"1+{i}", i, i) for i in (3, 0, 2, 1)] + [game("unanswered")]
        run.record({"step": 1}, games)
        run.record({"step": 2, **evaluation(2, 0.5, 0.75, "easy")}, [])
        return run

    return make


def summary(run: RunFolder, width: int = 120) -> str:
    out = io.StringIO()
    print_summary(run, Console(file=out, width=width))
    return out.getvalue()


def test_the_summary_compares_the_first_evaluation_with_the_last(finished_run):
    assert numbers(summary(finished_run()), "all")[:3] == ["25.0 ± 2.1", "50.0 ± 2.1", "+25.0"]


def pairs(*preferences):
    """A win rate's records; what ties has equal answers."""
    return [
        {
            "set": "m",
            "id": f"q{i}",
            "answer": "same" if preference == 1.5 else "other",
            "baseline": "same",
            "tokens": 1,
            "finish_reason": "stop",
            "judge": "j",
            "preference": preference,
        }
        for i, preference in enumerate(preferences)
    ]


def test_the_summary_states_a_win_rate_as_lsp_eval_does_and_says_what_was_not_judged(
    tmp_path, capsys
):
    def record(step, *preferences):
        questions = pairs(*preferences)
        run.record({"step": step, **win_rate_metrics("m", questions)}, [], questions)

    run = RunFolder(tmp_path / "r")
    run.create(CONFIG)
    record(0, *[1.5] * 6)
    record(4, 2.0, 2.0, 1.0, 1.5, None, 2.0)
    low, high = win_rate_interval([2.0, 2.0, 1.0, 1.5, 2.0])
    stated = f"70.0 [{low:.1f}, {high:.1f}]"
    said = (
        "m win rate in %: 50.0 at step 0 (6 of 6 pairs equal, not asked),"
        f" {stated} at step 4 (1 of 6 pairs equal, not asked; 1 without a verdict), +20.0"
    )
    assert f"\n{said}\n" in summary(run, width=400)
    assert main(["eval", "table", str(run.folder)]) == 0
    assert stated in capsys.readouterr().out
    record(6, *[None] * 6)
    assert f"\n{said}, no verdict at step 6\n" in summary(run, width=400)


def test_the_summary_says_of_a_win_rate_that_no_later_step_had_a_verdict(tmp_path):
    run = RunFolder(tmp_path / "r")
    run.create(CONFIG)
    for step, preference in ((0, 1.5), (5, None)):
        questions = pairs(preference)
        run.record({"step": step, **win_rate_metrics("m", questions)}, [], questions)
    assert "m win rate in %: 50.0 at step 0 (1 of 1 pair equal, not asked), no verdict" in (
        summary(run, width=400)
    )


def test_the_summary_reads_each_evaluation_once_and_does_without_a_damaged_one(
    tmp_path, monkeypatch
):
    run = RunFolder(tmp_path / "r")
    run.create(CONFIG)
    for step, *preferences in ((0, *[1.5] * 4), (5, 2.0, 2.0, 1.0, 1.5)):
        questions = [q | {"set": name} for name in "ab" for q in pairs(*preferences)]
        metrics = {k: v for name in "ab" for k, v in win_rate_metrics(name, questions[:4]).items()}
        run.record({"step": step, **metrics}, [], questions)
    read = []
    evaluation = RunFolder.evaluation
    monkeypatch.setattr(RunFolder, "evaluation", lambda r, s: read.append(s) or evaluation(r, s))
    whole = summary(run, width=400)
    assert sorted(read) == [0, 5]
    half = 100 * list(run.metrics())[-1]["eval/a/win_rate_ci95"]
    file = run.evaluations_folder / "step-000005.jsonl"
    for damaged in (file.read_bytes()[:-9], b"\xff\n", b"7\n"):
        file.write_bytes(damaged)
        for name in "ab":
            first = f"{name} win rate in %: 50.0 at step 0 (4 of 4 pairs equal, not asked), 62.5"
            assert f"{first} [" in whole
            assert f"\n{first} ± {half:.1f} at step 5, +12.5\n" in summary(run, width=400)


def test_the_three_games_are_the_easiest_the_middle_and_the_hardest_of_the_last_step(finished_run):
    run = finished_run()
    shown = three_games(run, list(run.metrics()))
    # By value: 3, 2, 1, 0; the middle one of four is the third.
    assert [g["query"] for g in shown] == ["1+3", "1+1", "1+0"]
    text = summary(run)
    assert text.index("1+3  →") < text.index("1+1  →") < text.index("1+0  →")


def test_one_game_is_shown_once(tmp_path):
    run = RunFolder(tmp_path)
    run.create(CONFIG)
    run.record({"step": 0}, [game("1+1", 1)])
    assert len(three_games(run, list(run.metrics()))) == 1


def test_a_run_without_games_or_evaluations_still_says_where_it_is(tmp_path):
    run = RunFolder(tmp_path / "r")
    run.create(CONFIG)
    run.record({"step": 0}, [])
    text = summary(run, width=400)
    assert f"The run is in {tmp_path / 'r'}: " in text
    assert "±" not in text


@pytest.mark.parametrize("name", ["[red]x", "[/red]", "a:smile:b", "with space"])
def test_the_summary_names_the_folder_as_it_is_whatever_its_name(finished_run, name):
    run = finished_run(name)
    quoted = f"'{run.folder}'" if name != "a:smile:b" else str(run.folder)
    text = summary(run, width=400)
    assert f"The run is in {quoted}: " in text
    assert f"    lsp play {quoted}\n" in text
    assert f"    lsp train --resume {quoted} --steps 20\n" in text  # twice its own 10


def test_the_commands_of_the_summary_can_be_copied_from_a_narrow_terminal(finished_run):
    run = finished_run("a-folder-with-a-name-that-is-longer-than-half-a-line-of-a-terminal")
    lines = summary(run, width=80).splitlines()
    for command in ("lsp play", "lsp train --resume"):
        assert any(f"{command} {run.folder}" in line for line in lines), command


def test_what_the_summary_suggests_next_exists(tmp_path):
    from language_self_play.cli import COMMANDS

    run = RunFolder(tmp_path)
    run.create(CONFIG)
    run.record({"step": 0}, [game("1+1", 1) | {"tier": "easy", "unsolvable": None}])
    text = summary(run, width=400)
    assert "lsp eval accuracy" in text
    assert set(re.findall(r"lsp (\w+)", text)) <= set(COMMANDS)
    assert set(re.findall(r"lsp train ([a-z]\S*)", text)) <= set(recipe_names())


def test_the_summary_shows_what_models_wrote_literally(tmp_path):
    run = RunFolder(tmp_path)
    run.create(CONFIG)
    run.record({"step": 0}, [game("[red]\x1b[2J", 1, texts="[/]")])
    assert r"[red]\x1b[2J  →  [/] (R 1)" in summary(run)
