"""The paper's table: base, GRPO, LSP-Zero, LSP and what was trained on from them, by subset or tier.

Each cell has a percentile bootstrap interval; each is tested against the base's by paired bootstrap over
the same questions (intervals.py). Never torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from language_self_play.arena.tasks import TIERS
from language_self_play.errors import ConfigError, InputFileError
from language_self_play.evaluate.intervals import bootstrap_interval, paired_bootstrap_p
from language_self_play.evaluate.scores import (
    BASE,
    STRICT_WIN_RATE,
    Measured,
    Scores,
    read_measured,
)

ALL = "all"
SUBSETS = ("helpful_base", "koala", "oasst", "selfinstruct", "vicuna")

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
    cells: dict[str, Cell]
    paper: dict[tuple[str, str], float]


@dataclass(frozen=True)
class MeasureTable:
    """One measure of all models."""

    measure: str
    groups: list[str]
    rows: list[Row]


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
    measures = dict.fromkeys(measure for model in everything for measure in model.scores)
    return [_table(measure, base, everything) for measure in measures]


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


def _table(measure: str, base: Measured | None, models: list[Measured]) -> MeasureTable:
    having = [model for model in models if measure in model.scores]
    first = having[0]
    for model in having[1:]:
        _refuse_others(measure, first, model)
    groups = _groups(first.scores[measure])
    of_base = None if base is None else base.scores.get(measure)
    rows = [
        Row(
            model.label,
            model.source,
            {
                group: _cell(model.scores[measure], None if model is base else of_base, group)
                for group in groups
            },
            _paper(measure, model.label),
        )
        for model in having
    ]
    return MeasureTable(measure, groups, rows)


def _refuse_others(measure: str, one: Measured, other: Measured) -> None:
    judge, other_judge = (m.scores[measure].judge for m in (one, other))
    if judge != other_judge:
        raise InputFileError(
            f"{other.source}: was judged by {other_judge or 'nobody named'}, and {one.source} by"
            f" {judge or 'nobody named'}; compare verdicts of one judge"
        )
    a, b = (
        set(scores.values) | scores.unjudged
        for scores in (one.scores[measure], other.scores[measure])
    )
    if a != b:
        raise InputFileError(
            f"{other.source}: {measure} is of other questions than {one.source}'s ({len(b)} and"
            f" {len(a)}, {len(a & b)} in common); evaluate both on the same ones"
        )


def _groups(scores: Scores) -> list[str]:
    """The groups in their usual order, and all."""
    found = dict.fromkeys(scores.groups.values())
    usual = [group for group in (*TIERS, *SUBSETS) if group in found]
    return [*usual, *(group for group in found if group not in usual), ALL]


def _cell(scores: Scores, base: Scores | None, group: str) -> Cell:
    chosen = [q for q in scores.values if group == ALL or scores.groups.get(q) == group]
    values = [scores.values[q] for q in chosen]
    if not values:
        return Cell(0, math.nan, math.nan, math.nan)
    mean = sum(values) / len(values)
    cell = Cell(len(values), mean, *bootstrap_interval(values))
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
    if measure != STRICT_WIN_RATE:
        return {}
    return {place: rows[label] for place, rows in PAPER.items() if label in rows}
