"""`lsp train`: play the game and learn from it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from language_self_play.cli import Parser
from language_self_play.errors import ConfigError

if TYPE_CHECKING:
    from language_self_play.run_folder import RunFolder

DESCRIPTION = """\
Play Language Self-Play (or its zero-sum form, or GRPO) and learn from it.

RECIPE is a TOML file or the name of a shipped recipe (`lsp recipes`). Any setting can be given as
a flag, such as --steps 100 or --policy.path ./my-model; `lsp config` lists them all."""

EXAMPLES = """\
examples:
  lsp train arena                                the built-in game: minutes
  lsp train arena --algorithm lsp-zero --seed 1  the same without self-reward
  lsp train my.toml --run runs/first --dry-run   check it, show its arithmetic
  lsp train --resume runs/first                  go on where it stopped

exit codes: 0 done, 1 internal error, 2 bad input, 3 stopped by non-finite numbers or by a
sampler that is not the policy (rollout.vllm.max_logprob_difference), 75 paused and resumable,
130 interrupted"""


def run(arguments: list[str]) -> int:
    """Parse, check the whole configuration, then play."""
    parser = Parser(prog="lsp train", description=DESCRIPTION, epilog=EXAMPLES)
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="a TOML file or a shipped name")
    parser.add_argument("--run", metavar="DIR", help="the run folder (default: a new one in runs/)")
    parser.add_argument("--resume", metavar="DIR", help="go on with the run in DIR")
    parser.add_argument(
        "--take-over",
        action="store_true",
        help="if run.lock names a process of another machine: it has ended, play in its place",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check, show the arithmetic, load no weights"
    )
    if not {"-h", "--help"}.isdisjoint(arguments):
        parser.parse_args(["--help"])

    from language_self_play.cli.overrides import split_overrides

    own, overrides = split_overrides(arguments, {"--run", "--resume", "--dry-run", "--take-over"})
    options = parser.parse_args(own)
    for name in ("run", "resume"):
        if getattr(options, name) == "":
            raise ConfigError(f"--{name} is empty; name a folder")
    if options.resume and (options.recipe or options.run):
        raise ConfigError(
            "--resume takes its recipe and folder from the run; leave RECIPE and --run out"
        )
    if not options.resume and not options.recipe:
        raise ConfigError("which RECIPE? A TOML file or a shipped name, such as: lsp train arena")

    from language_self_play.config import Config
    from language_self_play.lock import RunLock
    from language_self_play.run_folder import RunFolder, free_run_folder

    is_first = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun started
    if options.resume:
        folder = RunFolder(options.resume)
        config = folder.resumed_config(overrides)
        if folder.has_finished(config.steps) and not options.dry_run:
            if not is_first:
                return 0
            print(f"All {config.steps} steps are played; --steps N plays on, to a higher N.\n")
            return summarize(folder)
    else:
        config = Config.from_recipe(options.recipe, **overrides)
        folder = RunFolder(options.run or free_run_folder(Path(options.recipe).stem))
        folder.refuse_if_used()
    if options.dry_run:
        from language_self_play.plan import print_plan

        print_plan(config)
        return 0

    if options.resume and is_first:
        RunLock(folder.folder, options.take_over).refuse_if_held()  # before seconds of loading
    if is_first:
        print("Loading torch and the model …", flush=True)
    from language_self_play.train import self_play

    self_play(config, folder.folder, resume=bool(options.resume), take_over=options.take_over)

    return summarize(folder) if is_first else 0


def summarize(folder: RunFolder) -> int:
    from rich.console import Console

    from language_self_play.summary import print_summary

    print_summary(folder, Console())
    return 0
