"""The run folder: plain files, appended to, cut back on resume, refused where they can't be used."""

from __future__ import annotations

import errno
import json
import math
import os

import pytest

from language_self_play.config import Config, Vllm
from language_self_play.durable import append_text, check_writable, remove_folder, replace_text
from language_self_play.errors import ConfigError, NonFiniteError, Paused, RunFolderError
from language_self_play.recipe_files import merge
from language_self_play.run_folder import (
    RunFolder,
    flatten,
    free_run_folder,
)

CONFIG = Config.from_table(
    {"seed": 7, "policy": {"path": "m"}, "reward": {"main": {"kind": "arena"}}}
)


@pytest.fixture
def run(tmp_path):
    folder = RunFolder(tmp_path / "runs" / "first")
    folder.create(CONFIG)
    return folder


def game(query: str, **more):
    return {"query": query, "answers": [{"text": "57", "reward": 1.0}], **more}


# ---------------------------------------------------------------- writing and reading


def test_a_new_folder_holds_its_configuration_and_places_for_games_and_checkpoints(run):
    names = sorted(path.name for path in run.folder.iterdir())
    assert names == ["checkpoints", "config.toml", "games"]
    assert Config.from_table(run.config()) == CONFIG


def test_records_are_appended_one_json_object_a_line_as_they_come(run):
    run.record({"step": 0, "reward/mean": 0.25}, [game("27+48"), game("été ∅")])
    run.record({"step": 1, "reward/mean": 0.5}, [])
    assert run.metrics_file.read_text("utf-8") == (
        '{"step": 0, "reward/mean": 0.25}\n{"step": 1, "reward/mean": 0.5}\n'
    )
    assert list(run.metrics()) == [
        {"step": 0, "reward/mean": 0.25},
        {"step": 1, "reward/mean": 0.5},
    ]
    file = run.folder / "games" / "step-000000.jsonl"
    assert [json.loads(line) for line in file.read_text("utf-8").split("\n")[:-1]] == run.games(0)
    assert [g["query"] for g in run.games(0)] == ["27+48", "été ∅"]


def test_a_step_without_games_has_no_games_file(run):
    run.record({"step": 3}, [])
    assert list(run.games_folder.iterdir()) == []
    assert run.games(3) == []


def test_a_run_without_records_has_no_metrics(run):
    assert list(run.metrics()) == []


@pytest.mark.parametrize(
    "separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\r", "\n"]
)
def test_games_survive_every_line_separator_that_a_model_may_write(run, separator):
    games = [game(f"one{separator}two"), game("three")]
    run.record({"step": 1}, games)
    assert run.games(1) == games


def test_an_event_has_its_time_kind_and_details_and_stays_out_of_the_metrics(run):
    run.event("started", step=0)
    [event] = map(json.loads, run.events_file.read_text("utf-8").splitlines())
    assert event.pop("time") > 1.7e9
    assert event == {"event": "started", "step": 0}
    assert not run.metrics_file.exists()


def test_an_unfinished_last_line_is_passed_over(run):
    run.record({"step": 0}, [])
    with run.metrics_file.open("a") as stream:
        stream.write('{"step": 1, "rew')
    assert list(run.metrics()) == [{"step": 0}]


def test_a_damaged_line_is_one_sentence_that_names_the_file(run):
    run.metrics_file.write_text('{"step": 0}\n{"step": 1, \n{"step": 2}\n')
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl"):
        list(run.metrics())


# ---------------------------------------------------------------- cutting back


def test_truncate_drops_the_records_and_games_of_the_step_and_later(run):
    for step in range(5):
        run.record({"step": step}, [game(f"{step}+0")])
    run.truncate(3)
    assert [record["step"] for record in run.metrics()] == [0, 1, 2]
    assert sorted(file.name for file in run.games_folder.iterdir()) == [
        "step-000000.jsonl",
        "step-000001.jsonl",
        "step-000002.jsonl",
    ]


def test_what_goes_on_after_truncate_reads_as_if_it_had_never_stopped(run, tmp_path):
    never_stopped = RunFolder(tmp_path / "second")
    never_stopped.create(CONFIG)
    for step in range(4):
        never_stopped.record({"step": step, "x": step / 3}, [game(f"{step}+0")])
    for step in range(3):
        run.record({"step": step, "x": step / 3}, [game(f"{step}+0")])
    with run.metrics_file.open("a") as stream:
        stream.write('{"step": 3, "x"')
    run.truncate(2)
    for step in (2, 3):
        run.record({"step": step, "x": step / 3}, [game(f"{step}+0")])
    assert run.metrics_file.read_bytes() == never_stopped.metrics_file.read_bytes()
    for file in never_stopped.games_folder.iterdir():
        assert (run.games_folder / file.name).read_bytes() == file.read_bytes()


def test_truncate_to_the_beginning_leaves_no_record(run):
    run.record({"step": 0}, [game("1+1")])
    run.truncate(0)
    assert list(run.metrics()) == []
    assert list(run.games_folder.iterdir()) == []


def test_truncate_does_not_read_past_the_step(run):
    run.record({"step": 0}, [])
    run.record({"step": 1}, [])
    with run.metrics_file.open("ab") as stream:
        stream.write(b"\0\0\n\xff\n[]\n")
    run.truncate(2)
    assert run.metrics_file.read_text() == '{"step": 0}\n{"step": 1}\n'


def test_a_damaged_record_before_the_step_is_left_out_with_a_warning_and_a_copy(run):
    before = '{"step": 0}\n{"step": 1, \n{"step": 2, "text": "é"}\n{"step": 3}\n'
    run.metrics_file.write_text(before)
    with pytest.warns(UserWarning, match=r"metrics\.jsonl: no record in line 2; going on without"):
        run.truncate(3)
    assert run.metrics_file.read_text() == '{"step": 0}\n{"step": 2, "text": "é"}\n'
    assert (run.folder / "metrics.damaged.jsonl").read_text() == before


# ---------------------------------------------------------------- disks that can't take it


def no_room(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_records_wait_in_memory_and_are_written_in_order(run, monkeypatch):
    run.record({"step": 0}, [])
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_room)
        with pytest.warns(UserWarning, match="each step") as warned:
            run.record({"step": 1}, [game("1+1")])
        run.record({"step": 2}, [game("2+2")])  # the reason is known
        assert [record["step"] for record in run.metrics()] == [0]
        assert run.games(1) == []
    assert [str(warning.message) for warning in warned] == [
        f"{run.games_folder / 'step-000001.jsonl'}: can't be written (No space left on device); the run goes on and tries"
        " again at each step; make room on its disk"
    ]
    run.record({"step": 3}, [])
    assert [record["step"] for record in run.metrics()] == [0, 1, 2, 3]
    assert [run.games(1), run.games(2)] == [[game("1+1")], [game("2+2")]]
    assert not list(run.games_folder.glob(".*"))


def test_another_disk_full_after_this_one_is_worth_another_warning(run, monkeypatch):
    for step in (0, 2):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", no_room)
            with pytest.warns(UserWarning, match="make room") as warned:
                run.record({"step": step}, [])
        assert len(warned) == 1
        run.record({"step": step + 1}, [])


def test_the_run_stops_resumably_once_too_many_records_wait(run, monkeypatch):
    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.warns(UserWarning, match="make room"):
        run.record({"step": 0}, [])
    for step in range(1, 20):
        run.record({"step": step}, [])
    with pytest.raises(Paused, match=r"0 steps are safe; make room on its disk, then go on with:"):
        run.record({"step": 20}, [])


def test_a_line_that_could_not_be_flushed_is_taken_back(tmp_path, monkeypatch):
    file = tmp_path / "lines"
    append_text(file, "one\n")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_room)
        with pytest.raises(OSError, match="No space left"):
            append_text(file, "two\n")
    assert file.read_text() == "one\n"
    append_text(file, "two\nthree\n")
    assert file.read_text() == "one\ntwo\nthree\n"


def test_half_a_line_that_was_left_is_cut_off_before_the_next(tmp_path):
    file = tmp_path / "lines"
    for torn, kept in (("one\nha", "one\n"), ("half", "")):
        file.write_text(torn)
        append_text(file, "next\n")
        assert file.read_text() == f"{kept}next\n"


def test_replace_text_that_could_not_be_flushed_takes_no_room(tmp_path, monkeypatch):
    file = tmp_path / "config.toml"
    replace_text(file, "old")
    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(OSError, match="No space left"):
        replace_text(file, "new")
    assert [path.name for path in tmp_path.iterdir()] == ["config.toml"]
    assert file.read_text() == "old"


def test_events_that_can_not_be_written_stop_nothing_and_come_with_the_next(run, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_room)
        run.event("first")
    run.event("second")
    kinds = [json.loads(line)["event"] for line in run.events_file.read_text().splitlines()]
    assert kinds == ["first", "second"]


# ---------------------------------------------------------------- numbers that are none


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_refused_by_its_key_and_step(run, value):
    with pytest.raises(NonFiniteError) as refused:
        run.record({"step": 3, "loss": 0.5, "kl/solver": value}, [])
    assert str(refused.value) == "step 3: kl/solver is not finite"
    assert list(run.metrics()) == []


def test_every_key_that_is_not_finite_is_named(run):
    with pytest.raises(NonFiniteError, match=r"^step 0: loss, grad_norm is not finite$"):
        run.record({"step": 0, "loss": math.nan, "x": 1.0, "grad_norm": math.inf}, [])


def test_a_game_that_is_not_finite_is_refused_and_not_written(run):
    with pytest.raises(NonFiniteError, match=r"^step 4: a game is not finite$"):
        run.record({"step": 4}, [{"step": 4, "answers": [{"reward": math.nan}]}])
    assert run.games(4) == []
    assert list(run.metrics()) == []


# ---------------------------------------------------------------- folders that can't be used


def test_a_used_folder_is_refused_with_both_ways_out(run):
    with pytest.raises(RunFolderError) as refused:
        run.refuse_if_used()
    assert str(refused.value) == (
        f"{run.folder}: already holds a run; go on with it by --resume {run.folder},"
        " or choose another folder by --run"
    )


def test_a_folder_with_records_but_no_configuration_is_used_too(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(RunFolderError, match="already holds a run"):
        RunFolder(tmp_path).refuse_if_used()


def test_a_missing_or_an_empty_folder_is_free(tmp_path):
    RunFolder(tmp_path / "nothere").refuse_if_used()
    RunFolder(tmp_path).refuse_if_used()


def test_a_folder_that_is_a_file_is_one_sentence(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(RunFolderError, match=r"taken.*: can't be written \(.+\)$"):
        RunFolder(tmp_path / "taken").create(CONFIG)


def test_a_folder_inside_a_file_is_one_sentence(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(RunFolderError, match=r"can't be written \(Not a directory\)$"):
        RunFolder(tmp_path / "taken" / "run").create(CONFIG)


def test_a_file_where_the_games_belong_is_one_sentence(run):
    remove_folder(run.games_folder)
    run.games_folder.write_text("")
    with pytest.raises(RunFolderError, match=r"can't be written \(Not a directory\)$"):
        run.record({"step": 0}, [game("1+1")])


def test_a_folder_where_the_metrics_belong_is_one_sentence(run):
    run.metrics_file.mkdir()
    with pytest.raises(RunFolderError) as refused:
        run.record({"step": 0}, [])
    assert str(refused.value) == f"{run.metrics_file}: can't be written (Is a directory)"


def test_a_folder_without_a_run_can_not_be_resumed(tmp_path):
    with pytest.raises(RunFolderError) as refused:
        RunFolder(tmp_path).resumed_config({})
    assert str(refused.value) == f"{tmp_path}: no run here (there is no config.toml)"


# ---------------------------------------------------------------- resuming


@pytest.mark.parametrize(
    ("overrides", "name", "value"),
    [
        ({"steps": 9}, "steps", 9),
        ({"eval": {"every": 3}}, "eval.every", 3),
        ({"checkpoint": {"every": 3}}, "checkpoint.every", 3),
        ({"checkpoint": {"keep_last": 3}}, "checkpoint.keep_last", 3),
        ({"checkpoint": {"keep_every": 3}}, "checkpoint.keep_every", 3),
        ({"log": {"progress": "none"}}, "log.progress", "none"),
        ({"device": "cpu"}, "device", "cpu"),
        ({"log": {"game_every_s": 0}}, "log.game_every_s", 0.0),
        ({"seed": 7}, "seed", 7),  # as it was
        ({}, "policy.path", "m"),
    ],
)
def test_a_resumed_run_may_change_how_long_it_runs_and_its_cadences(run, overrides, name, value):
    config = run.resumed_config(overrides)
    assert flatten(config.model_dump())[name] == value
    same = {k: v for k, v in flatten(config.model_dump()).items() if k != name}
    assert same == {k: v for k, v in flatten(CONFIG.model_dump()).items() if k != name}


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"seed": 8}, "seed = 8: was 7 when the run began"),
        ({"algorithm": "lsp-zero"}, "algorithm = 'lsp-zero': was 'lsp' when the run began"),
        ({"threads": 2}, "threads = 2: was None when the run began"),
        ({"policy": {"path": "n"}}, "policy.path = 'n': was 'm' when the run began"),
        ({"policy": {"chat_template_kwargs": {"x": 1}}}, "policy.chat_template_kwargs"),
        ({"learner": {"lr": 1e-4}}, "learner.lr = 0.0001: was None when the run began"),
        ({"solver": {"beta": 0}}, "solver.beta = 0.0: was 0.05 when the run began"),
        ({"eval": {"tasks": ["arena"]}}, "eval.tasks = ['arena']: was [] when the run began"),
        ({"reward": {"main": {"weight": 2}}}, "reward.main.weight = 2.0: was 1.0"),
        ({"reward": {"more": {"kind": "arena"}}}, "reward.more"),
        ({"self_reward": {"rubric": "arena"}}, "self_reward.rubric = 'arena': was 'default'"),
    ],
)
def test_a_resumed_run_may_change_nothing_else(run, overrides, sentence):
    with pytest.raises(ConfigError) as refused:
        run.resumed_config(overrides)
    assert str(refused.value).startswith(sentence)
    assert str(refused.value).endswith("; start a new run instead")


OWN_ENGINE = {"python": "p", "eager": True, "kv_cache_gib": 2.0, "memory_fraction": 0.7}
OWN_ENGINE |= {"devices": "1,2", "tensor_parallel": 2, "sleep": False}


def test_a_resumed_run_moves_to_a_server_and_back_without_what_belongs_to_the_other_engine(
    tmp_path,
):
    def with_vllm(**vllm):
        return {"rollout": {"engine": "vllm", "vllm": vllm}}

    table = CONFIG.model_dump(exclude_none=True)
    run = RunFolder(tmp_path / "run")
    run.create(Config.from_table(merge(table, with_vllm(**OWN_ENGINE, timeout_s=60.0))))
    assert run.resumed_config({}).rollout.vllm == Vllm(**OWN_ENGINE, timeout_s=60.0)
    moved = run.resumed_config(with_vllm(server="http://h:8000"))
    assert moved.rollout.vllm == Vllm(server="http://h:8000", timeout_s=60.0)
    run.write_config(moved)
    assert run.resumed_config({}).rollout.vllm == moved.rollout.vllm
    back = run.resumed_config(with_vllm(python="p"))
    assert back.rollout.vllm == Vllm(python="p", timeout_s=60.0)
    for name, value in OWN_ENGINE.items():  # what is asked for now is refused, not dropped
        with pytest.raises(ConfigError, match=rf"^rollout\.vllm\.{name}: is for an engine that"):
            run.resumed_config(with_vllm(server="http://h:8000", **{name: value}))


@pytest.mark.parametrize("text", ["rollout = 3", "[rollout]\nvllm = 3", "rollout = []"])
def test_a_damaged_section_of_a_runs_configuration_is_one_sentence(run, text):
    run.config_file.write_text(f'{text}\n[policy]\npath = "m"\n[reward.main]\nkind = "arena"\n')
    with pytest.raises(ConfigError, match=r"^rollout"):
        run.resumed_config({})


def test_a_changed_configuration_file_counts_as_how_the_run_began(run):
    run.write_config(CONFIG.model_copy(update={"seed": 8}))
    assert run.resumed_config({}).seed == 8


# ---------------------------------------------------------------- names and files


def test_free_run_folder_counts_up_from_two(tmp_path):
    assert free_run_folder("arena", tmp_path) == tmp_path / "arena"
    (tmp_path / "arena").mkdir()
    assert free_run_folder("arena", tmp_path) == tmp_path / "arena-2"
    (tmp_path / "arena-2").write_text("")
    assert free_run_folder("arena", tmp_path) == tmp_path / "arena-3"


def test_flatten_gives_dotted_names_and_keeps_empty_tables():
    assert flatten({"a": 1, "b": {"c": {"d": 2}, "e": {}}, "f": [1]}) == {
        "a": 1,
        "b.c.d": 2,
        "b.e": {},
        "f": [1],
    }


def test_replace_text_leaves_the_old_file_whole_if_it_fails(tmp_path):
    file = tmp_path / "config.toml"
    replace_text(file, "old")
    with pytest.raises(UnicodeEncodeError):
        replace_text(file, "new \ud800")
    assert file.read_text() == "old"
    replace_text(file, "new")
    assert file.read_text() == "new"


def test_replace_text_leaves_nothing_beside_the_file(tmp_path):
    replace_text(tmp_path / "config.toml", "text")
    assert [file.name for file in tmp_path.iterdir()] == ["config.toml"]


def test_looking_whether_a_file_can_be_written_takes_away_no_other_process_half_written_file(
    tmp_path,
):
    beside = tmp_path / ".report.json.new"
    beside.write_text("half of a rep")
    check_writable(tmp_path / "report.json")
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {
        beside.name: "half of a rep"
    }
    with pytest.raises(OSError, match="too long"):
        check_writable(tmp_path / ("x" * 251))
    check_writable(tmp_path / ("x" * 250))


def test_a_folder_whose_name_is_too_long_is_a_sentence(tmp_path):
    run = RunFolder(tmp_path / ("x" * 300))
    with pytest.raises(RunFolderError, match="too long"):
        run.create(CONFIG)
    with pytest.raises(RunFolderError, match="no run here"):
        run.config()
