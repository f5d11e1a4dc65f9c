"""The paper's table: base, GRPO, LSP-Zero, LSP and what was trained on from them, by subset or tier.

Each cell has a 95 % interval; each is tested against the base's by paired bootstrap over
the same questions (intervals.py). Never torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from language_self_play.arena.tasks import TIERS
from language_self_play.errors import ConfigError, InputFileError
from language_self_play.evaluate.intervals import (
    bootstrap_interval,
    paired_bootstrap_p,
    resampled_interval,
)
from language_self_play.evaluate.outputs import SUBSETS
from language_self_play.evaluate.scores import (
    ALPACA,
    BASE,
    STRICT_WIN_RATE,
    Measured,
    Scores,
    read_measured,
)

ALL = "all"

# Win rates in AlpacaEval that the paper reports, in %: (version, subset) -> row -> figure.
PAPER = {
    ("v1", ALL): {
        "GRPO": 40.9,
        "LSP-Zero": 40.1,
        "LSP": 40.6,
        "GRPO then LSP-Zero": 40.0,
        "GRPO then LSP": 43.1,
    },
    ("v1", "vicuna"): {"GRPO": 28.7, "LSP": 46.3},
    ("v3", ALL): {
        BASE: 26.5,
        "GRPO": 38.8,
        "LSP-Zero": 32.0,
        "LSP": 36.4,
        "LSP-Zero then GRPO": 36.3,
        "LSP then GRPO": 39.5,
    },
}


@dataclass(frozen=True)
class Cell:
    """A mean with its 95 % interval; against the base the difference, its interval, and p."""

    n: int
    mean: float
    low: float
    high: float
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    p: float | None = None


@dataclass(frozen=True)
class Row:
    """One model: a cell for each group, and the paper's figures of it, where they are the same quantity."""

    label: str
    source: str
    baseline: str  # of win rates
    cells: dict[str, Cell]
    paper: dict[tuple[str, str], float]


@dataclass(frozen=True)
class Entry:
    """A model's scores of one measure, under the name that it has there."""

    model: Measured
    measure: str
    scores: Scores


@dataclass(frozen=True)
class MeasureTable:
    """One measure of all models."""

    measure: str
    num_questions: int
    groups: list[str]
    rows: list[Row]
    notes: list[str]  # what keeps rows from being compared, and other names of the questions


def build_tables(arguments: Sequence[str]) -> list[MeasureTable]:
    """One table for each measure. The base is what is labelled so, else the first run's version 0.

    Raises InputFileError or RunFolderError as read_measured, and for question sets that differ;
    ConfigError for a label that comes twice.
    """
    models: list[Measured] = []
    base: Measured | None = None
    for argument in arguments:
        measured, own_base = read_measured(argument)
        if measured.label == BASE:
            if base is not None and base.source == measured.source:
                raise ConfigError(f"{argument}: there can be one base only")
            base = measured
            continue
        models.append(measured)
        # A later stage begins at another stage's end, which is no base.
        if own_base is not None and base is None and " then " not in measured.label:
            base = own_base
    models = _distinct(models)
    everything = [*([base] if base else []), *models]
    placed: dict[str, list[Entry]] = {}
    for model in everything:
        for measure, scores in model.scores.items():
            table = _place(placed, measure, scores, model)
            placed.setdefault(table, []).append(Entry(model, measure, scores))
    return [_table(measure, base, entries) for measure, entries in placed.items()]


def _place(placed: dict[str, list[Entry]], measure: str, scores: Scores, model: Measured) -> str:
    """The table that a measure belongs to: that of its name, else one of the same questions.

    A model that was asked the same questions twice, such as by other settings, has two tables.
    """
    if measure in placed:
        return measure
    for table, entries in placed.items():
        first = entries[0].scores
        same = (first.kind, first.judge) == (
            scores.kind,
            scores.judge,
        ) and first.asked == scores.asked
        if same and table not in model.scores and all(e.model is not model for e in entries):
            return table
    return measure


def _distinct(models: list[Measured]) -> list[Measured]:
    """The models, those of one label told apart by where they come from."""
    labels = [model.label for model in models]
    told = [
        replace(m, label=f"{m.label} ({m.source})") if labels.count(m.label) > 1 else m
        for m in models
    ]
    for model in told:
        if sum(other.label == model.label for other in told) > 1:
            raise ConfigError(f"{model.source}: is named twice; name each run or file once")
    return told


def _table(measure: str, base: Measured | None, entries: list[Entry]) -> MeasureTable:
    first = entries[0]
    groups: dict[str, str] = {}
    for entry in entries:
        _refuse_others(measure, first, entry)
        for question, group in entry.scores.groups.items():
            if groups.setdefault(question, group) != group:
                raise InputFileError(
                    f"{entry.model.source}: {question[:60]!r} is of {group!r}, and of"
                    f" {groups[question]!r} in another row; give both the same subsets"
                )
    of_base = next((e.scores for e in entries if e.model is base), None)
    rows = [
        Row(
            entry.model.label,
            entry.model.source,
            entry.scores.baseline,
            {
                group: _cell(entry.scores, _comparable(of_base, entry.scores), groups, group)
                for group in _in_order(groups)
            },
            _paper(measure, entry.model.label),
        )
        for entry in entries
    ]
    names = [
        f"{entry.measure} of {entry.model.source} has the same questions."
        for entry in entries
        if entry.measure != measure
    ]
    return MeasureTable(
        measure, len(first.scores.asked), _in_order(groups), rows, [*_baselines(rows), *names]
    )


def _refuse_others(measure: str, one: Entry, other: Entry) -> None:
    judge, other_judge = one.scores.judge, other.scores.judge
    source, other_source = one.model.source, other.model.source
    if judge != other_judge:
        raise InputFileError(
            f"{other_source}: was judged by {other_judge or 'nobody named'}, and {source} by"
            f" {judge or 'nobody named'}; compare verdicts of one judge"
        )
    a, b = one.scores.asked, other.scores.asked
    if set(a) != set(b):
        raise InputFileError(
            f"{other_source}: {measure} is of other questions than {source}'s ({len(b)} and"
            f" {len(a)}, {len(set(a) & set(b))} in common); evaluate both on the same ones"
        )
    if changed := next((name for name in a if a[name] != b[name]), None):
        raise InputFileError(
            f"{other_source}: {measure} is of other questions than {source}'s: {changed[:60]!r} is the"
            " name of two; evaluate both on the same ones"
        )


def _comparable(of_base: Scores | None, scores: Scores) -> Scores | None:
    """The base's, for a row other than its own and judged against the same baseline."""
    if of_base is None or of_base is scores or of_base.baseline != scores.baseline:
        return None
    return of_base


def _baselines(rows: list[Row]) -> list[str]:
    """A sentence if the rows were judged against several baselines."""
    labels: dict[str, list[str]] = {}
    for row in rows:
        labels.setdefault(row.baseline, []).append(row.label)
    if len(labels) < 2:
        return []
    told = "; ".join(f"{', '.join(names)} against {baseline}" for baseline, names in labels.items())
    return [f"Judged against several baselines: {told}. Compare rows of the same one only."]


def _in_order(groups: dict[str, str]) -> list[str]:
    """The groups in their usual order, and all."""
    found = dict.fromkeys(groups.values())
    usual = [group for group in (*TIERS, *SUBSETS) if group in found]
    return [*usual, *(group for group in found if group not in usual), ALL]


def _cell(scores: Scores, base: Scores | None, groups: dict[str, str], group: str) -> Cell:
    chosen = [q for q in scores.values if group == ALL or groups.get(q) == group]
    values = [scores.values[q] for q in chosen]
    if not values:
        return Cell(0, math.nan, math.nan, math.nan)
    cell = Cell(len(values), *resampled_interval(values))
    if base is None:
        return cell
    both = [q for q in chosen if q in base.values]  # all, but for pairs without a verdict
    if not both:
        return cell
    values, of_base = [scores.values[q] for q in both], [base.values[q] for q in both]
    differences = [a - b for a, b in zip(values, of_base, strict=True)]
    low, high = bootstrap_interval(differences)
    return replace(
        cell,
        difference=sum(differences) / len(differences),
        difference_low=low,
        difference_high=high,
        p=paired_bootstrap_p(values, of_base),
    )


def _paper(measure: str, label: str) -> dict[tuple[str, str], float]:
    if measure != f"{ALPACA} {STRICT_WIN_RATE}":
        return {}
    return {place: rows[label] for place, rows in PAPER.items() if label in rows}
