"""Programs that models write: what right ones can do, and what none of them can."""

from __future__ import annotations

import gzip
import json
import os
import pwd
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from language_self_play.rewards import sandbox as sandbox_module
from language_self_play.rewards.sandbox import IsolationError, Sandbox

TIMEOUT_S = 3.0
MEMORY_MIB = 256


@pytest.fixture(scope="module")
def sandbox():
    made = Sandbox(TIMEOUT_S, MEMORY_MIB, workers=2)
    try:
        made.check()
    except IsolationError as error:
        made.close()
        pytest.skip(f"this machine can't isolate programs: {error}")
    yield made
    made.close()


@pytest.fixture(scope="module")
def problems(test_data):
    with gzip.open(
        test_data / "data/humaneval/HumanEval.jsonl.gz", "rt", encoding="utf-8"
    ) as lines:
        return [json.loads(line) for line in lines]


def descendants() -> set[int]:
    """Processes that descend from this one, by /proc."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue
            parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
    found = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {os.getpid()}


def processes_with(marker: str) -> list[str]:
    """Command names of all processes that carry `marker`."""
    return [
        name
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and (name := _read(entry / "comm").strip()) and (marker in name)
    ]


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


# Names a process so that it can be found wherever it has gone: PR_SET_NAME.
NAMED = "import ctypes; ctypes.CDLL(None).prctl(15, b'{marker}', 0, 0, 0)\n"


# ---------------------------------------------------------------- what programs can do


def test_a_program_that_runs_to_its_end_passes_and_one_that_raises_fails(sandbox):
    assert sandbox.run_all(["assert 1 + 1 == 2", "assert 1 + 1 == 3", "x = ("]) == [
        True,
        False,
        False,
    ]


def test_a_program_has_the_standard_library_threads_and_a_scratch_folder(sandbox):
    assert sandbox.run("""
import collections, dataclasses, decimal, hashlib, itertools, json, random, re, sqlite3, ssl, typing
import multiprocessing, os, threading, zoneinfo

@dataclasses.dataclass
class Point:
    x: int

thread = threading.Thread(target=print, args=(Point(1),)); thread.start(); thread.join()
with open("notes.txt", "w") as file:
    file.write("hello")
assert os.listdir(".") == ["notes.txt"] and open("notes.txt").read() == "hello"
assert multiprocessing.Lock().acquire() and len(os.urandom(8)) == 8
assert __name__ == "__main__" and zoneinfo.ZoneInfo("UTC")
""")


def test_what_one_program_writes_the_next_does_not_find(sandbox):
    assert sandbox.run("open('left', 'w').write('x')")
    assert sandbox.run("import os; assert os.listdir('.') == []")
    assert os.listdir(sandbox.mount_point) == []


def test_sets_have_the_same_order_in_every_run(sandbox):
    program = "assert hash('alpha') == {}"
    seed_0 = subprocess.run(
        [sys.executable, "-c", "print(hash('alpha'))"],
        env={"PYTHONHASHSEED": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert sandbox.run(program.format(seed_0.stdout))


def test_a_program_takes_less_than_a_fifth_of_a_second(sandbox):
    sandbox.run("pass")
    start = time.perf_counter()
    assert sandbox.run_all(["pass"] * 20) == [True] * 20
    assert (time.perf_counter() - start) / 20 < 0.2


@pytest.mark.slow
def test_humaneval_solutions_pass_and_their_bodies_replaced_by_pass_fail(problems):
    assert len(problems) == 164
    sandbox = Sandbox(20.0, 1024, workers=2)
    try:
        sandbox.check()
    except IsolationError as error:
        pytest.skip(f"this machine can't isolate programs: {error}")
    tests = [f"\n\n{p['test']}\ncheck({p['entry_point']})\n" for p in problems]
    bodies = [p["prompt"] + p["canonical_solution"] for p in problems]
    empty = [f"{p['prompt']}    pass\n" for p in problems]
    try:
        right = sandbox.run_all([b + t for b, t in zip(bodies, tests, strict=True)])
        wrong = sandbox.run_all([b + t for b, t in zip(empty, tests, strict=True)])
    finally:
        sandbox.close()
    assert [p["task_id"] for p, passed in zip(problems, right, strict=True) if not passed] == []
    assert [p["task_id"] for p, passed in zip(problems, wrong, strict=True) if passed] == []


# ---------------------------------------------------------------- what no program can do

ESCAPES = {
    "ends early with status 0": "import sys; sys.exit(0)",
    "ends early without clean-up": "import os; os._exit(0)",
    "ends early by a signal": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "a fork bomb": """
import os
while True:
    os.fork()
""",
    "a fork bomb that does not give up": """
import os
while True:
    try:
        os.fork()
    except OSError:
        pass
""",
    "a thread bomb": """
import threading, time
for _ in range(100):
    threading.Thread(target=time.sleep, args=(60,)).start()
""",
    "an endless loop": "while True: pass",
    "a sleep": "import time; time.sleep(1000)",
    "a sleep that ignores signals": """
import signal, time
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGXCPU):
    signal.signal(number, signal.SIG_IGN)
time.sleep(1000)
""",
    "10 GB": "bytearray(10 * 10**9)",
    "10 GB in pieces": "kept = [b'x' * 10**7 for _ in range(1000)]",
    "the terminal": "import sys; assert sys.stdin.read() != ''",
    "gigabytes of output": """
line = "x" * 2**20
while True:
    print(line, flush=True)
""",
    "gigabytes of reports": """
import os
while True:
    os.write(3, b"x" * 2**20)
""",
    "a false report": "import os; os.write(3, b'0' * 32); os._exit(0)",
    "gigabytes of files": """
for i in range(10**9):
    open(str(i), "wb").write(bytes(2**20))
""",
    "a write outside": "import os; open(os.__file__, 'a')",
    "a write to the root": "open('/written', 'w')",
    "a new mount": """
import ctypes
assert ctypes.CDLL(None).mount(b"tmpfs", b"/", b"tmpfs", 0, None) == 0
""",
    "a user namespace of its own": """
import ctypes
assert ctypes.CDLL(None).unshare(0x10000000) == 0
""",
    "a child in a user namespace of its own": """
import ctypes, os
SIGCHLD, CLONE_NEWUSER, clone = 17, 0x10000000, {"x86_64": 56, "aarch64": 220}[os.uname().machine]
child = ctypes.CDLL(None).syscall(clone, CLONE_NEWUSER | SIGCHLD, 0, 0, 0, 0)
assert child >= 0
if child == 0:
    os._exit(0)
""",
    "a socket to the machine's host": "import socket; socket.socket(socket.AF_VSOCK)",
    "memory that no limit counts": "import os; os.memfd_create('x')",
    "shared memory that no limit counts": """
import ctypes
assert ctypes.CDLL(None).shmget(0, 2**20, 0o1600) >= 0
""",
    "an executable": "import subprocess; subprocess.run(['/bin/sh', '-c', 'true'], check=True)",
    "a tower of recursion": "def f(): return f() + 1\nimport sys; sys.setrecursionlimit(10**9); f()",
}


@pytest.mark.parametrize("escape", ESCAPES)
def test_a_program_can_not_get_away_with(sandbox, escape):
    before = descendants()
    start = time.monotonic()
    assert sandbox.run(ESCAPES[escape]) is False
    assert time.monotonic() - start < TIMEOUT_S + 1.0
    assert descendants() <= before
    assert sandbox.run("pass")


def test_a_daemon_does_not_outlive_its_program(sandbox):
    daemon = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
{named}
        time.sleep(1000)
    os._exit(0)
os.wait()
"""
    for ending, passes in [("time.sleep(0.2)", True), ("time.sleep(1000)", False)]:
        marker = f"lsp-{passes:d}-{os.getpid()}"[:15]
        named = "        " + NAMED.format(marker=marker).strip()
        assert sandbox.run(daemon.format(named=named) + ending) is passes
        # What is killed has closed its files a moment before it leaves the process table.
        assert wait_until(lambda marker=marker: not processes_with(marker))


def test_a_program_can_not_reach_a_server_of_the_trainers_machine(sandbox):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        program = f"import socket; socket.create_connection(('127.0.0.1', {port}), 1)"
        with socket.create_connection(("127.0.0.1", port), 1):
            pass
        assert sandbox.run(program) is False


def test_a_program_can_not_reach_an_abstract_unix_socket(sandbox):
    name = f"lsp-sandbox-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("\0" + name)
        server.listen()
        program = "import socket; socket.socket(socket.AF_UNIX).connect('\\0' + {!r})"
        assert sandbox.run(program.format(name)) is False


def test_a_program_reads_neither_the_environment_nor_files_of_the_trainer(
    sandbox, tmp_path, monkeypatch
):
    monkeypatch.setenv("LSP_SECRET", "hunter2")
    (tmp_path / "key").write_text("hunter2")
    assert sandbox.run("import os; assert dict(os.environ) == {}")
    for path in (tmp_path / "key", Path(__file__), Path("/proc/self/environ"), Path("/etc/passwd")):
        assert path.exists()
        assert sandbox.run(f"open({str(path)!r})") is False
        assert sandbox.run(f"import os; assert not os.path.exists({str(path)!r})")


def test_a_fork_bomb_leaves_room_for_the_program_beside_it(sandbox):
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    works = "import os\nfor _ in range(3):\n    if os.fork() == 0: os._exit(0)\n    os.wait()"
    assert sandbox.run_all([bomb, works, works, works]) == [False, True, True, True]


def test_programs_end_with_the_trainer(sandbox, tmp_path):
    marker = f"lsp-end-{os.getpid()}"[:15]
    code = NAMED.format(marker=marker) + "import time; time.sleep(1000)"
    trainer = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import sys; sys.path.insert(0, {str(Path(sandbox_module.__file__).parent)!r});"
            f"import sandbox; sandbox.Sandbox(60, 256, 1).run({code!r})",
        ],
        env={"TMPDIR": str(tmp_path)},
    )
    try:
        assert wait_until(lambda: processes_with(marker))
    finally:
        trainer.kill()
        trainer.wait()
    assert wait_until(lambda: not processes_with(marker))


def wait_until(holds) -> bool:
    deadline = time.monotonic() + 10
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


# ---------------------------------------------------------------- refusing


@pytest.mark.parametrize(
    ("weakened", "named"),
    [
        ("_become_powerless", "gaining capabilities"),
        ("_build_root", "writing outside the scratch folder"),
    ],
)
def test_the_check_names_what_a_program_could_do(sandbox, monkeypatch, weakened, named):
    leaky = "import sys; sys.path.append(sys.argv[1]); import sandbox; "
    monkeypatch.setattr(
        sandbox_module,
        "LAUNCH",
        f"{leaky} sandbox.{weakened} = lambda *_: None; sandbox.main()",
    )
    # Nothing of it is let loose here but probes that are known to do no harm.
    monkeypatch.setattr(sandbox_module, "PROBES", {named: sandbox_module.PROBES[named]})
    with pytest.raises(IsolationError, match=f"not kept from {named}$"):
        sandbox.check()


def test_a_program_that_loses_no_power_is_not_run_and_not_scored(sandbox, monkeypatch):
    monkeypatch.setattr(
        sandbox_module,
        "LAUNCH",
        "import sys; sys.path.append(sys.argv[1]); import sandbox;"
        "sandbox.PR_SET_NO_NEW_PRIVS = 10_000; sandbox.main()",
    )
    with pytest.raises(IsolationError, match=r"^prctl: Invalid argument$"):
        sandbox.run("pass")


def test_a_program_can_not_pretend_that_isolation_failed(sandbox):
    assert sandbox.run("import os; os.write(3, b'prctl: no'); os._exit(70)") is False


def test_the_check_says_which_system_call_is_refused(sandbox, monkeypatch):
    monkeypatch.setattr(
        sandbox_module,
        "LAUNCH",
        "import sys; sys.path.append(sys.argv[1]); import sandbox, os, resource;"
        "sandbox.NAMESPACES = 1 << 62; sandbox.main()",
    )
    with pytest.raises(IsolationError, match=r"^unshare: Invalid argument$"):
        sandbox.check()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_an_ordinary_user_gets_the_same_isolation(tmp_path):
    # A copy of the file, which alone is needed, and an interpreter that the user can read.
    python = next(
        (p for p in (sys.executable, "/usr/bin/python3") if _readable_by_all(Path(p).resolve())),
        None,
    )
    if python is None or not _at_least_3_11(python):
        pytest.skip("no Python >= 3.11 that an ordinary user can run")
    nobody = pwd.getpwnam("nobody")
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    (tmp_path / "sandbox.py").write_text(Path(sandbox_module.__file__).read_text("utf-8"), "utf-8")
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import sandbox\n"
        "made = sandbox.Sandbox(5, 256, 2)\n"
        "try:\n made.check(); print(made.run('pass'), made.run('import os; os._exit(0)'),"
        " made.run('import os\\nwhile True: os.fork()'))\n"
        "except sandbox.IsolationError as error:\n print(error)\n"
        "finally:\n made.close()"
    )
    run = subprocess.run(
        [python, "-B", "-c", script],
        user=nobody.pw_uid,
        group=nobody.pw_gid,
        extra_groups=[],
        cwd="/",
        env={"TMPDIR": "/tmp"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    if run.stdout.startswith("unshare: "):
        pytest.skip(f"ordinary users get no namespaces here: {run.stdout.strip()}")
    assert (run.stdout, run.stderr) == ("True False False\n", "")


def _readable_by_all(path: Path) -> bool:
    return all(p.stat().st_mode & 0o001 for p in (path, *path.parents))


def _at_least_3_11(python: str) -> bool:
    return (
        subprocess.run(
            [python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"], check=False
        ).returncode
        == 0
    )
