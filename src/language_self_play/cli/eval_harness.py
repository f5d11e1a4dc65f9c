"""`lsp eval harness`: any task of lm-eval, EleutherAI's harness."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from language_self_play.cli import Parser
from language_self_play.cli.evaluate import as_typed, check_target, write_report
from language_self_play.errors import ConfigError, InputFileError

DESCRIPTION = """\
Any task of lm-eval (pip install 'language-self-play[harness]') on MODEL: a run, a model folder, a hub id,
an adapter, or `arena`. A run's system prompt is given with --chat only. Tasks load their data from the
hub, unless they are files of your own in --include-path."""

EPILOG = """\
examples:
  lsp eval harness runs/mine --tasks gsm8k,hellaswag --limit 100
  lsp eval harness ./model --tasks ifeval --chat --json ifeval.json
  lsp eval harness ./model --tasks mine --include-path ./tasks"""


def run(arguments: list[str]) -> int:
    parser = Parser(prog="lsp eval harness", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--tasks", metavar="A,B", required=True, help="lm-eval's names")
    parser.add_argument("--include-path", metavar="DIR", type=Path, help="tasks of your own")
    parser.add_argument(
        "--num-fewshot", metavar="K", type=int, help="examples before each question"
    )
    parser.add_argument("--limit", metavar="N", type=int, help="questions of each task")
    parser.add_argument("--batch-size", metavar="B", type=int, default=1)
    parser.add_argument("--chat", action="store_true", help="speak through the chat template")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write lm-eval's results")
    options = parser.parse_args(arguments)
    check_target("--json", options.json)
    for name, least in (("num_fewshot", 0), ("limit", 1), ("batch_size", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} = {value}: must be at least {least}")
    tasks = [task.strip() for task in options.tasks.split(",") if task.strip()]
    if not tasks:
        raise ConfigError("--tasks is empty; name tasks of lm-eval, such as gsm8k,hellaswag")
    if options.include_path is not None and not os.path.isdir(options.include_path):
        raise InputFileError(f"--include-path {options.include_path}: no such folder")

    from language_self_play.evaluate.subject import subject

    section, system_prompt = subject(options.model)

    from language_self_play.evaluate.harness import run_harness

    with as_typed("MODEL"):
        results = run_harness(
            section,
            tasks,
            include_path=options.include_path,
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            batch_size=options.batch_size,
            device=options.device,
            chat_template=options.chat,
            system_prompt=system_prompt if options.chat else None,
        )
    _print(options.model, results)
    if options.json is not None:
        kept = ("results", "groups", "n-shot", "versions", "higher_is_better", "n-samples")
        write_report(
            options.json, {"model": options.model, **{k: results[k] for k in kept if k in results}}
        )
    return 0


def _print(model: str, results: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(f"{model} in lm-eval"))
    for column in ("task", "measure", "value", "standard error"):
        table.add_column(column, justify="right" if column[0] in "vs" else "left")
    for task, values in results["results"].items():
        for name, value in values.items():
            measure, _, of = name.partition(",")
            if measure.endswith("_stderr") or isinstance(value, str) or name == "sample_len":
                continue
            error = values.get(f"{measure}_stderr,{of}")
            shown = "" if error in (None, "N/A") else f"{error:.4f}"
            label = measure if of in ("", "none") else f"{measure} ({of})"
            table.add_row(Text(task), Text(label), f"{value:.4f}", shown)
    Console().print(table)
