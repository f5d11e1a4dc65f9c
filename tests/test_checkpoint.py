"""Checkpoints: whole or absent, told when damaged, and the run that is resumed is the one it was.

Real runs are killed with SIGKILL, and real disks are full or read-only.
"""

from __future__ import annotations

import errno
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from language_self_play import durable, run_folder, self_play
from language_self_play.checkpoint import (
    checksums,
    damage,
    load_checkpoint,
    save_checkpoint,
)
from language_self_play.config import Checkpoint
from language_self_play.errors import Paused, RunFolderError
from language_self_play.optimizer import Optimizer
from language_self_play.policy import load_policy
from language_self_play.progress import Silent
from language_self_play.run_folder import RunFolder
from test_train import assert_same_run, events, small

EVERY_STEP = {"checkpoint": {"every": 1, "keep_last": 9}}
FILES = [
    *["SHA256SUMS", "model/chat_template.jinja", "model/config.json"],
    *["model/generation_config.json", "model/model.safetensors", "model/tokenizer.json"],
    *["model/tokenizer_config.json", "optimizer.safetensors", "state.json"],
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> RunFolder:
    """4 steps, never stopped, with a checkpoint of each."""
    return self_play(small(**EVERY_STEP), tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture
def copy(whole, tmp_path) -> RunFolder:
    """The same run, to be damaged."""
    return RunFolder(shutil.copytree(whole.folder, tmp_path / "copy"))


@pytest.fixture(scope="module")
def trained():
    """A policy and its optimizer, to be restored."""
    config = small(**EVERY_STEP)
    policy = load_policy(config, torch.device("cpu"))
    return policy, Optimizer(policy.model, config.learner)


def place(run: RunFolder, step: int) -> Path:
    return run.checkpoints_folder / f"step-{step:06d}"


def names(run: RunFolder) -> list[str]:
    return sorted(path.name for path in run.checkpoints_folder.iterdir())


def resume(run: RunFolder, **overrides) -> RunFolder:
    return self_play(run.resumed_config(overrides), run.folder, resume=True)


class At(Silent):
    """Calls what belongs to a step once that step has been recorded, before its checkpoint."""

    def __init__(self, calls: dict[int, Callable[[], object]]):
        self.calls = calls

    def step(self, record, games):
        self.calls.get(record["step"], lambda: None)()


# ---------------------------------------------------------------- what a checkpoint is


def test_a_checkpoint_is_these_files_and_no_pickle(whole):
    folder = place(whole, 4)
    files = (path for path in folder.rglob("*") if path.is_file())
    assert sorted(path.relative_to(folder).as_posix() for path in files) == FILES
    assert json.loads((folder / "state.json").read_text()).keys() == {"step", "reference_hash"}


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="sha256sum is not installed")
def test_its_checksums_are_those_of_sha256sum(whole):
    command = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    done = subprocess.run(command, cwd=place(whole, 4), capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"{name}: OK" for name in FILES if name != "SHA256SUMS"]


def test_the_newest_are_kept_and_those_of_keep_every(tmp_path):
    config = small(steps=5, checkpoint={"every": 1, "keep_last": 1, "keep_every": 2})
    run = self_play(config, tmp_path / "run")
    assert names(run) == ["step-000002", "step-000004", "step-000005"]
    resume(run, steps=6, checkpoint={"keep_every": 4, "keep_last": 2})
    assert names(run) == ["step-000004", "step-000005", "step-000006"]


def test_every_file_is_flushed_before_the_rename_and_the_name_after_it(
    trained, tmp_path, monkeypatch
):
    run = RunFolder(tmp_path / "run")
    run.create(small())
    done: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def told_fsync(number):
        done.append(("flush", os.readlink(f"/proc/self/fd/{number}")))
        fsync(number)

    def told_replace(old, new):
        done.append(("rename", str(new)))
        replace(old, new)

    monkeypatch.setattr(durable.os, "fsync", told_fsync)
    monkeypatch.setattr(durable.os, "replace", told_replace)
    save_checkpoint(run, *trained, 7, Checkpoint())
    beside = run.checkpoints_folder / ".step-000007.new"
    rename = done.index(("rename", str(place(run, 7))))
    flushed = {path for kind, path in done[:rename] if kind == "flush"}
    assert flushed == {str(beside), str(beside / "model"), *(str(beside / name) for name in FILES)}
    assert done[rename + 1 :] == [("flush", str(run.checkpoints_folder))]
    done.clear()
    run.record({"step": 0}, [{"step": 0, "query": "1+1"}])
    run.record({"step": 1}, [{"step": 1, "query": "1+2"}])
    games, metrics = str(run.games_folder), str(run.metrics_file)
    written = [
        ("flush", f"{games}/.step-000000.jsonl.new"),
        ("rename", f"{games}/step-000000.jsonl"),
    ]
    written += [("flush", games), ("flush", metrics), ("flush", str(run.folder))]
    # From the second step on three flushes each: games, their folder, metrics.
    written += [
        ("flush", f"{games}/.step-000001.jsonl.new"),
        ("rename", f"{games}/step-000001.jsonl"),
    ]
    written += [("flush", games), ("flush", metrics)]
    assert done == written


def test_a_checkpoint_that_is_there_and_whole_is_not_written_again(copy, trained):
    before = (place(copy, 4) / "state.json").stat().st_ino
    save_checkpoint(copy, *trained, 4, Checkpoint(keep_last=9))
    assert (place(copy, 4) / "state.json").stat().st_ino == before
    (place(copy, 4) / "state.json").write_text("{}")
    save_checkpoint(copy, *trained, 4, Checkpoint(keep_last=9))
    assert damage(place(copy, 4)) is None


def test_folders_of_other_names_are_no_checkpoints(copy, trained):
    for name in ("step-best", "step-000009.bak", "damaged-step-000008"):
        (copy.checkpoints_folder / name).mkdir()
    (copy.checkpoints_folder / "step-000010").write_text("")
    assert copy.checkpoints()[-1] == place(copy, 4)
    assert load_checkpoint(copy, *trained) == 4


def test_checkpoints_are_ordered_by_number_not_by_name(tmp_path):
    run = RunFolder(tmp_path)
    for step in (1_000_000, 999_999, 2):
        (place(run, step) / "model").mkdir(parents=True)
    assert [p.name for p in run.checkpoints()] == ["step-000002", "step-999999", "step-1000000"]
    assert run.newest_model() == place(run, 1_000_000) / "model"


def test_no_checkpoint_skips_a_step_that_could_not_be_recorded(trained, tmp_path, monkeypatch):
    run = RunFolder(tmp_path / "run")
    run.create(small())
    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "append_text", no_room)
        with pytest.warns(UserWarning, match="each step"):
            run.record({"step": 0}, [])
        with pytest.raises(RunFolderError, match=r"can't be written \(No space left on device\)$"):
            save_checkpoint(run, *trained, 1, Checkpoint())
    assert names(run) == []
    save_checkpoint(run, *trained, 1, Checkpoint())
    assert names(run) == ["step-000001"]
    assert list(run.metrics()) == [{"step": 0}]


def no_room(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# ---------------------------------------------------------------- damage


def remove(file: Path) -> None:
    file.unlink()


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def empty(file: Path) -> None:
    os.truncate(file, 0)


def zero(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def flip_a_bit(file: Path) -> None:
    contents = bytearray(file.read_bytes())
    position = random.Random(file.name).randrange(len(contents))
    contents[position] ^= 1 << position % 8
    file.write_bytes(contents)


def make_it_a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize("how", [remove, truncate, empty, zero, flip_a_bit, make_it_a_folder])
@pytest.mark.parametrize("name", FILES)
def test_damage_to_any_file_in_any_way_is_told_and_the_one_before_is_used(name, how, copy, trained):
    how(place(copy, 4) / name)
    policy, optimizer = trained
    # A flipped bit of the checksums may be in another file's.
    blamed = ".*" if (name, how) == ("SHA256SUMS", flip_a_bit) else f"{name}: .*"
    told = (
        rf"/step-000004: damaged, {blamed}; going on from step-000003, and it is now damaged-step"
    )
    with pytest.warns(UserWarning, match=told) as warned:
        assert load_checkpoint(copy, policy, optimizer) == 3
    assert len(warned) == 1
    assert names(copy) == ["damaged-step-000004", "step-000001", "step-000002", "step-000003"]
    [event] = [e for e in events(copy) if e["event"] == "damaged"]
    assert (event["checkpoint"], event["moved_to"]) == ("step-000004", "damaged-step-000004")
    expected = load_file(place(copy, 3) / "optimizer.safetensors")
    assert optimizer.state().keys() == expected.keys()
    assert all(torch.equal(optimizer.state()[key], expected[key]) for key in expected)


def test_no_flipped_bit_of_the_checksums_goes_unseen(tmp_path):
    for name in ("model.bin", "state.json"):
        (tmp_path / name).write_text(name)
    right = checksums(tmp_path).encode()
    assert len(right) == 2 * (64 + 2 + 10 + 1) - 1
    # Every bit but most of those of the digests, each of which is like the first.
    told = [i for i, byte in enumerate(right) if i < 3 or chr(byte) not in "0123456789abcdef"]
    for position, bit in itertools.product(told, range(8)):
        flipped = bytearray(right)
        flipped[position] ^= 1 << bit
        (tmp_path / "SHA256SUMS").write_bytes(flipped)
        assert damage(tmp_path) is not None, (position, bit)
    (tmp_path / "SHA256SUMS").write_bytes(right)
    assert damage(tmp_path) is None


@pytest.mark.parametrize("name", ["model/adapter_config.json", "model/pytorch_model.bin", "notes"])
def test_a_file_that_was_not_written_with_it_is_damage_unless_hidden(name, copy):
    (place(copy, 4) / "model" / ".DS_Store").write_text("")
    assert damage(place(copy, 4)) is None
    (place(copy, 4) / name).write_text("{}")
    assert damage(place(copy, 4)) == f"{name}: not among its checksums"


def test_a_pickle_in_place_of_the_weights_is_never_loaded(copy, trained):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(copy.folder / "executed"),))

    model = place(copy, 4) / "model"
    (model / "model.safetensors").unlink()
    torch.save(Bomb(), model / "pytorch_model.bin")
    with pytest.warns(UserWarning, match="step-000004: damaged, model/model.safetensors: missing"):
        assert load_checkpoint(copy, *trained) == 3
    # Not even where its checksums agree, as whoever can write them can make them.
    (model := place(copy, 3) / "model").joinpath("model.safetensors").unlink()
    torch.save(Bomb(), model / "pytorch_model.bin")
    (place(copy, 3) / "SHA256SUMS").write_text(checksums(place(copy, 3)))
    with pytest.raises(ValueError, match=r"step-000003/model.*can't be loaded.*safetensors"):
        load_checkpoint(copy, *trained)
    assert not (copy.folder / "executed").exists()


def test_a_run_goes_on_from_the_last_whole_checkpoint_to_the_same_end(copy, whole):
    flip_a_bit(place(copy, 4) / "optimizer.safetensors")
    truncate(place(copy, 3) / "model/model.safetensors")
    with pytest.warns(UserWarning, match="damaged, ") as warned:
        resume(copy)
    assert len(warned) == 2
    assert_same_run(whole, copy)
    assert names(copy) == [
        *["damaged-step-000003", "damaged-step-000004"],
        *(f"step-{step:06d}" for step in (1, 2, 3, 4)),
    ]
    assert [e["step"] for e in events(copy) if e["event"] == "resumed"] == [2]
    # And once more: what has been set aside is not overwritten.
    empty(place(copy, 4) / "state.json")
    with pytest.warns(UserWarning, match="it is now damaged-step-000004-2"):
        resume(copy)
    assert_same_run(whole, copy)


def test_no_whole_checkpoint_is_one_sentence_and_nothing_is_touched(copy, trained):
    for step in (1, 2, 3, 4):
        empty(place(copy, step) / "state.json")
    before = names(copy)
    with pytest.raises(RunFolderError) as refused:
        load_checkpoint(copy, *trained)
    listed = "; ".join(
        f"step-00000{step}: state.json: its checksum is another" for step in (4, 3, 2, 1)
    )
    assert str(refused.value) == (
        f"{copy.checkpoints_folder}: no checkpoint is whole ({listed}); put back a copy of one, or"
        " move them away to play from the beginning"
    )
    assert names(copy) == before


def test_records_past_the_checkpoint_may_be_torn_damaged_or_missing(copy, whole):
    shutil.rmtree(place(copy, 4))
    shutil.rmtree(place(copy, 3))
    lines = copy.metrics_file.read_bytes().splitlines(keepends=True)
    copy.metrics_file.write_bytes(b"".join(lines[:2]) + b"\0" * 90 + b"\n" + lines[3][:20])
    (copy.games_folder / "step-000002.jsonl").unlink()
    (copy.games_folder / "step-000003.jsonl").write_bytes(b"\xff\0{")
    (copy.games_folder / ".step-000003.jsonl.new").write_bytes(b"")
    for step in (3, 7):  # by processes that were killed
        (copy.checkpoints_folder / f".step-{step:06d}.new" / "model").mkdir(parents=True)
    resume(copy)
    (copy.games_folder / ".step-000003.jsonl.new").unlink(missing_ok=True)
    assert_same_run(whole, copy)
    assert names(copy) == names(whole)


# ---------------------------------------------------------------- longer than it was


@pytest.mark.slow
def test_a_finished_run_that_is_given_more_steps_is_a_run_of_that_length(tmp_path):
    settings = {
        "policy": {"lora": {"rank": 4}},
        "eval": {"every": 4, "tasks": ["arena"]},
        "checkpoint": {"every": 2},
    }
    longer = self_play(small("arena-zero", **settings), tmp_path / "longer")
    run = self_play(small("arena-zero", **settings, steps=3), tmp_path / "run")
    assert "eval/sampled_accuracy" in list(run.metrics())[3]  # of the earlier end, not of a step 3
    assert run.adapter_folder.is_dir()
    assert run.model_folder.is_dir()
    there: list[bool] = []
    look = At({3: lambda: there.extend(p.exists() for p in (run.model_folder, run.adapter_folder))})
    self_play(run.resumed_config({"steps": 4}), run.folder, resume=True, progress=look)
    assert there == [False, False]  # of the earlier end
    assert_same_run(longer, run)
    weights = "adapter_model.safetensors"
    one, other = ((r.adapter_folder / weights).read_bytes() for r in (longer, run))
    assert one == other


# ---------------------------------------------------------------- killed


def die_at(number: int, folder: Path) -> None:
    """Play, and be killed just before the `number`-th flush or rename."""
    torch.set_num_threads(1)
    count = 0

    def counted(call):
        def counting(*arguments):
            nonlocal count
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            return call(*arguments)

        return counting

    os.fsync, os.replace = counted(os.fsync), counted(os.replace)
    self_play(small(**EVERY_STEP), folder)


def hang_in_checkpoint(step: int, folder: Path) -> None:
    """Play, and never finish writing the checkpoint of `step`."""
    torch.set_num_threads(1)
    state = Optimizer.state

    def slow(self):
        if (folder / "checkpoints" / f".step-{step:06d}.new").is_dir():
            time.sleep(600)
        return state(self)

    Optimizer.state = slow
    self_play(small(**EVERY_STEP), folder)


@pytest.fixture(scope="module")
def start():
    """start(function, argument, folder): in a process of its own, forked where torch is loaded."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_checkpoint", "language_self_play.train"])

    def start(function, *arguments):
        process = context.Process(target=function, args=arguments)
        process.start()
        return process

    return start


def go_on(folder: Path) -> RunFolder:
    """Resume what was killed; if it was killed before there was a run, begin it."""
    run = RunFolder(folder)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if run.config_file.exists():
            resume(run)
        else:
            self_play(small(**EVERY_STEP), folder)
    assert any("has gone without a word" in str(warning.message) for warning in told)
    return run


@pytest.mark.slow
def test_a_run_killed_at_any_moment_goes_on_to_the_same_end(start, whole, tmp_path):
    # Once before there is a run, then anywhere: before the n-th flush or rename of about a hundred.
    for number in [1, *random.Random(1).sample(range(3, 90), 5)]:
        folder = tmp_path / f"killed-{number}"
        process = start(die_at, number, folder)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        run = go_on(folder)
        assert_same_run(whole, run)
        assert names(run) == names(whole), number
        assert all(damage(place) is None for place in run.checkpoints())


@pytest.mark.slow
def test_a_run_killed_while_it_writes_a_checkpoint_goes_on_from_the_one_before(
    start, whole, tmp_path
):
    process = start(hang_in_checkpoint, 3, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    deadline = time.monotonic() + 60
    while not (run.checkpoints_folder / ".step-000003.new" / "model").is_dir():
        assert time.monotonic() < deadline, "the run did not come to its checkpoint"
        time.sleep(0.001)
    process.kill()
    process.join()
    assert ".step-000003.new" in names(run)
    go_on(run.folder)
    assert [e["step"] for e in events(run) if e["event"] == "resumed"] == [2]
    assert names(run) == names(whole)
    assert_same_run(whole, run)


@pytest.mark.slow
def test_a_run_that_is_played_can_not_be_resumed_beside_it(start, whole, tmp_path):
    process = start(hang_in_checkpoint, 3, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    deadline = time.monotonic() + 60
    while ".step-000003.new" not in (names(run) if run.checkpoints_folder.is_dir() else []):
        assert time.monotonic() < deadline, "the run did not come to its checkpoint"
        time.sleep(0.01)
    try:
        before = run.metrics_file.read_bytes()
        with pytest.raises(RunFolderError, match=f"process {process.pid} on .* plays this run"):
            resume(run)
        assert run.metrics_file.read_bytes() == before
        assert names(run) == [".step-000003.new", "step-000001", "step-000002"]
    finally:
        process.kill()
        process.join()


# ---------------------------------------------------------------- disks that can't take it


def fill(disk: Path) -> None:
    """Take all room that is left."""
    with (disk / "filler").open("wb", buffering=0) as stream, suppress(OSError):
        while True:
            stream.write(b"x" * 4096)
    assert os.statvfs(disk).f_bavail == 0


def room(disk: Path) -> None:
    (disk / "filler").unlink()


def read_only(disk: Path) -> None:
    # Over itself, because a file system with a file that is written to can't be made read-only.
    run = str(disk / "run")
    subprocess.run(["mount", "--bind", run, run], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", run], check=True)


def writable(disk: Path) -> None:
    subprocess.run(["umount", str(disk / "run")], check=True)


LARGE = 128 * 2**20


@pytest.mark.parametrize(
    ("close", "reopen", "what", "advice"),
    [
        (fill, room, "No space left on device", "make room on its disk"),
        (read_only, writable, "Read-only file system", "make its file system writable"),
    ],
)
def test_a_run_plays_on_while_the_disk_is_closed_and_loses_nothing(
    close, reopen, what, advice, make_disk, whole
):
    disk = make_disk(LARGE)
    closed = At({0: lambda: close(disk), 2: lambda: reopen(disk)})
    with pytest.warns(UserWarning, match="can't be written") as warned:
        run = self_play(small(**EVERY_STEP), disk / "run", progress=closed)
    # Closed for checkpoints 1 and 2 and for the records of steps 1 and 2: one warning of each kind.
    first, second = (str(warning.message) for warning in warned)
    assert first == (
        f"{place(run, 1)}: can't be written ({what}); the run goes on and tries again at its next"
        f" checkpoint; {advice}"
    )
    assert f"can't be written ({what}); the run goes on and tries again at each step" in second
    assert_same_run(whole, run)
    assert names(run) == ["step-000003", "step-000004"]
    told = [e["what"] for e in events(run) if e["event"] == "unwritten"]
    assert told == ["checkpoint", "records", "checkpoint", "records"]


def test_a_run_whose_records_can_not_be_written_stops_and_can_be_resumed(
    make_disk, whole, monkeypatch
):
    monkeypatch.setattr(run_folder, "UNWRITTEN_STEPS", 1)
    disk = make_disk(LARGE)
    closed = At({0: lambda: fill(disk)})
    with (
        pytest.warns(UserWarning, match="can't be written"),
        pytest.raises(Paused, match="No space left on device") as paused,
    ):
        self_play(small(steps=9, **EVERY_STEP), disk / "run", progress=closed)
    run = RunFolder(disk / "run")
    assert paused.value.exit_code == 75
    assert str(paused.value).endswith(
        f"; 0 steps are safe; make room on its disk, then go on with: lsp train --resume {run.folder}"
    )
    # Steps 1 and 2 were played and wait; a third would have been one too many.
    assert [r["step"] for r in run.metrics()] == [0]
    room(disk)
    resume(run, steps=4)
    assert_same_run(whole, run)


def test_a_run_that_can_not_write_its_last_checkpoint_keeps_the_one_before(make_disk, whole):
    disk = make_disk(LARGE)
    closed = At({3: lambda: fill(disk)})
    with pytest.raises(Paused, match=r"3 steps are safe; make room on its disk, then go on with"):
        self_play(small(**EVERY_STEP), disk / "run", progress=closed)
    run = RunFolder(disk / "run")
    assert names(run) == ["step-000001", "step-000002", "step-000003"]
    assert [damage(place) for place in run.checkpoints()] == [None, None, None]
    room(disk)
    resume(run)
    assert_same_run(whole, run)
    paused = [e for e in events(run) if e["event"] == "paused"]
    assert [(e["step"], "No space left" in e["reason"]) for e in paused] == [(3, True)]


def test_a_model_that_can_not_be_written_at_the_end_pauses_with_all_steps_safe(make_disk, whole):
    disk = make_disk(LARGE)
    config = small(**EVERY_STEP, eval={"every": 9, "tasks": ["arena"]})
    closed = At({4: lambda: fill(disk)})
    with pytest.raises(
        Paused, match=r"run/model: can't be written .*; 4 steps are safe; make room"
    ):
        self_play(config, disk / "run", progress=closed)
    run = RunFolder(disk / "run")
    assert not run.model_folder.exists()
    room(disk)
    resume(run)
    weights = "model.safetensors"
    assert (run.model_folder / weights).read_bytes() == (whole.model_folder / weights).read_bytes()


def size_of(folder: Path) -> int:
    return sum(-(-p.stat().st_size // 4096) * 4096 for p in folder.rglob("*") if p.is_file())


def test_a_superseded_checkpoint_makes_room_only_where_another_stays(make_disk, whole):
    one = size_of(place(whole, 4))
    # Room for two checkpoints and a half: the older of two goes before the third is written.
    disk = make_disk(int(2.5 * one))
    keep_two = {"checkpoint": {"every": 1, "keep_last": 2}}
    model = {4: lambda: shutil.rmtree(disk / "run/checkpoints/step-000003")}
    config = small(**keep_two, eval={"every": 9, "tasks": ["arena"]})
    run = self_play(config, disk / "run", progress=At(model))
    assert names(run) == ["step-000004"]
    # Room for one and a half: the only one stays, and no other is written.
    disk = make_disk(int(1.5 * one))
    with (
        pytest.warns(UserWarning, match="step-000002: can't be written"),
        pytest.raises(Paused, match="1 steps are safe"),
    ):
        self_play(small(checkpoint={"every": 1, "keep_last": 1}), disk / "run")
    run = RunFolder(disk / "run")
    assert names(run) == ["step-000001"]
    assert damage(place(run, 1)) is None


def test_no_room_is_made_where_the_one_that_stays_is_damaged(copy, trained, monkeypatch):
    monkeypatch.setattr("language_self_play.checkpoint.make_folder", no_room)
    shutil.rmtree(place(copy, 1))
    shutil.rmtree(place(copy, 2))
    flip_a_bit(place(copy, 4) / "state.json")
    with pytest.raises(RunFolderError, match=r"step-000005: can't be written \(No space left"):
        save_checkpoint(copy, *trained, 5, Checkpoint(keep_last=2))
    assert names(copy) == ["step-000003", "step-000004"]


@pytest.mark.parametrize("number", [errno.EDQUOT, errno.EIO, errno.EACCES, errno.ESTALE])
def test_whatever_else_the_file_system_says_for_a_while_costs_nothing(
    number, whole, tmp_path, monkeypatch
):
    fsync = os.fsync

    def fails(descriptor):
        raise OSError(number, os.strerror(number))

    broken = At(
        {
            0: lambda: monkeypatch.setattr(durable.os, "fsync", fails),
            2: lambda: monkeypatch.setattr(durable.os, "fsync", fsync),
        }
    )
    with pytest.warns(UserWarning, match="can't be written") as warned:
        run = self_play(small(**EVERY_STEP), tmp_path / "run", progress=broken)
    assert len(warned) == 2
    for warning in warned:
        assert os.strerror(number) in str(warning.message)
        assert str(warning.message).endswith(durable.PASSING[number])
    assert_same_run(whole, run)
    assert names(run) == ["step-000003", "step-000004"]
    assert list(run.folder.rglob(".*")) == []
