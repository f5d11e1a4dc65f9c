"""`lsp eval win-rate`: how often one model's answers are preferred to another's."""

from __future__ import annotations

from pathlib import Path

from language_self_play.cli import Parser
from language_self_play.cli.engine_flags import ENGINES
from language_self_play.cli.eval_pairs import (
    EXIT_CODES,
    JUDGES,
    OWN_COPY,
    add_flags,
    compare,
    look_ahead,
    parse,
)

DESCRIPTION = f"""\
How often the answers of MODEL are preferred to those of BASELINE, instruction by instruction.

Each side is a run, a model folder, a hub id or `arena`, which answers first, or a JSON file of answers
(`instruction`, `output`). BASELINE may be `{OWN_COPY}`: MODEL answers twice, which calibrates the judge.
Answers and verdicts are kept as they come: the same command goes on where it stopped."""

EPILOG = f"""\
{JUDGES}

{ENGINES}

examples:
  lsp eval win-rate runs/mine base-model --prompts prompts.jsonl \\
    --judge.base_url http://localhost:8000/v1 --judge.model my-judge
  lsp eval win-rate a.json b.json --prompts prompts.jsonl --judge.kind reward_model --judge.path ./rm

{EXIT_CODES}"""


def run(arguments: list[str]) -> int:
    parser = Parser(prog="lsp eval win-rate", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("baseline", metavar="BASELINE")
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        type=Path,
        required=True,
        help="JSON or JSONL with a column `instruction`, `prompt`, `query` or `question`",
    )
    add_flags(parser)
    options, judge = parse(parser, arguments)
    look_ahead(options, options.model, options.baseline)

    from language_self_play.evaluate.outputs import read_instructions

    instructions = read_instructions(options.prompts, "--prompts")
    model, baseline, prompts = options.model, options.baseline, options.prompts
    return compare(model, baseline, instructions, options, judge, "win-rate", "BASELINE", prompts)
