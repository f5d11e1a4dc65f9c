"""`lsp recipes`: list, show and copy the shipped recipes."""

from __future__ import annotations

import shutil
import sys
import textwrap
from pathlib import Path

from language_self_play.cli import Parser
from language_self_play.errors import InputFileError

INDENT = 16  # where what a recipe is begins


def run(arguments: list[str]) -> int:
    parser = Parser(prog="lsp recipes", description="List, show and copy the shipped recipes.")
    actions = parser.add_subparsers(dest="action", metavar="list | show | copy")
    actions.add_parser("list", help="names and what they are (the default)")
    show = actions.add_parser("show", help="print one")
    show.add_argument("name", metavar="NAME")
    copy = actions.add_parser("copy", help="copy one, to change it")
    copy.add_argument("name", metavar="NAME")
    copy.add_argument("file", metavar="FILE", nargs="?", help="default: NAME.toml")
    options = parser.parse_args(arguments)

    from language_self_play.recipe_files import no_such_recipe, recipe_names, recipe_text

    if options.action in (None, "list"):
        for name in recipe_names():
            line = f"{name:<{INDENT}}{recipe_text(name).splitlines()[0].lstrip('# ')}"
            if sys.stdout.isatty():  # elsewhere a line each, as tools want it
                width, hang = shutil.get_terminal_size().columns, " " * INDENT
                line = textwrap.fill(line, width, subsequent_indent=hang, break_on_hyphens=False)
            print(line)
        return 0
    if options.name not in recipe_names():
        raise InputFileError(no_such_recipe(options.name, files=False))
    if options.action == "show":
        sys.stdout.write(recipe_text(options.name))
        return 0
    target = Path(options.file or f"{options.name}.toml")
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(recipe_text(options.name))
    except FileExistsError:
        raise InputFileError(f"{target}: exists already; name another FILE") from None
    except OSError as error:
        raise InputFileError(f"{target}: can't be written ({error.strerror})") from None
    print(f"{target} written; run it by: lsp train {target}")
    return 0
