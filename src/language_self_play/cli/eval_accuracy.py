"""`lsp eval accuracy`: exact accuracy on the arena's held-out questions."""

from __future__ import annotations

from pathlib import Path

from language_self_play.cli import Parser
from language_self_play.cli.evaluate import check_report, write_report

DESCRIPTION = """\
The exact probability of the right answer to each of the arena's held-out questions at temperature 1,
and whether greedy decoding gives it."""

EPILOG = """\
examples:
  lsp eval accuracy arena                    the built-in model
  lsp eval accuracy runs/arena/model         a trained one
  lsp eval accuracy runs/arena/model --json accuracy.json"""


def run(arguments: list[str]) -> int:
    parser = Parser(prog="lsp eval accuracy", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument(
        "model", metavar="MODEL", help="a run, a model folder, a hub id, or `arena`"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write every question")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    options = parser.parse_args(arguments)
    return _accuracy(options.model, options.device, options.json)


def _accuracy(model: str, device: str, json_file: Path | None) -> int:
    from language_self_play.evaluate.subject import subject

    check_report(json_file)
    section, system_prompt = subject(model)

    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from language_self_play.config import Learner
    from language_self_play.evaluate.accuracy import Accuracy, arena_accuracy
    from language_self_play.policy import load_chat_model
    from language_self_play.pretrained import choose_device

    chat, weights = load_chat_model(section, choose_device(device))
    accuracy = arena_accuracy(weights, chat, Learner().tokens_per_micro_batch, system_prompt)
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
        write_report(
            json_file,
            {**accuracy.metrics(), "questions": [asdict(r) for r in accuracy.results]},
        )
    return 0
