"""`lsp eval accuracy`: on the arena's held-out questions, or on any questions with keys."""

from __future__ import annotations

import difflib
import math
import os
import re
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from language_self_play.cli import Parser
from language_self_play.cli.engine_flags import (
    ENGINE_SETTINGS,
    ENGINES,
    add_engine_flags,
    engine_settings,
    in_full,
    take_vllm,
)
from language_self_play.cli.evaluate import LAST_SEED, as_typed, check_target, write_report
from language_self_play.errors import ConfigError, InputFileError, NonFiniteError, renaming
from language_self_play.wording import counted

if TYPE_CHECKING:
    from language_self_play.config import QuestionSet
    from language_self_play.evaluate.exam import Exam
    from language_self_play.evaluate.intervals import Interval

DESCRIPTION = """\
How many questions MODEL answers right, with 95 % intervals.

SET is `arena` (the default): the exact probability of the right answer to each of the arena's held-out
questions at temperature 1, and whether greedy decoding gives it, in float32 unless --dtype says otherwise.
Or it is a file of questions with keys, or a hub id: GSM8K, MATH, HumanEval and their kin. NAME=FILE names
it. Or it is the name of a set in MODEL's own [eval.accuracy.NAME].

Every setting of [eval.accuracy.NAME] is a flag here (`lsp config eval.accuracy`); --limit is 0, all
questions, unless given."""

EPILOG = f"""\
{ENGINES}

examples:
  lsp eval accuracy arena                                the built-in model
  lsp eval accuracy runs/arena --json accuracy.json      a trained one, question by question
  lsp eval accuracy ./model gsm8k=gsm8k/test.jsonl --limit 200 --json gsm8k.json
  lsp eval accuracy ./model HumanEval.jsonl.gz --num_answers 20 --temperature 0.8 --pass_at "[1, 10]"
  lsp eval accuracy ./model openai/gsm8k --subset main

With --json FILE answers are kept in FILE.part as they come: after Ctrl-C the same command goes on."""

FILE_SUFFIXES = (".json", ".jsonl", ".gz", ".csv", ".tsv", ".parquet", ".arrow")
# The setting of a question set, its name and its field.
QUESTION_SETTING = re.compile(r"\beval\.accuracy(?:\.([\w-]+))?(?:\.(\w+))?(?![\w-])")
OWN_FLAGS = {"--json", "--device", "--dtype", "--seed", "--batch-size", "--engine"}
# Questions that are asked, checked and kept together.
BATCH = 32


def run(arguments: list[str]) -> int:
    parser = Parser(prog="lsp eval accuracy", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument(
        "model", metavar="MODEL", help="a run, a model folder, a hub id, or `arena`"
    )
    parser.add_argument(
        "set", metavar="SET", nargs="?", default="arena", help="`arena`, a file, a hub id, a name"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write every question")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--seed", type=int, default=0, help="of the answers' draws")
    parser.add_argument(
        "--batch-size", type=int, default=256, metavar="B", help="answers decoded at once"
    )
    add_engine_flags(parser)
    if not {"-h", "--help"}.isdisjoint(arguments):
        parser.parse_args(["--help"])

    from language_self_play.cli.overrides import split_overrides
    from language_self_play.config import QuestionSet

    settings = [*QuestionSet.model_fields, *ENGINE_SETTINGS]
    with as_typed("MODEL"):
        own, overrides = split_overrides(in_full(arguments), OWN_FLAGS, settings)
    options = parser.parse_args(own)
    options.vllm = take_vllm(overrides)
    for flag, value, least in (("seed", options.seed, 0), ("batch-size", options.batch_size, 1)):
        if value < least:
            raise ConfigError(f"--{flag} = {value}: must be at least {least}")
    if options.seed >= LAST_SEED:
        raise ConfigError(f"--seed = {options.seed}: must be below {LAST_SEED}")
    check_target("--json", options.json)
    if options.set == "arena":
        given = {argument.split("=")[0] for argument in own}
        asked = [n for n in ("seed", "batch-size", "engine") if f"--{n}" in given]
        if unused := [*overrides, *asked, *(f"vllm.{name}" for name in options.vllm)]:
            raise ConfigError(
                f"--{unused[0]}: has no effect on the arena's questions, which are asked as"
                " they are; leave it out, or name a SET"
            )
        return _arena(options)
    return _exam(options, overrides)


def _arena(options: Any) -> int:
    from language_self_play.evaluate.subject import subject

    model = options.model
    section, system_prompt = subject(model)

    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from language_self_play.config import Learner
    from language_self_play.evaluate.accuracy import Accuracy, arena_accuracy, evaluation_batches
    from language_self_play.policy import load_chat_model
    from language_self_play.pretrained import choose_device, choose_dtype

    # Exact unless asked otherwise: probabilities are what is measured.
    dtype = "float32" if options.dtype == "auto" else options.dtype
    with as_typed("MODEL"):
        device = choose_device(options.device)
        chat, weights = load_chat_model(section, device, choose_dtype(dtype, device))
    batches = evaluation_batches(Learner().tokens_per_micro_batch)
    accuracy = arena_accuracy(weights, chat, batches, system_prompt)
    if not math.isfinite(accuracy.sampled().mean):
        raise NonFiniteError(
            f"{model}: its log-probs are not finite, so it has no accuracy; its weights are damaged"
        )
    table = Table(title=Text(f"Held-out accuracy of {model} in %, with 95 % intervals"))
    for column in ("tier", "task", "questions", "sampled", "greedy"):
        table.add_column(column, justify="left" if column in ("tier", "task") else "right")

    def row(tier: str, task: str, part: Accuracy, style: str | None = None) -> None:
        cells = (f"{100 * i.mean:.1f} {in_percent(i)}" for i in (part.sampled(), part.greedy()))
        table.add_row(tier, task, str(len(part.results)), *cells, style=style)

    for tier in accuracy.tiers():
        of_tier = [r for r in accuracy.results if r.tier == tier]
        for task in dict.fromkeys(r.task for r in of_tier):
            row(tier, task, Accuracy([r for r in of_tier if r.task == task]))
        row(tier, "all", Accuracy(of_tier), "bold")
        table.add_section()
    row("all", "all", accuracy, "bold")
    Console().print(table)
    if options.json is not None:
        questions = [asdict(r) for r in accuracy.results]
        figures = {**accuracy.metrics(), "ci95": ends(accuracy.intervals())}
        asked = {"model": model, "set": "arena", "dtype": dtype}
        report = {**asked, **figures, "questions": questions}
        write_report(options.json, report)
    return 0


def _exam(options: Any, overrides: dict[str, Any]) -> int:
    """Ask a question set."""
    with as_typed("MODEL"), _set_as_typed(options, overrides):
        return _ask(options, overrides)


def _ask(options: Any, overrides: dict[str, Any]) -> int:
    from language_self_play.evaluate.subject import subject

    section, system_prompt = subject(options.model)
    name, settings = _question_set(options.model, options.set, overrides)
    rollout = engine_settings(options, [options.model], settings.temperature)

    from language_self_play.chat import load_chat
    from language_self_play.evaluate.exam import Exam
    from language_self_play.evaluate.generation import generation
    from language_self_play.evaluate.kept import KeptRecords, written_when
    from language_self_play.evaluate.outcomes import set_intervals, set_metrics
    from language_self_play.pretrained import (
        choose_device,
        context_length,
        load_model_config,
        resolve_model,
    )

    device = choose_device(options.device)
    with Exam(name, settings) as exam:
        chat = load_chat(section)
        context = context_length(load_model_config(section.path, section.trust_remote_code))
        if rollout.engine == "vllm":
            context = min(context, rollout.vllm.context or context)
        prompts = exam.prompts(chat, context, system_prompt)
        asked = {
            "model": options.model,
            "set": name,
            "settings": settings.model_dump(mode="json", exclude_none=True),
            "seed": options.seed,
            "engine": rollout.engine,
            "dtype": options.dtype,
        }
        identity = {
            **asked,
            "context": context,
            "files": written_when(Path(resolve_model(section.path))),
            "questions": [list(question) for question in exam.questions],
            "prompts": prompts,
        }
        # Answers that were kept before it could be chosen are known without it.
        if options.dtype == "auto":
            del identity["dtype"]
        part = None if options.json is None else options.json.with_name(f"{options.json.name}.part")
        head = {"asked": _digest(identity), "engine": rollout.engine}
        total = len(exam.questions)
        kept = KeptRecords(part, head, BATCH, total)
        if kept.records:
            _tell(f"{len(kept.records)} of {total} questions were answered before ({part})")
        if len(kept.records) < total:
            dtype, seed = options.dtype, options.seed
            with generation(section, rollout, device, dtype, seed) as (sampler, model):
                while (start := len(kept.records)) < total:
                    sampler.sync(model, start)  # draws are functions of where the batch begins
                    kept.add(exam.ask(sampler, prompts, start, start + BATCH))
                    _tell(_so_far(kept.records, total))
    intervals = set_intervals(name, kept.records, settings.pass_at)
    metrics = set_metrics(name, kept.records, settings.pass_at)
    _print(options.model, exam, intervals, metrics[f"eval/{name}/truncated"])
    if options.json is not None:
        figures = {**metrics, "ci95": ends(intervals)}
        write_report(options.json, {**asked, **figures, "questions": kept.records})
        kept.remove()
    return 0


def _own_sets(model: str) -> dict[str, QuestionSet]:
    """Those of the run that MODEL is or lies in."""
    from language_self_play.config import Config
    from language_self_play.run_folder import RunFolder

    run = RunFolder.holding(Path(model))
    return {} if run is None else Config.from_table(run.config()).eval.accuracy


def _set_as_typed(options: Any, overrides: dict[str, Any]) -> AbstractContextManager[None]:
    """What is raised within names settings of questions by their flags, and SET, unless the run has them."""
    own = _own_sets(options.model)

    def name(setting: re.Match[str]) -> str:
        set_name, field = setting[1], setting[2]
        if set_name in own and options.set in own and field not in overrides:
            return setting[0]
        return "SET" if field in (None, "path") else f"--{field}"

    return renaming(lambda said: QUESTION_SETTING.sub(name, said))


def _question_set(model: str, named: str, overrides: dict[str, Any]) -> tuple[str, QuestionSet]:
    """(the name of SET, its settings with those of flags). Raises ConfigError or InputFileError."""
    from language_self_play.config import Config
    from language_self_play.recipe_files import merge

    own = _own_sets(model)
    settings: dict[str, Any]
    if named in own:
        name, settings = named, own[named].model_dump(exclude_none=True)
    else:
        name, equals, path = named.partition("=")
        if not equals:
            path = named
            name = re.sub(r"\W+", "-", Path(named).name.split(".")[0]).strip("-_") or "questions"
        if Path(path).suffix in FILE_SUFFIXES and not os.path.exists(path):
            near = difflib.get_close_matches(
                path, [*own, *map(str, Path(path).parent.glob("*"))], n=1
            )
            hint = f"; did you mean {near[0]}?" if near else ""
            raise InputFileError(f"SET {path}: no such file{hint}")
        if not os.path.exists(path) and path:
            _tell(f"{path}: nothing of that name here, so the hub is asked")
        settings = {"path": path}
    table = {"eval": {"accuracy": {name: {**settings, "limit": 0, **overrides}}}}
    # Validated as part of a run's settings, so that a mistake is the same sentence everywhere.
    rest = {"policy": {"path": "arena"}, "reward": {"arena": {"kind": "arena"}}}
    return name, Config.from_table(merge(rest, table)).eval.accuracy[name]


def in_percent(interval: Interval) -> str:
    return f"[{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def ends(intervals: dict[str, Interval]) -> dict[str, list[float]]:
    return {key: [interval.low, interval.high] for key, interval in intervals.items()}


def _print(model: str, exam: Exam, intervals: dict[str, Interval], cut_off: float) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    asked = len(exam.questions)
    of = "" if asked == exam.size else f" of {exam.size:,}"
    asked_of = counted(asked, "question") if not of else f"{asked:,}{of} questions"
    table = Table(title=Text(f"{model} on {exam.name}, {asked_of}, in %"))
    for column in ("measure", "value", "95 % interval"):
        table.add_column(column, justify="left" if column == "measure" else "right")
    for key, interval in intervals.items():
        measure = key.rpartition("/")[2].replace("_at_", "@")
        label = "accuracy (pass@1)" if measure == "accuracy" else measure
        table.add_row(label, f"{100 * interval.mean:.1f}", in_percent(interval))
    table.add_row("answers cut off", f"{100 * cut_off:.1f}", "")
    Console().print(table)


def _so_far(records: list[dict[str, Any]], total: int) -> str:
    right = [answer["right"] for record in records for answer in record["answers"]]
    return f"{len(records)} of {total} questions, {sum(right) / len(right):.1%} right"


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _digest(value: Any) -> str:
    import hashlib
    import json

    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
