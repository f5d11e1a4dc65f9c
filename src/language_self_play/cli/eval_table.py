"""`lsp eval table`: the paper's table, of runs and files of results."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from language_self_play.cli import Parser
from language_self_play.cli.evaluate import check_target
from language_self_play.errors import ConfigError
from language_self_play.wording import counted

if TYPE_CHECKING:
    from rich.console import Console

    from language_self_play.evaluate.table import MeasureTable

DESCRIPTION = """\
Base, GRPO, LSP-Zero, LSP and what was trained on from them, side by side: by subset or tier, with 95 %
intervals, and p against base by paired bootstrap over the same questions.

RUN is a run folder (its last evaluation, and its version 0 as base), a file of `lsp eval accuracy
--json`, a file of AlpacaEval's annotations, or the folder --out of `lsp eval alpaca`. NAME=RUN names its
row; base=RUN is the base. To a file or a pipe it prints Markdown."""

EPILOG = """\
examples:
  lsp eval table runs/grpo runs/zero runs/lsp
  lsp eval table runs/grpo runs/lsp --write table.md --write table.csv --write table.png
  lsp eval table base=base.json LSP=lsp.json
  lsp eval table base=own-copy/annotations.json LSP=lsp/annotations.json"""


def run(arguments: list[str]) -> int:
    parser = Parser(prog="lsp eval table", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a run or a file, or NAME=it")
    parser.add_argument(
        "--write",
        metavar="FILE",
        type=Path,
        action="append",
        default=[],
        help="also write it: .md, .csv or .png (needs the extra `plot`); may be repeated",
    )
    for argument in arguments:
        if (flag := argument.partition("=")[0]) in ("--out", "--json"):
            raise ConfigError(f"{flag}: no such flag; a table is written by --write FILE")
    options = parser.parse_args(arguments)

    from language_self_play.evaluate.table import build_tables
    from language_self_play.evaluate.table_files import check_endings, markdown_of, write_table

    check_endings(options.write)
    for file in options.write:
        check_target("--write", file)
    tables = build_tables(options.runs)
    if sys.stdout.isatty():
        _print(tables)
    else:
        print(markdown_of(tables), end="", flush=True)
    for file in options.write:
        write_table(file, tables)
        print(f"{file}: written", file=sys.stderr)
    return 0


def _print(tables: Sequence[MeasureTable], console: Console | None = None) -> None:
    """The tables for a terminal: a line for each model in each group, which fits into 80 columns."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from language_self_play.evaluate.table import ALL
    from language_self_play.evaluate.table_files import NOTE, PAPER_NOTE, against_base, shown

    console = console or Console()
    for one in tables:
        has_base = any(row.cells[ALL].p is not None for row in one.rows)
        title = f"{one.measure}, {counted(one.num_questions, 'question')}, in %"
        table = Table(title=Text(title), box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("")
        for column in ("", "Δ", "p") if has_base else ("",):
            table.add_column(column, justify="right", no_wrap=True)
        for group in one.groups:
            table.add_row(Text(group, "bold"))
            for row in one.rows:
                cell = row.cells[group]
                against = against_base(cell) if has_base else ()
                table.add_row(Text(f"  {row.label}"), shown(cell, group), *against)
                for (version, of), figure in row.paper.items():
                    if of == group:
                        table.add_row(f"    paper, {version}", f"{figure:.1f}", style="dim")
        console.print(table)
        paper = [PAPER_NOTE] if any(row.paper for row in one.rows) else []
        for note in one.notes + paper:
            console.print(Text(note), end="\n\n")
    console.print(Text(NOTE))
