"""`lsp eval`: measure a model. Each measure is a file of its own, `cli/eval_MEASURE.py`."""

from __future__ import annotations

import difflib
import json
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib import import_module
from pathlib import Path
from typing import Any

from language_self_play.cli import Parser
from language_self_play.durable import check_writable, replace_text
from language_self_play.errors import ConfigError, InputFileError, renaming

# The settings that a measure's own arguments stand for.
SETTING = re.compile(
    r"(?<![\w.-])(?:policy\.path|device(?= = )|(?:--)?rollout\.vllm\.(?=\w)|rollout\.vllm(?=:)"
    r"|rollout\.batch_size|(?<=set )dtype\b)"
)

# Seeds are below it; an own copy takes the one behind that of its model.
LAST_SEED = 2**31 - 1

# name -> (module, one line of help), in the order in which a newcomer meets them.
MEASURES = {
    "accuracy": (
        "language_self_play.cli.eval_accuracy",
        "on the arena's held-out questions, GSM8K, HumanEval, or any with keys",
    ),
    "win-rate": (
        "language_self_play.cli.eval_win_rate",
        "how often a model's answers are preferred to another's",
    ),
    "alpaca": (
        "language_self_play.cli.eval_alpaca",
        "AlpacaEval 2.0, of a model or of annotations that exist",
    ),
    "harness": (
        "language_self_play.cli.eval_harness",
        "any task of lm-eval, EleutherAI's harness",
    ),
    "table": (
        "language_self_play.cli.eval_table",
        "runs and files of results side by side, as the paper does",
    ),
}


def run(arguments: list[str]) -> int:
    """Dispatch to the measure that is asked for."""
    if arguments and arguments[0] in MEASURES:
        return import_module(MEASURES[arguments[0]][0]).run(arguments[1:])
    listing = "\n".join(f"  {name:<10}{line}" for name, (_, line) in MEASURES.items())
    parser = Parser(prog="lsp eval", description="Measure a model.", epilog=f"measures:\n{listing}")
    parser.add_argument("measure", metavar="MEASURE", help="`lsp eval MEASURE --help` tells more")
    if not arguments or arguments[0] in ("-h", "--help"):
        parser.parse_args(arguments[:1])
    near = difflib.get_close_matches(arguments[0], MEASURES, n=1)
    hint = f"did you mean {near[0]}?" if near else f"measures are {', '.join(MEASURES)}"
    raise ConfigError(f"MEASURE = {arguments[0]!r}: no such measure; {hint}")


def check_target(flag: str, file: Path | None) -> None:
    """Raises InputFileError before anything is measured if `file`, which `flag` names, can't be written."""
    if file is None:
        return
    if os.path.isdir(file):
        raise InputFileError(f"{flag} {file}: is a folder; name a file")
    if not os.path.isdir(file.parent):
        raise InputFileError(f"{flag} {file}: there is no folder {file.parent}")
    writing(flag, file, lambda: check_writable(file))


def check_folder(flag: str, folder: Path | None) -> None:
    """The same of a folder that is made when it is needed, with those above it."""
    if folder is None:
        return
    there = next(p for p in (folder, *folder.absolute().parents) if os.path.exists(p))
    if not there.is_dir():
        raise InputFileError(f"{flag} {folder}: {there} is a file; name a folder")
    writing(flag, folder, lambda: check_writable(there / "report.json"))


def as_typed(model: str) -> AbstractContextManager[None]:
    """What is raised within says `model` of the path of what is loaded, and flags of what they set."""
    names = {
        "policy.path": model,
        "device": "--device",
        "dtype": "--dtype",
        "--rollout.vllm.": "--vllm.",
        "rollout.vllm.": "--vllm.",
        "rollout.vllm": "--engine vllm",
        "rollout.batch_size": "--batch-size",
    }
    return renaming(lambda said: SETTING.sub(lambda found: names[found[0]], said))


def say(sentence: str) -> None:
    """Print what may be longer than a terminal's line, folded between words."""
    width = shutil.get_terminal_size().columns
    print(
        textwrap.fill(sentence, width, break_long_words=False, break_on_hyphens=False), flush=True
    )


def write_report(file: Path, report: dict[str, Any], flag: str = "--json") -> None:
    """Write what was measured as JSON, whole or not at all, and say so. Raises InputFileError."""
    writing(flag, file, lambda: replace_text(file, json.dumps(report, indent=1) + "\n"))
    print(f"{file}: written", file=sys.stderr)


def writing(flag: str, place: Path, write: Callable[[], None]) -> None:
    """Call `write`. Raises InputFileError that names the flag and what it named."""
    try:
        write()
    except OSError as error:
        raise InputFileError(f"{flag} {place}: can't be written ({error.strerror})") from None
