"""Peak memory of one side, in a process of its own: growth of the resident set over the imports."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from language_self_play.metrics import peak_resident_bytes
from speed.models import Work, save_model

# The optimizer's moments come into being in the first step, so only the second has all there is.
STEPS = 2


def peak(side: str, work: Work, **options: Any) -> int:
    """Bytes by which `side` grows a fresh process that has imported everything."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        save_model(work, folder)
        request = {"side": side, "work": asdict(work), "folder": str(folder), "options": options}
        command = [sys.executable, Path(__file__).parents[1] / "bench.py"]
        command += ["--peak", json.dumps(request), "--threads", str(torch.get_num_threads())]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            raise RuntimeError(f"peak memory of {side}: {lines[-1]}")
        return json.loads(done.stdout.splitlines()[-1])


def measure(request: str) -> None:
    """In the fresh process: print how many bytes it grew by."""
    asked = json.loads(request)
    side = SIDES[asked["side"]]
    work, folder, options = Work(**asked["work"]), Path(asked["folder"]), asked["options"]
    import language_self_play.learner  # noqa: F401
    import speed.generate_side
    import speed.ours
    import speed.padded

    if side is _trl_step:
        import speed.trl_side  # noqa: F401
    warm = torch.randn(64, 64, requires_grad=True)
    (warm @ warm).sum().backward()  # what the first product and its gradient load
    before = peak_resident_bytes()
    side(work, folder, **options)
    print(peak_resident_bytes() - before)


def _our_step(work: Work, folder: Path) -> None:
    from speed.ours import Ours

    ours = Ours(work, folder)
    for _ in range(STEPS):
        ours.step()


def _trl_step(work: Work, folder: Path, settings: tuple[int, str | None]) -> None:
    from speed.timing import CLOCKS
    from speed.trl_side import Settings, Trl

    trl = Trl(work, folder, Settings(*settings))
    taken: list[float] = []

    def after_step(seconds: float) -> bool:
        taken.append(seconds)
        return len(taken) == STEPS

    trl.train(CLOCKS["wall"], after_step)


def _our_sampling(work: Work, folder: Path) -> None:
    from speed.ours import Ours

    Ours(_without_reference(work), folder).sample()


def _generate(work: Work, folder: Path) -> None:
    from speed.generate_side import Generate

    Generate(work, folder).sample()


def _our_learning(work: Work, folder: Path) -> None:
    from speed.ours import Ours
    from speed.replay import played

    ours = Ours(work, folder)
    roles = played(work)
    for _ in range(STEPS):
        ours.learner.step(roles[1], roles[0], 1.0)


def _padded(work: Work, folder: Path, rows: int) -> None:
    from speed.padded import Padded
    from speed.replay import played

    padded = Padded(work, folder, rows)
    for _ in range(STEPS):
        padded.step(played(work))


def _without_reference(work: Work) -> Work:
    return Work(**{**asdict(work), "beta": 0.0})


SIDES = {
    f.__name__.lstrip("_"): f
    for f in (_our_step, _trl_step, _our_sampling, _generate, _our_learning, _padded)
}
