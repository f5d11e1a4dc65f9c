"""`lsp eval alpaca`: AlpacaEval 2.0, of a model or of annotations that exist."""

from __future__ import annotations

import argparse
import os
import sys
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
    show,
)
from language_self_play.cli.evaluate import check_target
from language_self_play.errors import ConfigError, InputFileError

DIFFICULTY_FLAG = "--instruction-difficulty"

DESCRIPTION = f"""\
AlpacaEval 2.0: MODEL answers the 805 instructions, a judge compares its answers with the baseline's;
win rate overall and for the five subsets, length-controlled win rate. Or, with --annotations, the
figures of judgements that exist.

The instructions and the baseline's answers (gpt4_1106_preview) come from the hub unless files are named.
--baseline {OWN_COPY} lets MODEL answer twice: the paper's calibration, 26.5 % there and not 50, because a
tie is no win."""

EPILOG = f"""\
{JUDGES}

{ENGINES}

examples:
  lsp eval alpaca --annotations annotations.json.gz --json figures.json
  lsp eval alpaca runs/mine --judge.base_url https://api.openai.com/v1 --judge.model gpt-4o-mini
  lsp eval alpaca runs/mine --baseline {OWN_COPY} --temperature 0.01 --judge.kind local --judge.path ./m

{EXIT_CODES}"""


def run(arguments: list[str]) -> int:
    parser = Parser(prog="lsp eval alpaca", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", help="a run, a model, or a JSON file of answers"
    )
    parser.add_argument(
        "--baseline", metavar="MODEL_OR_FILE", help=f"whom to beat; `{OWN_COPY}` for MODEL itself"
    )
    parser.add_argument(
        "--instructions", metavar="FILE", type=Path, help="instructions with their `dataset`"
    )
    parser.add_argument(
        "--annotations", metavar="FILE", type=Path, help="score these judgements; nothing is asked"
    )
    parser.add_argument(
        DIFFICULTY_FLAG,
        metavar="FILE",
        type=Path,
        help="CSV or JSON, instruction or its number → difficulty, for length control",
    )
    add_flags(parser)
    options, judge = parse(parser, arguments)
    if options.annotations is not None:
        check_target("--json", options.json)
        return _score(options, bool(judge), parser)
    if options.model is None:
        raise ConfigError(
            "MODEL: name the model to measure, or a file of annotations by --annotations"
            " (`lsp eval alpaca --help` shows how it is used)"
        )
    look_ahead(options, options.model, options.baseline)

    from language_self_play.evaluate.outputs import (
        HUB_DATASET,
        HUB_FILE,
        hub_baseline,
        read_difficulties,
        read_instructions,
    )
    from language_self_play.evaluate.subject import subject

    is_file = options.baseline is not None and os.path.isfile(options.baseline)
    if options.instructions is not None:
        instructions = read_instructions(options.instructions, "--instructions")
    elif is_file:
        instructions = read_instructions(Path(options.baseline), "--baseline")
    baseline = options.baseline
    if baseline is None or not (is_file or options.instructions is not None):
        if not os.path.isfile(options.model):
            subject(options.model)  # a typing error is told before the hub is asked
        print(f"{HUB_DATASET}: the hub is asked for {HUB_FILE}", file=sys.stderr, flush=True)
        of_hub = hub_baseline()
        if options.instructions is None:
            instructions = read_instructions(of_hub, "the hub's")
        baseline = str(of_hub) if baseline is None else baseline
    difficulties = None
    if options.instruction_difficulty is not None:
        difficulties = read_difficulties(
            options.instruction_difficulty, [i.instruction for i in instructions], DIFFICULTY_FLAG
        )
    return compare(
        options.model,
        baseline,
        instructions,
        options,
        judge,
        "alpaca",
        "--baseline",
        options.instructions,
        difficulties,
    )


def _score(options: argparse.Namespace, has_judge: bool, parser: Parser) -> int:
    """The figures of annotations that exist."""
    used = ("annotations", "instructions", "instruction_difficulty", "json")
    unused = [name for name in vars(options) if name not in used]
    for flag, given in (
        *((_flag(name), vars(options)[name] != parser.get_default(name)) for name in unused),
        ("--judge", has_judge),
    ):
        if given:
            raise ConfigError(
                f"{flag}: is not used with --annotations, which holds both sides' answers and the"
                " verdicts; leave one of the two out"
            )

    from language_self_play.evaluate.outputs import (
        read_annotations,
        read_difficulties,
        read_instructions,
    )

    annotations, unjudged = read_annotations(options.annotations, "--annotations")
    judged = [a.instruction for a in annotations]
    order, subsets = judged, {}
    if options.instructions is not None:
        known = read_instructions(options.instructions, "--instructions")
        order, subsets = [i.instruction for i in known], {i.instruction: i.dataset for i in known}
        if unknown := [text for text in judged if text not in subsets]:
            raise InputFileError(
                f"{options.annotations}: {len(unknown)} of its instructions are not in"
                f" {options.instructions}, such as {unknown[0][:60]!r}"
            )
        annotations = [a._replace(dataset=a.dataset or subsets[a.instruction]) for a in annotations]
        if len(judged) < len(order):
            print(f"{len(order) - len(judged)} of the {len(order)} instructions were not judged")
    difficulties = None
    if options.instruction_difficulty is not None:
        of_all = read_difficulties(options.instruction_difficulty, order, DIFFICULTY_FLAG)
        difficulty_of = dict(zip(order, of_all, strict=True))
        difficulties = [difficulty_of[text] for text in judged]
    show(annotations, options.json, difficulties, len(unjudged))
    return 0


def _flag(name: str) -> str:
    return "MODEL" if name == "model" else f"--{name.replace('_', '-')}"
