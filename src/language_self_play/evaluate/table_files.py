"""The table as Markdown, CSV and PNG. Never torch."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from language_self_play.durable import replace_bytes
from language_self_play.errors import ConfigError, InputFileError
from language_self_play.evaluate.table import ALL, PAPER, Cell, MeasureTable
from language_self_play.extras import require
from language_self_play.markdown import PLAIN, escaped, table
from language_self_play.wording import counted

SIGNIFICANT = 0.05
NOTE = (
    "In %, with 95 % intervals over questions; Δ is the difference to base in points, p that of"
    " a paired bootstrap, * marks p < 0.05 in a subset (not corrected for their number)."
)
PAPER_NOTE = (
    "Paper: arXiv 2509.07414's figures, of Llama-3.2-3B-Instruct; v1 was judged by GPT-4o, v3 by"
    " Llama-4-Maverick. They are win rates against the base model: compare with your own where your"
    " baseline was your base model too."
)
ENDINGS = (".md", ".csv", ".png")
PAPER_MARKS = {"v1": "o", "v3": "D"}


def markdown_of(tables: Sequence[MeasureTable]) -> str:
    """All tables, each below its measure's name, and what they show."""
    parts = []
    for one in tables:
        has_base = any(row.cells[ALL].p is not None for row in one.rows)
        places = [place for place in PAPER if any(place in row.paper for row in one.rows)]
        header = ["model", *map(_plain, one.groups)]
        header += ["Δ", "p"] if has_base else []
        header += [f"paper {v}" + ("" if group == ALL else f", {group}") for v, group in places]
        rows = []
        for row in one.rows:
            cells = [_plain(row.label), *(shown(row.cells[g], g) for g in one.groups)]
            cells += against_base(row.cells[ALL]) if has_base else []
            cells += [f"{row.paper[p]:.1f}" if p in row.paper else "" for p in places]
            rows.append(cells)
        title = f"{_plain(one.measure)} ({counted(one.num_questions, 'question')})"
        parts.append(f"### {title}\n\n{table(header, rows)}")
        parts += [_plain(note) for note in one.notes]
        if places:
            parts.append(PAPER_NOTE)
    return "\n\n".join([*parts, NOTE]) + "\n"


def _plain(text: str) -> str:
    return text if PLAIN.fullmatch(text) else escaped(text)


def shown(cell: Cell, group: str) -> str:
    if cell.n == 0:
        return ""
    star = "*" if group != ALL and cell.p is not None and cell.p < SIGNIFICANT else ""
    numbers = f"{100 * cell.mean:.1f} [{100 * cell.low:.1f}, {100 * cell.high:.1f}]"
    return numbers + star


def against_base(cell: Cell) -> list[str]:
    if cell.difference is None or cell.p is None:
        return ["", ""]
    assert cell.difference_low is not None
    assert cell.difference_high is not None
    low, high = 100 * cell.difference_low, 100 * cell.difference_high
    p = "< 0.001" if cell.p < 0.001 else f"{cell.p:.3f}"
    return [f"{100 * cell.difference:+.1f} [{low:+.1f}, {high:+.1f}]", p]


COLUMNS = (
    *("measure", "group", "model", "source", "n", "mean", "low", "high"),
    *("difference", "difference_low", "difference_high", "p", "paper_v1", "paper_v3", "baseline"),
)


def csv_of(tables: Sequence[MeasureTable]) -> str:
    """One line a cell, fractions from 0 to 1; the paper's figures are fractions, too."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for one in tables:
        for row in one.rows:
            for group, c in row.cells.items():
                paper = [row.paper.get((version, group)) for version in ("v1", "v3")]
                numbers = [c.n, c.mean, c.low, c.high, c.difference]
                numbers += [c.difference_low, c.difference_high, c.p]
                fractions = ["" if figure is None else round(figure / 100, 4) for figure in paper]
                named = [one.measure, group, row.label, row.source]
                writer.writerow([*named, *numbers, *fractions, row.baseline])
    return out.getvalue()


def write_table(file: Path, tables: Sequence[MeasureTable]) -> None:
    """Write `file` as its ending says. Raises InputFileError, ConfigError without matplotlib."""
    if file.suffix == ".png":
        contents = _drawn(tables)
    else:
        contents = (markdown_of(tables) if file.suffix == ".md" else csv_of(tables)).encode()
    try:
        replace_bytes(file, contents)
    except OSError as error:
        raise InputFileError(f"--write {file}: can't be written ({error.strerror})") from None


def check_endings(files: Sequence[Path]) -> None:
    """Raises ConfigError before anything is computed."""
    for file in files:
        if file.suffix not in ENDINGS:
            raise ConfigError(f"--write {file}: must end in {', '.join(ENDINGS)}")
        if file.suffix == ".png":
            require("matplotlib", "plot", f"--write {file}")


def _drawn(tables: Sequence[MeasureTable]) -> bytes:
    """A PNG of one panel a measure: a bar for each model in each group, its interval, the paper's figures."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(9, 3.2 * len(tables)), layout="constrained")
    FigureCanvasAgg(drawing)  # no window, no display
    for place, one in enumerate(tables, 1):
        axes = drawing.add_subplot(len(tables), 1, place)
        width = 0.8 / len(one.rows)
        for i, row in enumerate(one.rows):
            cells = [row.cells[group] for group in one.groups]
            where = [g + (i - (len(one.rows) - 1) / 2) * width for g in range(len(cells))]
            means = [100 * c.mean for c in cells]
            errors = [
                [max(0.0, 100 * (c.mean - c.low)) for c in cells],
                [max(0.0, 100 * (c.high - c.mean)) for c in cells],
            ]
            axes.bar(where, means, 0.9 * width, yerr=errors, capsize=2, label=row.label)
            for (version, group), figure in row.paper.items():
                if group in one.groups:
                    x = where[one.groups.index(group)]
                    axes.plot(x, figure, PAPER_MARKS[version], color="black", zorder=3)
        for version, mark in PAPER_MARKS.items():
            if any(version == v for row in one.rows for v, _ in row.paper):
                axes.plot([], [], mark, color="black", label=f"paper, {version}")
        axes.set_xticks(range(len(one.groups)), one.groups)
        axes.set_ylabel("%")
        axes.set_title(one.measure)
        axes.set_ylim(0, None)
        axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    picture = io.BytesIO()
    drawing.savefig(picture, format="png", dpi=150)
    return picture.getvalue()
