"""`--section.field value` flags: taken out of the command line, merged as a table."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Collection
from typing import Any

from language_self_play.config import Config
from language_self_play.errors import ConfigError
from language_self_play.recipe_files import merge
from language_self_play.settings import fields, flag_of_table


def split_overrides(
    arguments: list[str], own: Collection[str], settings: Collection[str] | None = None
) -> tuple[list[str], dict[str, Any]]:
    """(the command's own arguments, the table of all other `--name value` flags).

    `own` are the flags that belong to the command, `settings` what else its flags can set: without them
    it is whatever the configuration has, which is looked at later. Raises ConfigError for a flag that is
    neither, or without a value.
    """
    rest: list[str] = []
    table: dict[str, Any] = {}
    queue = iter(arguments)
    for argument in queue:
        name, equals, value = argument.partition("=")
        if not argument.startswith("--") or name in own:
            rest.append(argument)
            continue
        known = settings is not None and name.removeprefix("--").split(".")[0] in settings
        hint = "" if known else _nearest(name, {*own, *(f"--{s}" for s in settings or ())})
        if settings is not None and not known:
            raise ConfigError(f"{name}: no such flag; {hint or '--help lists them'}")
        if not equals:
            value = next(queue, "--")
            if value.startswith("--"):
                if flag := flag_of_table(name.removeprefix("--"), Config):
                    hint = f"it is a table, whose settings are flags such as {flag}"
                raise ConfigError(f"{name}: needs a value{f'; {hint}' if hint else ''}")
        table = merge(table, parse_override(name.removeprefix("--"), value))
    return rest, table


def _nearest(name: str, flags: Collection[str]) -> str:
    """`did you mean --judge.model?`, of `--juge.model`; nothing where no flag is near."""
    section, dot, field = name.partition(".")
    near = difflib.get_close_matches(section, sorted(flags), n=1)
    return f"did you mean {near[0]}{dot}{field}?" if near else ""


def parse_override(name: str, value: str) -> dict[str, Any]:
    """The nested table for a flag `--name value`: a TOML value, or text where text is wanted."""
    *sections, leaf = name.split(".")
    as_text = _wants_text(name) and not value.startswith("[")
    table: dict[str, Any] = {leaf: value if as_text else _toml_value(value)}
    for section in reversed(sections):
        table = {section: table}
    return table


def _toml_value(value: str) -> Any:
    try:
        return tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return value


def _wants_text(name: str) -> bool:
    for field in fields(Config):
        if field.name == name:
            return field.type.split(" | ")[0] == "text"
    return False
