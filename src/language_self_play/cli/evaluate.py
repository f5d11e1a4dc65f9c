"""`lsp eval`: measure a model."""

from __future__ import annotations

import json
from pathlib import Path

from language_self_play.cli import Parser
from language_self_play.errors import ConfigError, InputFileError

EPILOG = """\
examples:
  lsp eval accuracy arena                    the built-in model
  lsp eval accuracy runs/arena/model         a trained one
  lsp eval accuracy runs/arena/model --json accuracy.json"""


def run(arguments: list[str]) -> int:
    """Dispatch to the measure that is asked for."""
    parser = Parser(prog="lsp eval", description="Measure a model.", epilog=EPILOG)
    measures = parser.add_subparsers(dest="measure", metavar="MEASURE", required=True)
    accuracy = measures.add_parser(
        "accuracy",
        help="exact accuracy on the arena's held-out questions",
        description="The exact probability of the right answer to each of the arena's held-out"
        " questions at temperature 1, and whether greedy decoding gives it.",
    )
    accuracy.add_argument(
        "model", metavar="MODEL", help="a run, a model folder, a hub id, or `arena`"
    )
    accuracy.add_argument("--json", metavar="FILE", type=Path, help="also write every question")
    accuracy.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    options = parser.parse_args(arguments)
    return _accuracy(options.model, options.device, options.json)


def _accuracy(model: str, device: str, json_file: Path | None) -> int:
    if json_file is not None and not json_file.parent.is_dir():
        raise InputFileError(f"--json {json_file}: there is no folder {json_file.parent}")
    if not model.strip():
        raise ConfigError("MODEL is empty; name a folder, a hub id, or `arena`")

    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from language_self_play.config import Config, Learner, Policy
    from language_self_play.evaluate.accuracy import Accuracy, arena_accuracy, evaluation_batches
    from language_self_play.policy import load_chat_model
    from language_self_play.pretrained import choose_device
    from language_self_play.recipe_files import merge
    from language_self_play.run_folder import RunFolder

    batches, system_prompt = evaluation_batches(Learner().tokens_per_micro_batch), None
    section = Policy(path=model)
    if (run := RunFolder.holding(Path(model))) is not None:
        # As the run evaluates it: with its chat template and system prompt.
        path = str(run.newest_model()) if Path(model) == run.folder else model
        config = Config.from_table(merge(run.config(), {"policy": {"path": path}}))
        section, system_prompt = config.policy, config.solver.system_prompt
    chat, weights = load_chat_model(section, choose_device(device))
    accuracy = arena_accuracy(weights, chat, batches, system_prompt)
    table = Table(title=Text(f"Held-out accuracy of {model} in %, with 95 % intervals"))
    for column in ("tier", "task", "questions", "sampled", "greedy"):
        table.add_column(column, justify="left" if column in ("tier", "task") else "right")

    def row(tier: str, task: str, part: Accuracy, style: str | None = None) -> None:
        cells = [f"{100 * m:.1f} ± {100 * h:.1f}" for m, h in (part.sampled(), part.greedy())]
        table.add_row(tier, task, str(len(part.results)), *cells, style=style)

    for tier in accuracy.tiers():
        of_tier = [r for r in accuracy.results if r.tier == tier]
        for task in dict.fromkeys(r.task for r in of_tier):
            row(tier, task, Accuracy([r for r in of_tier if r.task == task]))
        row(tier, "all", Accuracy(of_tier), "bold")
        table.add_section()
    row("all", "all", accuracy, "bold")
    Console().print(table)
    if json_file is not None:
        report = {**accuracy.metrics(), "questions": [asdict(r) for r in accuracy.results]}
        try:
            json_file.write_text(json.dumps(report, indent=1), "utf-8")
        except OSError as error:
            raise InputFileError(
                f"--json {json_file}: can't be written ({error.strerror})"
            ) from None
    return 0
