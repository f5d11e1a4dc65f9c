"""Markdown from texts that nobody has checked: none of them can leave the place it is given.

A model writes what it likes: fences, tables, HTML, `---`, characters that turn the reading direction.
So its texts stand in code blocks only, indented, and single values stand in code spans.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Sequence

BLOCKS = "▁▂▃▄▅▆▇█"
TAB_WIDTH = 4
# Spaces before a text in a block: a line indented by 4 or more neither ends a fence nor starts one.
INDENT = "    "
# What means the same to every reader of Markdown, inside a code span and in a table's cell.
PLAIN = re.compile(r"[\w .,:;=+/%()-]+", re.ASCII)
# What is markup somewhere: in CommonMark, in tables, in HTML, as mathematics, mention or emoji.
MARKUP = re.compile(r"[\\`*_{}\[\]<>()#+!|~&$@:\"'=^-]")


def printable(text: str) -> str:
    """`text` with whatever could steer a reader's screen escaped; line ends remain."""
    lines = re.sub(r"\r\n?", "\n", text).expandtabs(TAB_WIDTH)
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in lines)


def escaped(text: str) -> str:
    """`text` on one line, for a heading or a sentence: its markup as HTML's character references."""
    line = " ".join(printable(text).split())
    return MARKUP.sub(lambda match: f"&#{ord(match[0])};", line)


def code(value: object, limit: int = 200) -> str:
    """A value as code on one line of at most `limit` characters, in a sentence or a table's cell."""
    line = " ".join(printable(str(value)).split())
    line = line if len(line) <= limit else line[: limit - 1] + "…"
    if not line:
        return "empty"
    # A code span can't hold a pipe in a table, so what is not plain becomes HTML's.
    return f"`{line}`" if PLAIN.fullmatch(line) else f"<code>{escaped(line)}</code>"


def block(text: str, max_characters: int, max_lines: int, width: int) -> str:
    """A text for a code block: cut, wrapped to `width`, each line indented by INDENT."""
    shown = printable(text[:max_characters])
    lines = [part for line in shown.split("\n") for part in textwrap.wrap(line, width) or [""]]
    kept = "\n".join(lines[:max_lines])
    note = ""
    if len(lines) > max_lines or len(text) > max_characters:
        note = f"\n… (cut; {len(text):,} characters in all)"
    return textwrap.indent((kept or "(empty)") + note, INDENT, lambda line: True)


def fence(text: str, language: str = "text") -> str:
    """`text` as a code block, its fence longer than any run of backticks in it."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    marks = "`" * max(3, longest + 1)
    return f"{marks}{language}\n{text}\n{marks}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], numbers_from: int = 1) -> str:
    """A table; columns from `numbers_from` on are aligned to the right."""
    rule = ["---" if i < numbers_from else "---:" for i in range(len(header))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def sparkline(values: Sequence[float]) -> str:
    """A curve in one line: from the lowest value, ▁, to the highest, █; ▁ alone if all are equal."""
    low, high = min(values, default=0.0), max(values, default=0.0)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[math.floor(scale * (value - low) + 0.5)] for value in values)
