"""The `lsp` command. Nothing here imports torch; a subcommand imports what it runs when it runs."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import signal
import sys
import textwrap
import time
import traceback
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from importlib import import_module
from itertools import groupby
from typing import Any, NoReturn

from language_self_play import __version__
from language_self_play.errors import (
    ConfigError,
    InputFileError,
    LspError,
    ModelError,
    Paused,
    RunFolderError,
    renaming,
)

# name -> (module, one line of help), in the order in which a newcomer meets them.
COMMANDS = {
    "train": ("language_self_play.cli.train", "play the game and learn from it"),
    "eval": ("language_self_play.cli.evaluate", "measure a model: accuracy, win rate, AlpacaEval"),
    "play": ("language_self_play.cli.play", "watch a model play both roles, or play against it"),
    "push": ("language_self_play.cli.push", "upload a trained model to the Hugging Face hub"),
    "vllm-serve": (
        "language_self_play.cli.vllm_serve",
        "serve a model with vLLM, for runs to sample",
    ),
    "recipes": ("language_self_play.cli.recipes", "list, show and copy the shipped recipes"),
    "config": ("language_self_play.cli.config", "every setting with type, default and meaning"),
}

INTERNAL_ERROR, INTERRUPTED = 1, 130


class Paragraphs(argparse.HelpFormatter):
    """Lines that begin in the first column are one paragraph, filled; others stay as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        filled: list[str] = []
        for is_prose, group in groupby(text.splitlines(), lambda line: line[:1].strip() != ""):
            lines = list(group)
            if is_prose:
                prose = " ".join(lines)
                lines = textwrap.wrap(prose, width, break_on_hyphens=False, break_long_words=False)
            filled += lines
        return "\n".join(filled)


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one sentence, raised as ConfigError."""

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, formatter_class=Paragraphs, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (`{self.prog} --help` shows how it is used)")


def naming_model() -> AbstractContextManager[None]:
    """What is said within names the argument MODEL, where it is about policy.path."""
    return renaming(lambda said: re.sub(r"(?<![\w.-])policy\.path\b", "MODEL", said))


# Seconds in which a rank of the same host comes to tell what this one has met, too.
LINGER_S = 10


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0 done, 1 internal error, 2 bad input, 3 stopped by non-finite numbers (or a sampler that is not the policy),
    75 paused and resumable, 130 interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # terminals without V̄ or …
    warnings.showwarning = _show_warning
    # The hub's client tells of each of its repeats; what fails is our sentence to say.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    try:
        try:
            return _run(arguments)
        finally:
            sys.stdout.flush()
    except LspError as error:
        if _speaks(error):
            for line in str(error).splitlines():
                print(f"{_name()}: {line}", file=sys.stderr)
        elif not error.agreed:
            time.sleep(LINGER_S)  # a launcher kills the others when one ends: who tells ends first
        return error.exit_code
    except KeyboardInterrupt as interrupt:
        if argv is None:  # the process is ours, and ends: one more Ctrl-C has nothing to add
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        if _rank() == 0:
            print(f"\nlsp: {interrupt if interrupt.args else 'interrupted'}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has left (`lsp config | head`); there is no one to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # met, and seen to, by rich
            return 0
        raise
    except Exception as error:
        if os.environ.get("LSP_TRACEBACK"):
            traceback.print_exc()
        print(
            f"{_name()}: internal error: {type(error).__name__}: {error}."
            " This is a bug; LSP_TRACEBACK=1 shows where, please report it",
            file=sys.stderr,
        )
        return INTERNAL_ERROR


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    if _rank() == 0:
        print(f"lsp: warning: {message}", file=sys.stderr)


def _rank() -> int:
    """Which of the processes that torchrun started this is; 0 without it."""
    rank = os.environ.get("RANK", "")
    return int(rank) if rank.isdecimal() else 0


def _name() -> str:
    return f"lsp (rank {_rank()})" if _rank() else "lsp"


def _speaks(error: LspError) -> bool:
    """Whether it is for this rank to tell, and not for another that meets the same.

    What all agree on the first one tells; settings and files are the same for all ranks of a host.
    """
    if error.agreed or isinstance(error, Paused):
        return _rank() == 0
    of_host = (ConfigError, InputFileError, ModelError, RunFolderError)
    return os.environ.get("LOCAL_RANK", "0") == "0" or not isinstance(error, of_host)


def _run(arguments: list[str]) -> int:
    if arguments and arguments[0] in COMMANDS:
        return import_module(COMMANDS[arguments[0]][0]).run(arguments[1:])
    listing = "\n".join(f"  {name:<13}{line}" for name, (_, line) in COMMANDS.items())
    parser = Parser(
        prog="lsp",
        description="Language Self-Play: improve a language model without training data.",
        epilog=f"commands:\n{listing}\n\nstart with:\n  lsp train arena",
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("command", metavar="COMMAND", help="`lsp COMMAND --help` tells more")
    if not arguments:
        parser.print_help()
        return 0
    if arguments[0] in ("-h", "--help", "--version"):
        parser.parse_args(arguments[:1])
    kind = "option" if arguments[0].startswith("-") else "command"
    near = difflib.get_close_matches(arguments[0], [*COMMANDS, "--help", "--version"], n=1)
    hint = f"did you mean {near[0]}?" if near else f"commands are {', '.join(COMMANDS)}"
    raise ConfigError(f"{arguments[0]!r}: no such {kind}; {hint}")
