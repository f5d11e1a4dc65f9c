"""`--dtype`, `--engine` and `--vllm.FIELD`, for evaluations: the settings of [rollout] that say what generates."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from language_self_play.cli import Parser
from language_self_play.errors import ConfigError

if TYPE_CHECKING:
    from language_self_play.config import Rollout

ENGINES = """\
engines: with --engine vllm answers come from vLLM, in a process of its own. --vllm.FIELD are the fields of
[rollout.vllm] (`lsp config rollout`), above all --vllm.python; unset they are those of the run that is
measured."""

SHORT, FULL = "--vllm.", "--rollout.vllm."
# What its flags begin with, as typed and in full.
ENGINE_SETTINGS = ("vllm", "rollout")
DTYPES = ("auto", "float32", "bfloat16")
# Of [rollout.vllm], what only a run that learns has a use for.
OF_TRAINING = ("sleep", "max_logprob_difference")


def add_engine_flags(parser: Parser) -> None:
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="of a model that answers")
    parser.add_argument(
        "--engine",
        choices=("transformers", "vllm"),
        default="transformers",
        help="what generates answers",
    )
    parser.set_defaults(vllm={})


def in_full(arguments: list[str]) -> list[str]:
    """The arguments with --vllm.FIELD as `lsp train` has it, so that it is read as there."""
    return [FULL + a.removeprefix(SHORT) if a.startswith(SHORT) else a for a in arguments]


def take_vllm(table: dict[str, Any]) -> dict[str, Any]:
    """What --vllm.FIELD flags have put into `table`, which loses it. Raises ConfigError."""
    rollout = table.pop("rollout", {})
    vllm = rollout.get("vllm", {}) if isinstance(rollout, dict) else None
    if not isinstance(vllm, dict) or set(rollout) - {"vllm"}:
        raise ConfigError(
            "--rollout: an evaluation has --engine, --vllm.FIELD and --batch-size in place of its settings"
        )
    if unused := [name for name in OF_TRAINING if name in vllm]:
        raise ConfigError(
            f"--vllm.{unused[0]}: has no effect where nothing learns, as in an evaluation; leave it out"
        )
    return vllm


def engine_settings(options: argparse.Namespace, models: list[str], temperature: float) -> Rollout:
    """[rollout] of an evaluation: the flags over the settings of the first of `models` that is a run.

    With vLLM it is looked for, and a server asked. Raises ConfigError.
    """
    from language_self_play.config import VLLM_TEMPERATURES, Config, with_other_engine
    from language_self_play.recipe_files import merge
    from language_self_play.run_folder import RunFolder

    runs = [run for model in models if (run := RunFolder.holding(Path(model))) is not None]
    stored = runs[0].config() if runs else {}
    stored = with_other_engine(stored, {"rollout": {"vllm": options.vllm}})
    own = stored.get("rollout", {}).get("vllm", {})
    rollout = {
        "engine": options.engine,
        "batch_size": options.batch_size,
        "vllm": merge(own, options.vllm),
    }
    # Validated as part of a run's settings, so that a mistake is the same sentence everywhere.
    rest = {"policy": {"path": "arena"}, "reward": {"arena": {"kind": "arena"}}}
    config = Config.from_table({**rest, "rollout": rollout})
    if options.engine != "vllm":
        if options.vllm:
            raise ConfigError(
                f"--vllm.{next(iter(options.vllm))}: is a setting of vLLM; add --engine vllm, or leave"
                " it out"
            )
        return config.rollout
    if not models:
        raise ConfigError("--engine vllm: both sides are files of answers; leave it out")
    low, high = VLLM_TEMPERATURES
    if temperature and not low <= temperature <= high:
        raise ConfigError(
            f"--temperature {temperature:g}: vLLM samples at {low} to {high}, or greedily at 0; choose"
            " one of those, or --engine transformers"
        )

    if config.rollout.vllm.server is not None:
        from language_self_play.sampling.vllm_server import ask_server

        ask_server(config.rollout.vllm)  # before anything of the user's is read
    else:
        from language_self_play.sampling.vllm_python import check_python

        check_python(config.rollout.vllm.python, f"{SHORT}python")
    return config.rollout
