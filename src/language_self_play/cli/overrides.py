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

# How like a flag a typing error of it is, from 0 to 1; --policy is 0.67 like --split.
NEAR = 0.75


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
        if known and (below := _flag_below(name)):
            raise ConfigError(f"{name}: no such flag; its settings are, such as {below}")
        hint = "" if known else _nearest(name, own, settings or ())
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


def _nearest(name: str, own: Collection[str], settings: Collection[str]) -> str:
    """`did you mean --judge.model?`, of `--juge.model`; nothing where no flag that exists is near."""
    section, dot, field = name.partition(".")
    if dot:
        settings, own = [s for s in settings if _has_field(s, field)], ()
    flags = {*own, *(f"--{s}" for s in settings)}
    near = difflib.get_close_matches(section, sorted(flags), n=1, cutoff=NEAR)
    return f"did you mean {near[0]}{dot}{field}?" if near else ""


def _has_field(section: str, field: str) -> bool:
    """Whether some `….section.field` is a setting; a judge's are those of rewards and of self_reward."""
    if section == "judge":
        places = (f"reward.NAME.{field}", f"self_reward.{field}")
        return field == "kind" or any(setting.name in places for setting in fields(Config))
    return any(setting.name.endswith(f".{section}.{field}") for setting in fields(Config))


def _flag_below(name: str) -> str | None:
    """`--vllm.server`, of `--vllm`, which stands for a table within a section; None of other flags."""
    for setting in fields(Config):
        _, found, below = setting.name.partition(f".{name.removeprefix('--')}.")
        if found:
            return f"{name}.{below}"
    return None


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
