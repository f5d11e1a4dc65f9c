"""One model's scores question by question, out of a run folder or a file of results. Never torch."""

from __future__ import annotations

import gzip
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from language_self_play.config import Config
from language_self_play.errors import InputFileError, RunFolderError
from language_self_play.evaluate.outcomes import ARENA, Record, passes
from language_self_play.evaluate.outputs import OWN_COPY, SUBSETS, read_annotations
from language_self_play.evaluate.win_rate import BASELINE_WINS, TIE
from language_self_play.model_card import NAMES
from language_self_play.run_folder import RunFolder

BASE = "base"
ALPACA = "AlpacaEval"
WIN_RATE = "win rate"
# What the paper reports: its base against its own copy has 26.5 %, so a tie is no win there.
STRICT_WIN_RATE = "win rate, ties as losses"
# What the arena's queries and instructions stand for: themselves.
BY_NAME = ""
# Runs that begin where another ended; a chain is no longer unless two runs name each other.
LONGEST_CHAIN = 8


@dataclass
class Scores:
    """A measure of one model: a value from 0 to 1 for each question, and its subset or tier.

    `kind` is what is measured, whatever the questions' set is called. `asked` has what each question's
    name stands for, also of those without a value because a judge gave no verdict.
    """

    kind: str
    values: dict[str, float] = field(default_factory=dict)
    groups: dict[str, str] = field(default_factory=dict)
    asked: dict[str, str] = field(default_factory=dict)
    judge: str = ""  # whose verdicts they are
    baseline: str = ""  # whom they compare with


@dataclass
class Measured:
    """A model, what to call it, where its scores come from, and its scores by measure."""

    label: str
    source: str
    scores: dict[str, Scores]


def read_measured(argument: str) -> tuple[Measured, Measured | None]:
    """(what RUN, FILE or NAME=RUN stands for, of a run also its base: weights version 0).

    Raises InputFileError or RunFolderError for what holds no results question by question.
    """
    label, equals, named = argument.partition("=")
    if not equals or os.path.exists(argument):
        label, named = "", argument
    path = Path(named)
    if not os.path.exists(path):
        raise InputFileError(f"{named}: no such run or file of results")
    if path.is_dir() and not (path / "annotations.json").is_file():
        return _read_run(label, path)
    # The folder is one that `lsp eval alpaca` or `win-rate` left, whose verdicts lie in it.
    scores = _read_file(path / "annotations.json" if path.is_dir() else path)
    return Measured(
        label or path.name.removesuffix(".gz").removesuffix(".json"), named, scores
    ), None


def _read_run(label: str, path: Path) -> tuple[Measured, Measured]:
    run = RunFolder(path)
    config = Config.from_table(run.config())
    steps = run.evaluated_steps()
    if not steps:
        raise RunFolderError(
            f"{path}: has no evaluations/, so nothing was evaluated question by question; eval.tasks"
            ", eval.accuracy and eval.win_rate of its recipe say what is"
        )
    if steps[0] != 0:
        raise RunFolderError(
            f"{path}: has no evaluations/step-000000.jsonl, its base's; put it back, or run it again"
        )
    name = label or run_label(run)
    if steps[-1] < config.steps:
        name += f" (step {steps[-1]} of {config.steps})"
    trained, base = (scores_of(run.evaluation(step), path) for step in (steps[-1], 0))
    return Measured(name, str(path), trained), Measured(BASE, f"{path}, step 0", base)


def run_label(run: RunFolder, chain: int = 1) -> str:
    """`LSP`, or `GRPO then LSP` for a run whose initial model is another run's."""
    config = Config.from_table(run.config())
    before = RunFolder.holding(Path(config.policy.path))
    name = NAMES[config.algorithm]
    if before is None or chain >= LONGEST_CHAIN:
        return name
    return f"{run_label(before, chain + 1)} then {name}"


def scores_of(questions: Sequence[Record], source: Path) -> dict[str, Scores]:
    """Scores by measure of questions' records (outcomes.py). Raises InputFileError."""
    scores: dict[str, Scores] = {}
    for number, question in enumerate(questions, 1):
        if isinstance(question, Mapping) and question.get("preference", TIE) is None:
            measure = f"{question.get('set')}, {WIN_RATE}"
            known = scores.setdefault(measure, Scores(WIN_RATE, judge=question.get("judge", "")))
            known.asked[str(question.get("id"))] = BY_NAME
            continue
        try:
            of_question = _values(question)
            identity, group = str(question["id"]), question.get("tier", question.get("dataset"))
            if not all(math.isfinite(value) for value in of_question.values()):
                raise ValueError
        except (KeyError, TypeError, ValueError, AttributeError):
            raise InputFileError(
                f"{source}: question {number} has no score; a record is damaged, or its model's numbers"
                " were not finite"
            ) from None
        for kind, value in of_question.items():
            known = scores.setdefault(
                f"{question['set']}, {kind}", Scores(kind, judge=question.get("judge", ""))
            )
            if identity in known.values:
                raise InputFileError(
                    f"{source}: has question {identity!r} of {question['set']} twice"
                )
            known.values[identity] = value
            known.asked[identity] = (
                json.dumps([question["query"], question.get("key")])
                if "query" in question and question["set"] != ARENA
                else BY_NAME
            )
            if group is not None:
                known.groups[identity] = str(group)
    return scores


def _values(question: Record) -> dict[str, float]:
    """What is measured -> its value of one question."""
    if question["set"] == ARENA:
        return {"sampled": float(question["probability"]), "greedy": float(question["greedy"])}
    if "preference" in question:
        return {WIN_RATE: float(question["preference"]) - BASELINE_WINS}
    values = {"accuracy": passes(question, 1)}
    if (n := len(question["answers"])) > 1:
        values[f"pass@{n}"] = passes(question, n)
    return values


def _read_file(path: Path) -> dict[str, Scores]:
    """Scores of a file that `lsp eval accuracy --json` wrote, or of annotations of `alpaca`."""
    if path.name.removesuffix(".gz").endswith(".jsonl"):
        return _win_rates(path)
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
        found = json.loads(text)
    except (OSError, EOFError, ValueError, RecursionError) as error:
        reason = "it is empty" if path.stat().st_size == 0 else error
        raise InputFileError(f"{path}: can't be read as JSON ({reason})") from None
    if isinstance(found, list) and found:
        return _win_rates(path)
    if isinstance(found, Mapping) and found.get("questions"):
        name = found.get("set", ARENA)
        # The arena's questions are named by their queries.
        rows = [
            {"set": name, "id": q.get("query"), **q} if isinstance(q, Mapping) else {}
            for q in found["questions"]
        ]
        return scores_of(rows, path)
    if isinstance(found, Mapping) and "win_rate" in found:
        beside = path.with_name("annotations.json")
        where = (
            beside
            if beside.is_file()
            else "the folder of answers and annotations that `lsp eval win-rate` or `alpaca` told,"
            " or the file that --annotations named there"
        )
        raise InputFileError(
            f"{path}: holds a win rate, not its judgements, and without them there is no paired test;"
            f" name {where}"
        )
    raise InputFileError(
        f"{path}: holds no results question by question; a file of `lsp eval accuracy --json` does,"
        " or one of AlpacaEval's annotations"
    )


def _win_rates(path: Path) -> dict[str, Scores]:
    """A preference from 1 (the baseline) to 2 (the model) is a win from 0 to 1, or one if above 1.5.

    Ties as losses are counted in each of the two orders, where the file has them. Instructions of
    AlpacaEval's subsets alone are AlpacaEval's.
    """
    annotations, unjudged = read_annotations(path, "RUN")
    judges = ", ".join(sorted({a.annotator for a in annotations}))
    # A model's own copy is that model.
    baseline = os.path.normpath(annotations[0].generator_1.removesuffix(OWN_COPY))
    asked = dict.fromkeys([a.instruction for a in annotations] + unjudged, BY_NAME)
    groups = {a.instruction: a.dataset for a in annotations if a.dataset is not None}
    of_alpaca = bool(groups) and set(groups.values()) <= set(SUBSETS)
    wins = {
        WIN_RATE: {a.instruction: a.preference - 1 for a in annotations},
        STRICT_WIN_RATE: {a.instruction: a.strict_win for a in annotations},
    }
    return {
        f"{ALPACA} {kind}" if of_alpaca else kind: Scores(
            kind, values, groups, asked, judges, baseline
        )
        for kind, values in wins.items()
    }
