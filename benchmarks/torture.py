"""What a run survives, tried on real processes: python benchmarks/torture.py [--kills 100] [--only PART]

A small run in the arena (12 steps, a checkpoint every 2, one thread) is played once undisturbed. Then it
is killed, its checkpoints are damaged, its disk fills, its folder turns read-only, its clock jumps and
its reward misbehaves; afterwards it goes on, and its weights, optimizer, games and metrics (without time/
and memory/) must be those of the undisturbed run, byte for byte. Prints one table; exits with 1 if
anything ended otherwise. Results are kept in --folder: started again, it goes on where it was.
docs/reliability.md says what is guaranteed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
sys.dont_write_bytecode = True  # torture_reward.py changes within a second

ROOT = Path(__file__).resolve().parents[1]
STEPS = 12
RECIPE = f"""\
algorithm = "lsp"
steps = {STEPS}
device = "cpu"
threads = 1
[policy]
path = "arena"
[challenger]
prompt = "arena"
template = "{{query}}"
num_queries = 6
max_tokens = 20
[solver]
group_size = 3
max_tokens = 12
[self_reward]
mode = "expected"
rubric = "arena"
[reward.main]
REWARD
[learner]
lr = 5e-5
[eval]
every = 6
tasks = ["arena"]
[checkpoint]
every = 2
[log]
progress = "none"
"""
ARENA_REWARD = 'kind = "arena"'
PYTHON_REWARD = 'kind = "python"\nfunction = "torture_reward:reward"'

# What a trial found wrong; None if it ended as it must.
Outcome = str | None
Case = tuple[str, Callable[[], Outcome]]
DONE, BAD_INPUT, NOT_FINITE, PAUSED, INTERRUPTED = 0, 2, 3, 75, 130
# What a shell starts in the background is deaf to it, and so would be what that starts.
HEARS_CTRL_C = "import signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)"
POLL_S = 0.002
LIMIT_S = 600.0


@dataclass
class Ended:
    """How a process, or a command within this one, ended."""

    code: int
    errors: str

    def complaint(self, *allowed: int) -> Outcome:
        """What is wrong with it, if not its code then its words."""
        lines = self.errors.splitlines()
        if self.code not in allowed:
            return f"exit code {self.code}: {' | '.join(lines[-3:])}"
        strange = [line for line in lines if line and not line.startswith("lsp: ")]
        if strange or "internal error" in self.errors:
            return f"says {(strange or lines)[-1]!r}"
        return "says nothing" if self.code != DONE and not lines else None


class Bench:
    """The folder of all trials, its undisturbed runs, and what has been found so far."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.results_file = folder / "results.jsonl"
        self.recipes = {"arena": folder / "arena.toml", "python": folder / "python.toml"}
        folder.mkdir(parents=True, exist_ok=True)
        for name, reward in (("arena", ARENA_REWARD), ("python", PYTHON_REWARD)):
            self.recipes[name].write_text(RECIPE.replace("REWARD", reward))
        (folder / "torture_reward.py").write_text(GOOD_REWARD)

    def undisturbed(self, name: str, *flags: str) -> Path:
        """A finished run that nothing befell, played on the first call."""
        run = self.folder / f"undisturbed-{name}{''.join(flags)}"
        if not (run / "model").is_dir():
            shutil.rmtree(run, ignore_errors=True)
            ended = self.lsp("train", self.recipes[name], "--run", run, *flags)
            assert ended.code == DONE, ended.errors
        return run

    def new_run(self, name: str) -> Path:
        run = self.folder / "trials" / re.sub(r"\W+", "-", name)
        shutil.rmtree(run, ignore_errors=True)
        run.parent.mkdir(exist_ok=True)
        return run

    def start(
        self, *arguments: object, cwd: Path | None = None, before: str = ""
    ) -> subprocess.Popen[str]:
        """`lsp` in a process of its own, after the Python statements in `before`."""
        program = (
            f"{HEARS_CTRL_C}\n{before}\nfrom language_self_play.cli import main\nsys.exit(main())"
        )
        return subprocess.Popen(
            [sys.executable, "-c", program, *map(str, arguments)],
            cwd=cwd or self.folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def lsp(self, *arguments: object, cwd: Path | None = None, before: str = "") -> Ended:
        return ended(self.start(*arguments, cwd=cwd, before=before))

    def results(self) -> list[dict]:
        if not self.results_file.is_file():
            return []
        return [json.loads(line) for line in self.results_file.read_text().splitlines()]

    def note(self, part: str, case: str, number: int, outcome: Outcome, details: str = "") -> None:
        result = {"part": part, "case": case, "number": number, "wrong": outcome}
        with self.results_file.open("a") as stream:
            stream.write(json.dumps(result | ({"details": details} if details else {})) + "\n")
        print(f"{part}: {case}: {outcome or 'as it must'} {details}", flush=True)


def ended(process: subprocess.Popen[str]) -> Ended:
    _, errors = process.communicate(timeout=LIMIT_S)
    return Ended(process.returncode, errors)


def within(*arguments: object) -> Ended:
    """`lsp` within this process, which saves a start."""
    from language_self_play.cli import main

    errors = io.StringIO()
    streams = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors)
    with warnings.catch_warnings(), streams[0], streams[1]:
        warnings.simplefilter("always", UserWarning)
        code = main([str(a) for a in arguments])
    return Ended(code, errors.getvalue())


def difference(expected: Path, run: Path) -> Outcome:
    """Where two finished runs differ in what can be reproduced; None if nowhere."""
    last = f"checkpoints/step-{STEPS:06d}"
    names = [
        *("model/model.safetensors", f"{last}/model/model.safetensors"),
        f"{last}/optimizer.safetensors",
        *(f"games/{file.name}" for file in sorted((expected / "games").iterdir())),
    ]
    for name in names:
        if not (run / name).is_file():
            return f"{name} is missing"
        if (run / name).read_bytes() != (expected / name).read_bytes():
            return f"{name} differs"
    if extra := {f.name for f in (run / "games").iterdir()} - {Path(n).name for n in names}:
        return f"games/{min(extra)} is too many"
    return None if records(run) == records(expected) else "metrics.jsonl differs"


def records(run: Path) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith(("time/", "memory/"))}
        for line in lines
    ]


def events(run: Path) -> list[dict]:
    file = run / "events.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.is_file() else []
    return [json.loads(line) for line in lines]


def go_on(
    bench: Bench, run: Path, expected: Path, lsp: Callable[..., Ended] | None = None
) -> Outcome:
    """Resume `run`, or start it where it had not become one; what is then wrong with it."""
    lsp = lsp or within
    if (run / "config.toml").is_file():
        end = lsp("train", "--resume", run)
    else:
        end = lsp("train", bench.recipes["arena"], "--run", run)
    return end.complaint(DONE) or difference(expected, run)


# ---------------------------------------------------------------- kill -9


def kills(bench: Bench, wanted: int) -> None:
    """Runs that are killed once, twice or three times, until `wanted` kills have been made."""
    part = "kill -9"
    expected = bench.undisturbed("arena")
    found = [r for r in bench.results() if r["part"] == part]
    made, trial = sum(r["number"] for r in found), len(found)
    while made < wanted:
        draw = random.Random(trial)
        run = bench.new_run(f"kill-{trial}")
        moments = []
        for _ in range(draw.randint(1, 3)):
            moments += kill(bench, run, draw, expected)
        outcome = go_on(bench, run, expected, bench.lsp)
        bench.note(part, f"run {trial}", len(moments), outcome, "; ".join(moments))
        made, trial = made + len(moments), trial + 1
        if outcome is None:
            shutil.rmtree(run)


def kill(bench: Bench, run: Path, draw: random.Random, expected: Path) -> list[str]:
    """Start or resume `run` and kill it at a drawn moment: [the moment], [] if it was done before."""
    began = [e["time"] for e in events(expected)]
    play_s = began[-1] - began[0]
    writing_s = max(r.get("time/checkpoint_s", 0.0) for r in map(json.loads, lines_of(expected)))
    newest = max((int(f.name[5:]) for f in run.glob("checkpoints/step-*")), default=0)
    told = len(events(run))
    if (run / "config.toml").is_file():
        process = bench.start("train", "--resume", run)
    else:
        process = bench.start("train", bench.recipes["arena"], "--run", run)
    aim = draw.choice(["play", "play", "checkpoint", "checkpoint", "start"])
    chosen_s = draw.random()
    left = (STEPS - newest) / STEPS
    number = draw.randint(1, max(1, (STEPS - newest) // 2))

    def wait_until(happened: Callable[[], object]) -> None:
        while process.poll() is None and not happened():
            time.sleep(POLL_S)

    if aim == "start":  # before it plays: loading, taking the lock, restoring, dropping records
        time.sleep(chosen_s * 6.0)
    else:
        wait_until(lambda: len(events(run)) > told)
    if aim == "play":
        time.sleep(chosen_s * play_s * left)
    elif aim == "checkpoint":
        for _ in range(number):
            wait_until(lambda: not unfinished(run))
            wait_until(lambda: unfinished(run))
        time.sleep(chosen_s * writing_s)
    process.send_signal(signal.SIGKILL)
    if ended(process).code != -signal.SIGKILL:
        return []
    step = max((r["step"] for r in records_so_far(run)), default="none")
    half = " beside an unfinished checkpoint" if unfinished(run) else ""
    return [f"{aim}, after record {step}{half}"]


def unfinished(run: Path) -> list[Path]:
    return [*run.glob("checkpoints/.step-*.new"), *run.glob(".model.new")]


def lines_of(run: Path) -> list[str]:
    file = run / "metrics.jsonl"
    return file.read_text().splitlines() if file.is_file() else []


def records_so_far(run: Path) -> Iterator[dict]:
    for line in lines_of(run):
        with contextlib.suppress(ValueError):
            yield json.loads(line)


# ---------------------------------------------------------------- damaged checkpoints


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def zero(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def flip_bit(file: Path) -> None:
    contents = bytearray(file.read_bytes())
    contents[len(contents) // 2] ^= 1
    file.write_bytes(contents)


DAMAGES = {"truncated": truncate, "zeroed": zero, "bit-flipped": flip_bit, "removed": Path.unlink}


def damaged_checkpoints(bench: Bench) -> Iterator[Case]:
    """Each file of the newest checkpoint in each way, then all checkpoints at once."""
    expected, half = bench.undisturbed("arena"), bench.undisturbed("arena", "--steps=6")
    newest = half / "checkpoints" / "step-000006"
    for file in sorted(f.relative_to(newest) for f in newest.rglob("*") if f.is_file()):
        for how, damage in DAMAGES.items():

            def one(file: Path = file, how: str = how, damage: Callable = damage) -> Outcome:
                run = bench.new_run(f"{file}-{how}")
                shutil.copytree(half, run)
                damage(run / "checkpoints" / "step-000006" / file)
                end = within("train", "--resume", run, "--steps", STEPS)
                if "step-000006" not in end.errors or file.name not in end.errors:
                    return f"the damaged file is not named: {end.errors!r}"
                return end.complaint(DONE) or difference(expected, run)

            yield f"{file} {how}", one

    def every_one() -> Outcome:
        run = bench.new_run("all-damaged")
        shutil.copytree(half, run)
        for file in run.glob("checkpoints/*/optimizer.safetensors"):
            flip_bit(file)
        end = within("train", "--resume", run, "--steps", STEPS)
        named = all(f"step-00000{n}: optimizer.safetensors" in end.errors for n in (4, 6))
        return end.complaint(BAD_INPUT) or (None if named else f"not named: {end.errors}")

    yield "all checkpoints", every_one


# ---------------------------------------------------------------- disks


def mount(*arguments: object) -> None:
    subprocess.run(["mount", *map(str, arguments)], check=True, capture_output=True)


def unmount(place: Path) -> None:
    subprocess.run(["umount", "-l", place], check=False, capture_output=True)


def may_mount() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        try:
            mount("-t", "tmpfs", "-o", "size=1m", "torture", folder)
        except (OSError, subprocess.CalledProcessError):
            return False
        unmount(Path(folder))
        return True


def full_disks(bench: Bench) -> Iterator[Case]:
    """Disks of many sizes, room made after the run has stopped, or while it plays."""
    expected = bench.undisturbed("arena")

    def fill(disk: Path, when: str) -> Outcome:
        run = disk / "run"
        over = threading.Event()

        def make_room() -> None:
            mount("-o", "remount,size=256m", disk)

        def watch() -> None:
            while not over.wait(POLL_S):
                room = os.statvfs(disk)
                if room.f_bavail * room.f_bsize < 64 * 1024 and (run / "metrics.jsonl").exists():
                    over.wait(0.3)
                    return make_room()

        watcher = threading.Thread(target=watch if when == "playing" else lambda: None)
        watcher.start()
        end = within("train", bench.recipes["arena"], "--run", run)
        over.set()
        watcher.join()
        make_room()
        if wrong := end.complaint(DONE, BAD_INPUT, PAUSED):
            return wrong
        if end.code == DONE:
            return difference(expected, run)
        return go_on(bench, run, expected)

    sizes_kib = [4, 16, 64, 1024, 4096, 8192, 12_288, 16_384, 20_480, 24_576, 28_672, 32_768]
    for size in sizes_kib:
        for when in ("stopped", "playing"):

            def one(size: int = size, when: str = when) -> Outcome:
                disk = bench.new_run(f"disk-{size}-{when}")
                disk.mkdir()
                mount("-t", "tmpfs", "-o", f"size={size}k", "torture", disk)
                try:
                    return fill(disk, when)
                finally:
                    unmount(disk)

            yield f"{size:,} KiB, room made when {when}", one


def read_only_folders(bench: Bench) -> Iterator[Case]:
    """A read-only mount laid over the folder, from the beginning, for a moment, or for good."""
    expected = bench.undisturbed("arena")

    def lay_over(place: Path) -> None:
        # In one call, by way of a view that no one writes to: a mount in use can't turn read-only.
        view = place.with_name(f"{place.name}-view")
        view.mkdir(exist_ok=True)
        mount("--bind", place, view)
        mount("-o", "remount,bind,ro", view)
        mount("--bind", view, place)
        unmount(view)

    def from_the_beginning() -> Outcome:
        run = bench.new_run("read-only")
        run.mkdir()
        try:
            lay_over(run)
            end = within("train", bench.recipes["arena"], "--run", run)
        finally:
            unmount(run)
        if "read-only" not in end.errors.lower() or str(run) not in end.errors:
            return f"doesn't say so: {end.errors!r}"
        return end.complaint(BAD_INPUT) or go_on(bench, run, expected)

    yield "from the beginning", from_the_beginning
    for after in (1, 4, 7):
        for lasting in ("for a moment", "for good"):

            def while_it_plays(after: int = after, lasting: str = lasting) -> Outcome:
                run = bench.new_run(f"read-only-{after}-{lasting}")
                process = bench.start("train", bench.recipes["arena"], "--run", run)
                while len(lines_of(run)) <= after and process.poll() is None:
                    time.sleep(POLL_S)
                try:
                    lay_over(run)
                    if lasting == "for a moment":
                        time.sleep(0.5)
                        unmount(run)
                    end = ended(process)
                finally:
                    unmount(run)
                codes = (DONE, PAUSED) if lasting == "for a moment" else (PAUSED,)
                if (wrong := end.complaint(*codes)) or end.code == DONE:
                    return wrong or difference(expected, run)
                return go_on(bench, run, expected)

            yield f"after step {after}, {lasting}", while_it_plays


# ---------------------------------------------------------------- clocks

CLOCK_NAMES = """\
import random, time
now, start, draw = time.time, time.time(), random.Random(0)"""
IN_1970 = "import time\ntime.time = lambda: 0.0"
CLOCKS = {
    "jumps a year either way": "time.time = lambda: now() + draw.uniform(-3e7, 3e7)",
    "runs backwards": "time.time = lambda: 2 * start - now()",
    "stands still": "time.time = lambda: start",
    "sleeps for hours": (
        "monotonic, perf, ahead = time.monotonic, time.perf_counter, [0.0]\n"
        "def jump(clock):\n    ahead[0] += 3600 * (draw.random() < 0.01)\n"
        "    return clock() + ahead[0]\n"
        "time.monotonic, time.perf_counter = lambda: jump(monotonic), lambda: jump(perf)"
    ),
}


def clocks(bench: Bench) -> Iterator[Case]:
    """Half the run by a clock that is replaced before anything is imported; then the rest, by another."""
    expected = bench.undisturbed("arena")
    for name, code in CLOCKS.items():

        def one(name: str = name, code: str = code) -> Outcome:
            run = bench.new_run(f"clock-{name}")
            first = f"{CLOCK_NAMES}\n{code}"
            end = bench.lsp(
                *("train", bench.recipes["arena"], "--run", run, "--steps", 6), before=first
            )
            if wrong := end.complaint(DONE):
                return wrong
            end = bench.lsp("train", "--resume", run, "--steps", STEPS, before=IN_1970)
            return end.complaint(DONE) or difference(expected, run)

        yield name, one


# ---------------------------------------------------------------- rewards

GOOD_REWARD = """\
def reward(queries, answers):
    return [float(len(a) % 3) for a in answers]
"""
BAD_REWARD = """\
import time
calls = 0
def reward(queries, answers):
    global calls
    calls += 1
    good = [float(len(a) % 3) for a in answers]
    if calls > 5:  # one call is made before anything is played
        BAD
    return good
"""


def in_folder(folder: Path, *arguments: object) -> Ended:
    """`within`, where torture_reward.py is that of `folder`."""
    before = list(sys.path)
    with contextlib.chdir(folder):
        try:
            return within(*arguments)
        finally:
            sys.path[:] = before
            sys.modules.pop("torture_reward", None)


def rewards(bench: Bench) -> Iterator[Case]:
    """Good for 4 steps, then not; afterwards the function is mended and the run goes on."""
    expected = bench.undisturbed("python")

    def bad(statement: str, code: int, said: str, name: str) -> Outcome:
        run, folder = prepared(name, statement)
        end = in_folder(folder, "train", bench.recipes["python"], "--run", run)
        if wrong := end.complaint(code):
            return wrong
        if said not in end.errors:
            return f"says {end.errors!r}, not {said!r}"
        if code == NOT_FINITE and not list(run.glob("nonfinite/step-*.json")):
            return "the batch is in no file"
        return mended(run, folder, code != NOT_FINITE)

    def prepared(name: str, statement: str) -> tuple[Path, Path]:
        folder = bench.new_run(f"reward-{name}")
        folder.mkdir()
        (folder / "torture_reward.py").write_text(BAD_REWARD.replace("BAD", statement))
        return folder / "run", folder

    def mended(run: Path, folder: Path, same: bool = True) -> Outcome:
        (folder / "torture_reward.py").write_text(GOOD_REWARD)
        end = in_folder(folder, "train", "--resume", run)
        if (wrong := end.complaint(DONE)) or same:
            return wrong or difference(expected, run)
        return None if [r["step"] for r in records(run)] == list(range(STEPS + 1)) else "steps lack"

    cases = {
        "raises": ("raise KeyError('x')", BAD_INPUT, "reward.main: raised KeyError: 'x'"),
        "returns too few": ("return good[1:]", BAD_INPUT, "reward.main: returned "),
        "returns too many": ("return good + [1.0]", BAD_INPUT, "reward.main: returned "),
        "returns another shape": ("return [good]", BAD_INPUT, "reward.main: returned "),
        "returns texts": ("return [str(g) for g in good]", BAD_INPUT, "reward.main: returned "),
        "returns one text": ("return 'good'", BAD_INPUT, "reward.main: returned 'good'"),
        "returns nothing": ("return None", BAD_INPUT, "reward.main: returned None"),
        "returns NaN": (
            "return [float('nan')] * len(good)",
            NOT_FINITE,
            "reward.main: returned nan",
        ),
        "returns infinity": (
            "return [1e300] + good[1:]",
            NOT_FINITE,
            "reward.main: returned 1e+300",
        ),
        "returns NaN once": (
            "if calls == 6: return [float('nan')] * len(good)",
            DONE,
            "warning: step 4",
        ),
    }
    for name, (statement, code, said) in cases.items():
        if code == DONE:

            def once(name: str = name, statement: str = statement, said: str = said) -> Outcome:
                run, folder = prepared(name, statement)
                end = in_folder(folder, "train", bench.recipes["python"], "--run", run)
                if said not in end.errors:
                    return f"says {end.errors!r}, not {said!r}"
                skipped = [r["step"] for r in records(run) if "guard/skipped" in r]
                return end.complaint(DONE) or (None if skipped == [4] else f"skipped {skipped}")

            yield name, once
        else:
            yield name, lambda a=(statement, code, said, name): bad(*a)

    def hangs(flags: list[str], signals: list[signal.Signals], code: int, name: str) -> Outcome:
        run, folder = prepared(name, "time.sleep(10_000)")
        recipe = bench.recipes["python"]
        process = bench.start("train", recipe, "--run", run, *flags, cwd=folder)
        while len(lines_of(run)) < 4 and process.poll() is None:
            time.sleep(POLL_S)
        time.sleep(1.0)  # it hangs
        for number in signals:
            process.send_signal(number)
            time.sleep(0.5)
        try:
            _, errors = process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return "went on hanging"
        wrong = Ended(process.returncode, errors).complaint(code)
        return wrong or mended(run, folder)

    bound = ["--guard.stop_within_s", "1"]
    twice = [signal.SIGINT, signal.SIGINT]
    yield "hangs, Ctrl-C with a bound", lambda: hangs(bound, twice[:1], PAUSED, "bound")
    yield "hangs, Ctrl-C twice", lambda: hangs([], twice, INTERRUPTED, "twice")


# ---------------------------------------------------------------- bad configurations


def bad_configurations(bench: Bench) -> None:
    """The refusals of tests/test_bad_configurations.py; a case that is known to fail is one that failed."""
    tests = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-k",
            "sentence",
            "tests/test_bad_configurations.py",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    counts = re.findall(r"(\d+) (passed|failed|errors?|xfailed)", tests.stdout)
    for number, what in counts or [("1", "not run")]:
        wrong = None if what == "passed" else f"{what}; {tests.stdout.strip()[-300:]}"
        bench.note(CONFIGURATIONS, what, int(number), wrong)


# ---------------------------------------------------------------- all of it

PARTS: dict[str, Callable[[Bench], Iterator[Case]]] = {
    "damaged checkpoint": damaged_checkpoints,
    "full disk": full_disks,
    "read-only folder": read_only_folders,
    "clock": clocks,
    "reward": rewards,
}
NEED_MOUNTS = ("full disk", "read-only folder")
KILLS, CONFIGURATIONS = "kill -9", "bad configurations"


def run_part(bench: Bench, part: str, wanted_kills: int) -> None:
    done = {r["case"] for r in bench.results() if r["part"] == part}
    if part == KILLS:
        kills(bench, wanted_kills)
    elif part == CONFIGURATIONS:
        if not done:
            bad_configurations(bench)
    elif part in NEED_MOUNTS and not may_mount():
        print(f"{part}: not tried, because it needs the right to mount (root)", flush=True)
    else:
        for case, trial in PARTS[part](bench):
            if case not in done:
                try:
                    outcome = trial()
                except Exception as error:  # one failure must not cost the others' results
                    outcome = f"{type(error).__name__}: {error}"
                bench.note(part, case, 1, outcome)


def print_table(bench: Bench) -> int:
    """The table of all results; 1 if anything ended otherwise than it must."""
    results = bench.results()
    print(f"\n| {'what':<20} | how many | as it must |\n|{'-' * 22}|---------:|-----------:|")
    for part in (KILLS, *PARTS, CONFIGURATIONS):
        of_part = [r for r in results if r["part"] == part]
        number = sum(r["number"] for r in of_part)
        good = sum(r["number"] for r in of_part if r["wrong"] is None)
        shown = (number, good) if of_part else ("not tried", "")
        print(f"| {part:<20} | {shown[0]:>8} | {shown[1]:>10} |")
    wrong = [r for r in results if r["wrong"] is not None]
    for result in wrong:
        print(f"\n{result['part']}, {result['case']}: {result['wrong']}")
    return 1 if wrong or not results else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = [KILLS, *PARTS, CONFIGURATIONS]
    parser.add_argument("--kills", type=int, default=100, help="at how many moments (default 100)")
    parser.add_argument("--only", action="append", choices=parts, help="this part; may be repeated")
    parser.add_argument("--folder", type=Path, default=Path("runs/torture"), help="for all trials")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    options = parser.parse_args()
    folder = options.folder.resolve()
    if options.fresh:
        shutil.rmtree(folder, ignore_errors=True)
    bench = Bench(folder)
    for part in options.only or parts:
        run_part(bench, part, options.kills)
    return print_table(bench)


if __name__ == "__main__":
    sys.exit(main())
