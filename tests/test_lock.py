"""One writer for a run: real processes that hold, die, race and fork; lock files left by others."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

import language_self_play.lock as lock_module
from language_self_play.errors import RunFolderError
from language_self_play.lock import BOOT_ID, Holder, RunLock
from language_self_play.run_folder import RunFolder

HERE = socket.gethostname()
needs_proc = pytest.mark.skipif(not BOOT_ID.is_file(), reason="processes are read from /proc")

HOLD = """
import sys, time
from pathlib import Path
from language_self_play.lock import RunLock
with RunLock(Path(sys.argv[1])) as lock:
    lock.take()
    print("held", flush=True)
    time.sleep(60)
"""


def python(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.fixture
def holder(tmp_path):
    """A process that holds the run in tmp_path."""
    process = python(HOLD, str(tmp_path))
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def leave_lock(folder: Path, **changes: object) -> dict:
    """A lock file as this process would have left it, with `changes`."""
    me = Holder.this_process()
    table = asdict(me) | changes
    (folder / "run.lock").write_text(json.dumps(table) + "\n")
    return table


def no_locks(*_: object) -> None:
    """flock, as some network file systems have it."""
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def take(folder: Path, take_over: bool = False) -> None:
    with RunLock(folder, take_over) as lock:
        lock.take()
        assert json.loads(lock.file.read_text())["pid"] == os.getpid()


def refusal(folder: Path, take_over: bool = False) -> str:
    with RunLock(folder, take_over) as lock, pytest.raises(RunFolderError) as refused:
        lock.take()
    return str(refused.value)


# ---------------------------------------------------------------- held and let go


def test_a_held_run_names_host_pid_and_start_and_lets_go_without_a_trace(tmp_path):
    with RunLock(tmp_path / "new" / "run") as lock:
        assert not lock.file.exists()
        lock.take()
        held = json.loads(lock.file.read_text())
        assert (held["host"], held["pid"]) == (HERE, os.getpid())
        if BOOT_ID.is_file():
            fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
            assert held["started"] == int(fields[19])
    assert list(lock.file.parent.iterdir()) == []
    take(lock.file.parent)


def test_an_error_lets_go_too(tmp_path):
    def fail() -> None:
        with RunLock(tmp_path) as lock:
            lock.take()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert list(tmp_path.iterdir()) == []
    take(tmp_path)


def test_a_look_refuses_as_taking_does_and_leaves_no_trace(holder, tmp_path):
    before = (tmp_path / "run.lock").read_bytes()
    with pytest.raises(RunFolderError) as seen:
        RunLock(tmp_path).refuse_if_held()
    assert str(seen.value) == refusal(tmp_path)
    assert (tmp_path / "run.lock").read_bytes() == before
    RunLock(tmp_path / "nowhere").refuse_if_held()
    assert not (tmp_path / "nowhere").exists()


@needs_proc
def test_a_look_passes_over_a_holder_that_has_gone(tmp_path):
    leave_lock(tmp_path, pid=2**22 + 1, started=1)
    RunLock(tmp_path).refuse_if_held()
    with pytest.warns(UserWarning, match="has gone without a word"):
        take(tmp_path)


def test_a_run_in_use_is_refused_before_torch_is_imported(holder, tmp_path, make_config):
    RunFolder(tmp_path).write_config(make_config())
    (tmp_path / "checkpoints").mkdir()
    code = (
        "import sys; sys.modules['torch'] = None; from language_self_play.cli import main;"
        " sys.exit(main(['train', '--resume', sys.argv[1]]))"
    )
    process = python(code, str(tmp_path))
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert f"process {holder.pid} on {HERE} plays this run" in err


def test_a_second_process_is_refused_by_one_sentence_with_host_and_pid(holder, tmp_path):
    before = (tmp_path / "run.lock").read_bytes()
    assert refusal(tmp_path) == (
        f"{tmp_path}: process {holder.pid} on {HERE} plays this run; let it end, or stop it by:"
        f" kill {holder.pid}"
    )
    assert (tmp_path / "run.lock").read_bytes() == before
    assert "plays this run" in refusal(tmp_path)


def test_a_second_time_in_the_same_process_is_refused_too(tmp_path):
    with RunLock(tmp_path) as lock:
        lock.take()
        assert f"process {os.getpid()} on {HERE} plays this run" in refusal(tmp_path)
        assert lock.file.exists()


# ---------------------------------------------------------------- left behind


def test_the_lock_of_a_killed_process_is_taken_over_with_a_note(holder, tmp_path):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    note = f"process {holder.pid} on {HERE} held this run and has gone without a word"
    with pytest.warns(UserWarning, match=note):
        take(tmp_path)


@needs_proc
def test_a_killed_process_that_nobody_has_waited_for_is_gone(holder, tmp_path):
    holder.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # dead, and still in the table
    with pytest.warns(UserWarning, match=f"process {holder.pid} on"):
        take(tmp_path)


@needs_proc
def test_another_process_with_the_dead_ones_pid_is_no_holder(tmp_path):
    me = Holder.this_process()
    leave_lock(tmp_path, pid=me.pid, started=me.started - 1)
    with pytest.warns(UserWarning, match=f"process {me.pid} on {HERE} held this run"):
        take(tmp_path)


@needs_proc
def test_a_living_process_is_believed_where_the_file_system_knows_no_locks(tmp_path, monkeypatch):
    me = leave_lock(tmp_path)  # of this process, which lives
    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert f"process {me['pid']} on {HERE} plays this run" in refusal(tmp_path)
    leave_lock(tmp_path, started=me["started"] + 1)
    with pytest.warns(UserWarning, match="has gone"):
        take(tmp_path)


@pytest.fixture
def machine_id(tmp_path, monkeypatch):
    """The installed system's identity, which a container may lack."""
    file = tmp_path / "machine-id"
    file.write_text("aa11\n")
    monkeypatch.setattr(lock_module, "MACHINE_ID", file)
    return file


ANOTHER_BOOT = "00000000-0000-0000-0000-000000000000"


@needs_proc
def test_after_a_reboot_a_process_of_the_same_pid_and_start_is_another(tmp_path, machine_id):
    folder = tmp_path / "run"
    folder.mkdir()
    leave_lock(folder, boot=ANOTHER_BOOT)
    with pytest.warns(UserWarning, match="has gone"):
        take(folder)


@needs_proc
@pytest.mark.parametrize("of_holder", ["bb22", None, ""])
def test_two_machines_of_one_name_are_two(of_holder, tmp_path, machine_id):
    if of_holder is None:  # as in a container: no identity at all, here as there
        machine_id.unlink()
    if of_holder == "":
        machine_id.write_text("\n")
        of_holder = None
    folder = tmp_path / "run"
    folder.mkdir()
    leave_lock(folder, pid=4321, boot=ANOTHER_BOOT, machine=of_holder)
    assert refusal(folder) == (
        f"{folder}: process 4321 on {HERE} plays this run, and whether it still does can't be seen"
        f" from this {HERE}, another machine or boot; if it has ended, add --take-over"
    )


def test_where_no_boot_has_an_identity_the_name_decides(tmp_path, monkeypatch):
    monkeypatch.setattr(lock_module, "BOOT_ID", tmp_path / "nothing")
    leave_lock(tmp_path, started=None, boot="one of Linux")
    with pytest.warns(UserWarning, match="has gone"):
        take(tmp_path)
    leave_lock(tmp_path, host="gpu-17")
    assert "can't be seen" in refusal(tmp_path)


@needs_proc
def test_a_lock_written_before_machines_had_identities_is_read(tmp_path):
    me = Holder.this_process()
    table = {"host": me.host, "pid": me.pid, "started": me.started - 1, "boot": me.boot}
    (tmp_path / "run.lock").write_text(json.dumps(table) + "\n")
    with pytest.warns(UserWarning, match=f"process {me.pid} on {HERE} held this run"):
        take(tmp_path)


def test_a_lock_of_another_machine_is_refused_with_the_way_out(tmp_path):
    leave_lock(tmp_path, host="gpu-17", pid=4321, boot="another")
    assert refusal(tmp_path) == (
        f"{tmp_path}: process 4321 on gpu-17 plays this run, and whether it still does can't be seen"
        f" from {HERE}; if it has ended, add --take-over"
    )
    assert json.loads((tmp_path / "run.lock").read_text())["pid"] == 4321
    with pytest.warns(
        UserWarning, match="process 4321 on gpu-17 held this run and has ended, as --take-over says"
    ):
        take(tmp_path, take_over=True)


def test_what_plays_is_not_taken_over(holder, tmp_path):
    plays = f"process {holder.pid} on {HERE} plays this run"
    assert plays in refusal(tmp_path, take_over=True)
    # As a file system would show it whose locks reach this machine from the holder's.
    leave_lock(tmp_path, host="gpu-17", pid=4321, boot="another")
    assert "process 4321 on gpu-17 plays this run; let it end, or stop it there" in refusal(
        tmp_path, take_over=True
    )


@needs_proc
def test_what_lives_here_is_not_taken_over_where_the_file_system_knows_no_locks(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(fcntl, "flock", no_locks)
    me = leave_lock(tmp_path)  # of this process, which lives
    assert f"process {me['pid']} on {HERE} plays" in refusal(tmp_path, take_over=True)


@needs_proc
def test_a_restarted_container_has_another_name_and_is_the_same_machine(tmp_path):
    leave_lock(tmp_path, host="f00dcafe1234", pid=2**22 + 1)
    with pytest.warns(UserWarning, match=r"on f00dcafe1234 held this run"):
        take(tmp_path)


@pytest.mark.parametrize("text", ["", "{", '{"host": "gpu-17"}', "[]", '{"pid": "x", "host": 1}'])
def test_a_torn_lock_is_nobodys(text, tmp_path):
    (tmp_path / "run.lock").write_text(text)
    take(tmp_path)


def test_a_child_of_a_killed_process_does_not_hold_its_run(tmp_path):
    forks = HOLD.replace(
        'print("held", flush=True)',
        "import os\n    child = os.fork()\n    if child == 0: print(os.getpid(), flush=True)",
    )
    process = python(forks, str(tmp_path))
    child = int(process.stdout.readline())
    try:
        process.kill()
        process.wait()
        os.kill(child, 0)  # it lives
        with pytest.warns(UserWarning, match=f"process {process.pid} on"):
            take(tmp_path)
    finally:
        os.kill(child, signal.SIGKILL)
        process.communicate()


def test_a_child_that_ends_leaves_its_parents_lock_alone(tmp_path):
    forks = HOLD.replace(
        'print("held", flush=True)',
        "import os\n    if os.fork() == 0: sys.exit()\n    os.wait(); print('held', flush=True)",
    )
    process = python(forks, str(tmp_path))
    try:
        assert process.stdout.readline() == "held\n"
        assert f"process {process.pid} on {HERE} plays this run" in refusal(tmp_path)
    finally:
        process.kill()
        process.communicate()


# ---------------------------------------------------------------- races and bad folders

RACE = """
import os, sys, time
from pathlib import Path
from language_self_play.errors import RunFolderError
from language_self_play.lock import RunLock
folder, won, refused = Path(sys.argv[1]), 0, set()
print("ready", flush=True)
sys.stdin.readline()
end = time.monotonic() + 1.5
while time.monotonic() < end:
    try:
        with RunLock(folder) as lock:
            lock.take()
            os.close(os.open(folder / "inside", os.O_CREAT | os.O_EXCL))  # fails beside another
            won += 1
            os.unlink(folder / "inside")
    except RunFolderError as error:
        refused.add(str(error).split(" on ")[0])
print(won, len(refused), flush=True)
"""


def test_of_racing_processes_one_at_a_time_holds_the_run(tmp_path):
    processes = [python(RACE, str(tmp_path)) for _ in range(3)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [errors for _, errors in outputs] == ["", "", ""]
    counts = [list(map(int, output.split())) for output, _ in outputs]
    assert all(won > 0 for won, _ in counts)
    assert sum(refused for _, refused in counts) > 0
    assert not (tmp_path / "run.lock").exists()


def test_a_file_that_its_holder_removes_while_it_is_opened_is_not_held(tmp_path, monkeypatch):
    flock, opened = fcntl.flock, []

    def removed_first(descriptor, operation):
        if not opened:
            (tmp_path / "run.lock").unlink()  # as its holder does, before it lets go
        opened.append(descriptor)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", removed_first)
    with RunLock(tmp_path) as lock:
        lock.take()
        assert len(opened) == 2
        assert "plays this run" in refusal(tmp_path)


def test_a_read_only_folder_is_one_sentence(make_disk):
    disk = make_disk(2**20)
    (disk / "run").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    assert refusal(disk / "run") == (
        f"{disk / 'run' / 'run.lock'}: can't be written (Read-only file system); a run needs a folder"
        " to write to"
    )


def test_a_file_where_the_folder_belongs_is_one_sentence(tmp_path):
    (tmp_path / "run").write_text("")
    assert "run.lock: can't be written (File exists)" in refusal(tmp_path / "run")
