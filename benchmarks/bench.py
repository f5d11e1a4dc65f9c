"""One step at the speed of the hardware, measured: `make bench`, `make bench-full`.

    python benchmarks/bench.py                  the short run, at most 40 minutes
    python benchmarks/bench.py --full           all rows; started again, it goes on where it was
    python benchmarks/bench.py --only 3/        rows whose name contains `3/`
    python benchmarks/bench.py --report FILE    the tables again, into a Markdown file

docs/benchmarks.md says what the tables mean. Each result is written as soon as it is there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from speed.rows import Row

MINUTE = 60.0
# A row that takes longer is given up; its children with it.
LONGEST_ROW_S = {"bench": 10 * MINUTE, "full": 120 * MINUTE}
# Rounds of a row end after so long, but are never fewer than three.
BUDGET_S = {"bench": 12.0, "full": 300.0}


def main() -> None:
    options = parse()
    # Before torch is imported, by us and by whatever we start.
    os.environ |= {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
    if options.report:
        write_report(options)
    elif options.peak:
        measure_peak(options)
    elif options.row:
        measure_row(options)
    else:
        # Asked to stop, end the row that is being measured too.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        run(options)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--full", action="store_true", help="all rows, without a limit of time")
    parser.add_argument("--fresh", action="store_true", help="forget the results that there are")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--list", action="store_true", help="print the names of the rows")
    parser.add_argument("--minutes", type=float, default=40.0, help="limit of the short run")
    parser.add_argument("--threads", type=int, default=2, help="of both sides")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count processor time instead of wall time; with --threads 1, on a busy machine",
    )
    parser.add_argument("--results", type=Path, help="JSON lines; default runs/bench[-full].jsonl")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the tables into FILE")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--reply", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.results is None:
        options.results = Path("runs/bench-full.jsonl" if options.full else "runs/bench.jsonl")
    return options


def run(options: argparse.Namespace) -> None:
    """Measure what has no result yet, print each, and the tables at the end."""
    from speed.report import report

    end = float("inf") if options.full else time.monotonic() + options.minutes * MINUTE
    if options.fresh:
        options.results.unlink(missing_ok=True)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    for row in chosen(options):
        have = read_results(options.results)
        if options.list:
            print(row.id)
            continue
        if row.id in have and "error" not in have[row.id]:
            continue
        left = end - time.monotonic()
        print(f"{row.id} …", file=sys.stderr, flush=True)
        result = measured(row, options, left)
        with options.results.open("a") as file:
            file.write(json.dumps(result) + "\n")
        said = result.get("error") or f"{result['took_s']:.0f} s"
        print(f"{row.id}: {said}", file=sys.stderr, flush=True)
    if not options.list:
        print(report(read_results(options.results).values()))
        print(f"Results: {options.results}")


def chosen(options: argparse.Namespace) -> list[Row]:
    from speed.rows import rows

    return [r for r in rows() if (options.full or r.in_bench) and options.only in r.id]


def measured(row: Row, options: argparse.Namespace, left_s: float) -> dict[str, Any]:
    """The result of a row, measured in a process of its own, or why there is none."""
    described = {"id": row.id, "item": row.item, "kind": row.kind, "case": row.case}
    described |= {"conditions": conditions(options)}
    limit = min(left_s, LONGEST_ROW_S["full" if options.full else "bench"])
    if limit < MINUTE / 2:
        return described | {"error": "no time was left for it; `make bench-full` measures it"}
    with tempfile.TemporaryDirectory() as folder:
        reply = Path(folder) / "reply.json"
        command = [sys.executable, __file__, "--row", row.id, "--reply", str(reply)]
        command += ["--threads", str(options.threads), "--results", str(options.results)]
        command += ["--full"] * options.full + ["--cpu-time"] * options.cpu_time
        log = (Path(folder) / "log").open("w+")
        # A session of its own, so that its children end with it.
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            return described | {"error": f"took longer than {limit:.0f} s"}
        finally:
            end_group(process)
        if reply.exists():
            return described | json.loads(reply.read_text())
        log.seek(0)
        lines = [line.strip() for line in log.read().splitlines() if line.strip()]
        why = lines[-1] if lines else "it said nothing"
        return described | {"error": f"ended with status {status}: {why}"}


def end_group(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def conditions(options: argparse.Namespace) -> str:
    """What numbers depend on, for the foot of the tables."""
    clock = "processor time" if options.cpu_time else "wall time"
    from importlib.metadata import PackageNotFoundError, version

    versions = []
    for name in ("torch", "transformers", "trl"):
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return f"{options.threads} thread(s), {clock}, {processor()}, {', '.join(versions)}"


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def measure_row(options: argparse.Namespace) -> None:
    """In a row's own process."""
    import torch
    from speed.rows import Run, measure, rows

    torch.set_num_threads(options.threads)
    clock_name = "cpu" if options.cpu_time else "wall"
    budget_s = BUDGET_S["full" if options.full else "bench"]
    run = Run(clock_name, budget_s, options.full, read_results(options.results))
    [row] = [r for r in rows() if r.id == options.row]
    try:
        result = measure(row, run)
    except Exception as error:
        # Whatever a side raises is the row's result; the other rows go on.
        lines = str(error).strip().splitlines() or [""]
        result = {"error": f"{type(error).__name__}: {lines[0]}"}
    options.reply.write_text(json.dumps(result))


def measure_peak(options: argparse.Namespace) -> None:
    """In the process of one side."""
    import torch
    from speed.peak import measure

    torch.set_num_threads(options.threads)
    measure(options.peak)


def read_results(file: Path) -> dict[str, Any]:
    """Results by row, the last of each."""
    if not file.exists():
        return {}
    results = [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
    return {result["id"]: result for result in results}


def write_report(options: argparse.Namespace) -> None:
    from speed.report import replace_between, report

    if not options.results.exists():
        sys.exit(f"--results {options.results}: there is no such file; run `make bench` first")
    text = options.report.read_text() if options.report.exists() else ""
    tables = report(read_results(options.results).values())
    options.report.write_text(replace_between(text, tables))


if __name__ == "__main__":
    main()
