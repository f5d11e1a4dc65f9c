"""`--section.field value` flags: taken out of the command line, merged as a table."""

from __future__ import annotations

import difflib
from typing import Any

from language_self_play.config import merge, parse_override
from language_self_play.errors import ConfigError


def split_overrides(arguments: list[str], own: set[str]) -> tuple[list[str], dict[str, Any]]:
    """(the command's own arguments, the table of all other `--name value` flags).

    `own` are the flags that belong to the command. Raises ConfigError for a flag without a value.
    """
    rest: list[str] = []
    table: dict[str, Any] = {}
    queue = iter(arguments)
    for argument in queue:
        name, equals, value = argument.partition("=")
        if not argument.startswith("--") or name in own:
            rest.append(argument)
            continue
        if not equals:
            value = next(queue, "--")
            if value.startswith("--"):
                near = difflib.get_close_matches(name, own, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise ConfigError(f"{name}: needs a value{hint}")
        table = merge(table, parse_override(name.removeprefix("--"), value))
    return rest, table
