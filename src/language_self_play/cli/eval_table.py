"""`lsp eval table`: the paper's table, of runs and files of results."""

from __future__ import annotations

from pathlib import Path

from language_self_play.cli import Parser

DESCRIPTION = """\
Base, GRPO, LSP-Zero, LSP and what was trained on from them, side by side: by subset or tier, with 95 %
intervals, and p against base by paired bootstrap over the same questions.

RUN is a run folder (its last evaluation, and its version 0 as base), a file of `lsp eval accuracy
--json`, or a file of AlpacaEval's annotations. NAME=RUN names its row; base=FILE is the base."""

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
    options = parser.parse_args(arguments)

    from language_self_play.evaluate.table import build_tables
    from language_self_play.evaluate.table_files import check_endings, markdown_of, write_table

    check_endings(options.write)
    tables = build_tables(options.runs)
    print(markdown_of(tables), end="")
    for file in options.write:
        write_table(file, tables)
    return 0
