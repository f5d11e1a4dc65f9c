"""The scripts of docs/slurm.md and docs/kubernetes.md, as they stand there, with real runs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from language_self_play.run_folder import RunFolder

DOCS = Path(__file__).parent.parent / "docs"
RECIPE = """
algorithm = "lsp-zero"
steps = {steps}
threads = 1
device = "cpu"
[policy]
path = "arena"
[challenger]
prompt = "arena"
num_queries = 4
[solver]
group_size = 3
[reward.main]
kind = "arena"
[log]
progress = "none"
"""
ANOTHER_HOSTS = {
    "host": "gpu-17",
    "pid": 4321,
    "started": 5,
    "boot": "another",
    "machine": "another",
}
LONG_S = 120


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    """A PATH with this Python's `lsp`, and a `scontrol` that writes down what it is told."""
    commands = tmp_path / "bin"
    commands.mkdir()
    (commands / "lsp").write_text(f'#!/bin/sh\nexec {sys.executable} -m language_self_play "$@"\n')
    (commands / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/told\n')
    for command in commands.iterdir():
        command.chmod(0o755)
    return {**os.environ, "PATH": f"{commands}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}


def script_of(page: str, language: str) -> str:
    [script] = re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    return script


def leave_locked(run: Path) -> None:
    (run / "run.lock").write_text(json.dumps(ANOTHER_HOSTS) + "\n")


def start(script: str, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen([*script.split(), *arguments], text=True, **pipes, **options)


@pytest.mark.slow
def test_a_slurm_job_is_requeued_when_paused_and_goes_on_behind_a_dead_nodes_lock(
    tmp_path, environment
):
    (tmp_path / "lsp.sbatch").write_text(script_of("slurm.md", "bash"))
    (tmp_path / "my.toml").write_text(RECIPE.format(steps=2000))
    arguments = ("bash", f"{tmp_path}/lsp.sbatch", f"{tmp_path}/my.toml", f"{tmp_path}/run")
    run = RunFolder(tmp_path / "run")

    first = start(*arguments, env=environment)
    began = time.monotonic()
    while not run.metrics_file.is_file() and time.monotonic() - began < LONG_S:
        time.sleep(0.1)
    first.send_signal(signal.SIGTERM)  # to the script, as Slurm does before the time limit
    output, _ = first.communicate(timeout=LONG_S)
    assert first.returncode == 0, output
    assert "paused; back into the queue" in output
    assert (tmp_path / "told").read_text() == "requeue 7\n"
    steps = len(list(run.metrics()))
    assert 0 < steps < 2000

    leave_locked(run.folder)
    refused = start(*arguments, env=environment)
    output, _ = refused.communicate(timeout=LONG_S)
    assert refused.returncode == 2, output
    assert "process 4321 on gpu-17 plays this run" in output

    config = run.config_file.read_text()
    run.config_file.write_text(config.replace("steps = 2000", f"steps = {steps + 1}"))
    requeued = start(*arguments, env={**environment, "SLURM_RESTART_COUNT": "1"})
    output, _ = requeued.communicate(timeout=LONG_S)
    assert requeued.returncode == 0, output
    assert "process 4321 on gpu-17 held this run and has ended, as --take-over says" in output
    assert len(list(run.metrics())) == steps + 1
    assert not (run.folder / "run.lock").exists()


@pytest.mark.slow
def test_a_pod_starts_a_run_and_the_next_goes_on_behind_a_dead_pods_lock(tmp_path, environment):
    lines = re.search(r"            - \|\n((?: {14}.*\n)+)", script_of("kubernetes.md", "yaml"))
    assert lines is not None
    script = lines[1].replace("/runs/", f"{tmp_path}/runs/").replace("/recipes/", f"{tmp_path}/")
    (tmp_path / "my.toml").write_text(RECIPE.format(steps=1))
    run = RunFolder(tmp_path / "runs" / "first")
    for steps in (1, 2):
        pod = start("sh -c", script, env=environment)
        output, _ = pod.communicate(timeout=LONG_S)
        assert pod.returncode == 0, output
        assert len(list(run.metrics())) == steps
        leave_locked(run.folder)
        config = run.config_file.read_text()
        run.config_file.write_text(config.replace("steps = 1\n", "steps = 2\n"))
    assert "gpu-17 held this run and has ended, as --take-over says" in output
