"""What `lsp eval win-rate` and `lsp eval alpaca` share: flags, two sides, a judge, a table of figures."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from language_self_play.cli import Parser
from language_self_play.cli.engine_flags import (
    ENGINE_SETTINGS,
    add_engine_flags,
    engine_settings,
    in_full,
    take_vllm,
)
from language_self_play.cli.evaluate import (
    LAST_SEED,
    as_typed,
    check_folder,
    check_target,
    say,
    write_report,
    writing,
)
from language_self_play.errors import ConfigError, InputFileError
from language_self_play.wording import counted

if TYPE_CHECKING:
    from language_self_play.evaluate.answers import Answering
    from language_self_play.evaluate.outputs import Annotation, Output

OWN_COPY = "own-copy"
FILE_SUFFIXES = (".json", ".jsonl", ".gz")

JUDGES = """\
judges (flags --judge.FIELD, the fields of a [reward.NAME] of the same kind; `lsp config reward`):
  --judge.base_url URL --judge.model NAME        an OpenAI-compatible endpoint, asked in both orders
  --judge.kind reward_model --judge.path MODEL   a reward model
  --judge.kind local --judge.path MODEL          the built-in judge (fields of [self_reward])
  --judge.kind python --judge.function MODULE:FUNCTION    yours: (queries, answers) -> a score for each
  --judge.kind arena                             the right answer to an arena query"""

EXIT_CODES = """\
exit codes: 0 done, 1 internal error, 2 bad input, 3 a judge's score that is not finite,
75 the endpoint is away or gives no verdicts: the same command goes on where it stopped,
130 interrupted"""


def add_flags(parser: Parser) -> None:
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        help="folder of answers and annotations (by default in evaluations/, named by models and prompts, with one in it for each judge)",
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write every figure")
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="of answers; 0 is greedy (default)",
    )
    parser.add_argument(
        "--max-tokens", type=int, default=1024, metavar="N", help="longest answer (default 1024)"
    )
    parser.add_argument(
        "--batch-size", type=int, default=64, metavar="N", help="answers at once (default 64)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of answers at a temperature above 0")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    add_engine_flags(parser)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="make the answers, say what judging costs, don't judge",
    )


def parse(parser: Parser, arguments: list[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    """(the command's own options, the judge's settings). Raises ConfigError."""
    if not {"-h", "--help"}.isdisjoint(arguments):
        parser.parse_args(["--help"])

    from language_self_play.cli.overrides import split_overrides

    own = {flag for action in parser._actions for flag in action.option_strings}
    with as_typed("MODEL"):
        rest, table = split_overrides(in_full(arguments), own, ["judge", *ENGINE_SETTINGS])
    judge, vllm = table.pop("judge", {}), take_vllm(table)
    if table or not isinstance(judge, dict):
        name = next(iter(table), "judge")
        raise ConfigError(f"--{name}: no such flag (`{parser.prog} --help` shows how it is used)")
    options = parser.parse_args(rest)
    options.vllm = vllm
    return options, judge


def look_ahead(options: argparse.Namespace, model: str, baseline: str | None) -> None:
    """Look at what needs no file of the user's and no torch, and set `options.rollout`; ask its server.

    Raises ConfigError, or InputFileError for a place that can't be written.
    """
    _check_numbers(options)
    check_target("--json", options.json)
    check_folder("--out", options.out)
    # Without a name the baseline is a file of the hub.
    sampled = [n for n in (model, baseline) if n is not None and not os.path.isfile(n)]
    with as_typed("MODEL"):
        options.rollout = engine_settings(options, sampled, options.temperature)


def _check_numbers(options: argparse.Namespace) -> None:
    """Raises ConfigError for a number that answers can't be drawn with."""
    if not (math.isfinite(options.temperature) and options.temperature >= 0):
        raise ConfigError(f"--temperature {options.temperature:g}: must be 0 (greedy) or more")
    for name in ("max_tokens", "batch_size"):
        if getattr(options, name) < 1:
            flag = name.replace("_", "-")
            raise ConfigError(f"--{flag} {getattr(options, name)}: must be at least 1")
    if not 0 <= options.seed < LAST_SEED:
        raise ConfigError(f"--seed {options.seed}: must be from 0 to {LAST_SEED - 1}")


def compare(
    model: str,
    baseline: str,
    instructions: Sequence[Output],
    options: argparse.Namespace,
    judge_settings: dict[str, Any],
    measure: str,
    baseline_flag: str,
    prompts: Path | None,
    difficulties: Sequence[float] | None = None,
) -> int:
    """Answers of both sides, verdicts, files and figures. Whatever can be wrong is looked at first.

    `look_ahead` was. `options.out` then holds model_outputs.json, reference_outputs.json, annotations.json,
    leaderboard.csv and report.json.
    """
    own_copy = baseline == OWN_COPY
    sides = {"MODEL": _side(model, "MODEL", instructions)}
    if not own_copy:
        sides[baseline_flag] = _side(baseline, baseline_flag, instructions)
    elif isinstance(sides["MODEL"], list):
        raise ConfigError(
            f"{OWN_COPY}: {model} is a file of answers; only a model can answer again"
        )

    from language_self_play.evaluate.outputs import OWN_COPY as OWN_COPY_NAME
    from language_self_play.evaluate.outputs import write_annotations, write_outputs
    from language_self_play.evaluate.pair_judges import annotate, build_pair_judge, pairs_to_ask
    from language_self_play.pretrained import choose_device

    with as_typed("MODEL"):
        choose_device(options.device)  # what is no device, is told before anything is loaded
    judge = build_pair_judge(judge_settings, options.device)
    if doubt := judge.doubt([i.instruction for i in instructions]):
        warnings.warn(doubt, stacklevel=2)
    kept = out = options.out
    if out is None:
        # Answers are kept one folder above the judge's, where another judge finds them.
        kept = _default_folder(measure, [model, baseline, *([prompts] if prompts else [])], options)
        out = kept / _folder_name([judge.name], judge_settings)
    try:
        check_folder("--out", out)
        _refuse_other_judge(out, judge.name)
        writing("--out", out, lambda: out.mkdir(parents=True, exist_ok=True))
        with as_typed("MODEL"):
            ours = _outputs(sides["MODEL"], model, instructions, options, kept, options.seed)
        with as_typed("MODEL" if own_copy else baseline_flag):
            if own_copy:
                name, side, seed = ours[0].generator + OWN_COPY_NAME, "MODEL", options.seed + 1
            else:
                name, side, seed = baseline, baseline_flag, options.seed
            theirs = _outputs(sides[side], name, instructions, options, kept, seed)
        writing("--out", out, lambda: write_outputs(out / "model_outputs.json", ours))
        writing("--out", out, lambda: write_outputs(out / "reference_outputs.json", theirs))
        # Of one's own copy what the judge makes of equal answers is the question.
        asked = pairs_to_ask(theirs, ours, ask_equal=own_copy)
        if asked:
            say(judge.plan(asked))
        if equal := len(ours) - len(asked):
            tie = "ties" if equal == 1 else "tie"
            say(f"{counted(equal, 'pair')} of equal answers {tie} unasked")
        if options.dry_run:
            say(f"Nothing was judged. The answers are in {out}.")
            return 0
        annotations = annotate(judge, theirs, ours, _progress("judged"), ask_equal=own_copy)
    finally:
        judge.close()
    writing("--out", out, lambda: write_annotations(out / "annotations.json", annotations))
    unjudged = len(ours) - len(annotations)
    if difficulties is not None:
        of = dict(zip((o.instruction for o in ours), difficulties, strict=True))
        difficulties = [of[a.instruction] for a in annotations]
    show(annotations, options.json, difficulties, unjudged, out=out, costs=judge.spent)
    return 0


def show(
    annotations: Sequence[Annotation],
    json_file: Path | None,
    difficulties: Sequence[float] | None = None,
    unjudged: int = 0,
    out: Path | None = None,
    costs: dict[str, float] | None = None,
) -> None:
    """Print the figures, and write them where they are wanted."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from language_self_play.durable import replace_text
    from language_self_play.evaluate.outputs import write_leaderboard
    from language_self_play.evaluate.pair_report import leaderboard_row, pair_report

    report = pair_report(annotations, difficulties, unjudged)
    if costs:
        report["costs"] = costs
    if out is not None:
        row = leaderboard_row(report)
        writing(
            "--out", out, lambda: write_leaderboard(out / "leaderboard.csv", report["model"], row)
        )
        text = json.dumps(report, indent=1) + "\n"
        writing("--out", out, lambda: replace_text(out / "report.json", text))
    if json_file is not None:
        write_report(json_file, report)
    title = f"{report['model']} against {report['baseline']}, judged by {report['annotator']}"
    table = Table(title=Text(title))
    for column in ("subset", "pairs", "win rate", "standard error", "wins", "ties", "losses"):
        table.add_column(column, justify="left" if column == "subset" else "right")
    rows = [*report["subsets"].items(), ("all", report)]
    for name, part in rows:
        rates = (_number(part[c]) for c in ("win_rate", "standard_error"))
        counts = (part[c] for c in ("n_total", "n_wins", "n_draws", "n_wins_base"))
        total, *rest = map(str, counts)
        table.add_row(Text(name), total, *rates, *rest, style="bold" if name == "all" else None)
    Console().print(table)
    for sentence in _sentences(report):
        say(sentence)
    if out is not None:
        say(f"Answers, annotations and figures are in {out}.")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _sentences(report: dict[str, Any]) -> list[str]:
    """What the table can't say: intervals, length, order, and reasons to doubt."""
    low, high = report["win_rate_ci95"]
    by = report["length_control"]["difficulties"]
    error = report["lc_standard_error"]
    of_leaderboard = "" if error is None else f", standard error {error:.2f} as AlpacaEval's"
    lines = [
        f"Win rate {report['win_rate']:.2f} % [{low:.2f}, {high:.2f}], a 95 % interval over"
        f" instructions; with ties as losses {report['strict_win_rate']:.2f} %.",
        f"Length-controlled win rate {report['length_controlled_win_rate']:.2f} %{of_leaderboard} (difficulty by"
        f" {'the table' if by == 'table' else 'the ' + by}); answers have"
        f" {report['avg_length']:.0f} characters, the baseline's {report['avg_length_baseline']:.0f}.",
    ]
    if bias := report.get("position_bias"):
        lines.append(
            f"Order, of {counted(bias['n'], 'pair')} asked: the answer shown first is preferred"
            f" {100 * bias['first']:.1f} % of the time (50 is no bias); {100 * bias['flipped']:.1f} % of"
            f" pairs name another winner in the other order, {100 * bias['tied']:.1f} % of judgements are"
            " ties."
        )
    if equal := report["n_equal"]:
        has = "has" if equal == 1 else "have"
        lines.append(f"{equal:,} of the {counted(report['n_total'], 'pair')} {has} equal answers.")
    if unjudged := report["n_unjudged"]:
        are = "has no verdict and is" if unjudged == 1 else "have no verdict and are"
        lines.append(f"{counted(unjudged, 'pair')} {are} left out.")
    for side, key in (("model", "repeated_answer"), ("baseline", "repeated_answer_baseline")):
        said = report[key]
        if said["suspect"]:
            lines.append(
                f"WARNING: the {side} gives one and the same answer to {said['count']} of"
                f" {report['n_total']} instructions: {said['answer'][:60]!r}. That is no win, whatever"
                " the judge says."
            )
    if costs := report.get("costs"):
        usd = f", {costs['usd']:.4f} USD at the prices given" if costs["usd"] else ""
        lines.append(
            f"The judge took {counted(int(costs['requests']), 'request')}"
            f" ({counted(int(costs['retries']), 'repeat')}),"
            f" {costs['input_tokens']:,.0f} tokens read and {costs['output_tokens']:,.0f} written{usd}."
        )
    return lines


# ---------------------------------------------------------------- the two sides


def _side(name: str, setting: str, instructions: Sequence[Output]) -> Any:
    """Answers from a file that belong to `instructions`; or what to load, and its system prompt."""
    path = Path(name)
    if os.path.isfile(name) or (name.endswith(FILE_SUFFIXES) and not os.path.isdir(name)):
        from language_self_play.evaluate.outputs import in_order, read_outputs

        return in_order(path, read_outputs(path, setting), instructions)

    from language_self_play.evaluate.subject import subject

    return subject(name, setting)


def _outputs(
    side: Any,
    name: str,
    instructions: Sequence[Output],
    options: argparse.Namespace,
    kept: Path,
    seed: int,
) -> list[Output]:
    if isinstance(side, list):
        return side

    from language_self_play.evaluate.answers import answer
    from language_self_play.evaluate.outputs import Output

    section, system_prompt = side
    texts = answer(
        section,
        system_prompt,
        [i.instruction for i in instructions],
        _answering(options, seed),
        kept,
        _progress(f"{name}: answered"),
    )
    return [
        Output(i.instruction, text, name, i.dataset)
        for i, text in zip(instructions, texts, strict=True)
    ]


def _refuse_other_judge(out: Path, judge: str) -> None:
    """Raises ConfigError where the verdicts of another judge lie, which would be lost."""
    from language_self_play.evaluate.outputs import read_annotations

    file = out / "annotations.json"
    if not os.path.isfile(file):
        return
    try:
        verdicts, _ = read_annotations(file, "--out")
    except InputFileError:
        return  # it is of no use to anybody
    others = sorted({v.annotator for v in verdicts if v.annotator} - {judge})
    if others:
        raise ConfigError(
            f"--out {out}: holds the verdicts of {others[0]}, and {judge} would replace them; name another"
            " folder, or none: then each judge has its own"
        )


def _answering(options: argparse.Namespace, seed: int) -> Answering:
    from language_self_play.evaluate.answers import Answering

    return Answering(
        options.temperature,
        options.max_tokens,
        options.rollout,
        seed,
        options.device,
        options.dtype,
    )


def _progress(what: str) -> Any:
    """Tells how far something is, on standard error: one line that is written over on a terminal."""
    live = sys.stderr.isatty()

    def tell(done: int, of: int) -> None:
        # What comes next, a sentence of what went wrong too, is written over it.
        end = "\r" if live and done < of else "\n"
        print(f"{what} {done} of {of}", end=end, file=sys.stderr, flush=True)

    return tell


def _default_folder(measure: str, named: Sequence[str | Path], options: argparse.Namespace) -> Path:
    """One for all that is measured, whoever judges: the models, the file of prompts, how they answer."""
    name = _folder_name(named, _answering(options, options.seed).decisive)
    return Path("evaluations") / f"{measure}-{name}"


def _folder_name(named: Sequence[str | Path], settings: Any) -> str:
    """The last part of each name, and a digest of the whole names and `settings`."""
    whole = json.dumps([[str(name) for name in named], settings], sort_keys=True, default=str)
    digest = hashlib.sha256(whole.encode()).hexdigest()[:8]
    return "-".join([*map(_last_part, named), digest])


def _last_part(name: str | Path) -> str:
    stem = Path(name).name.strip(".")
    for suffix in (".gz", ".jsonl", ".json"):
        stem = stem.removesuffix(suffix)
    cut = re.sub(r"[^\w.-]+", "-", stem).encode()[:40]
    return cut.decode(errors="ignore") or "model"
