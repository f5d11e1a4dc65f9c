"""Recipes: TOML files that ship with the package or lie anywhere, as plain tables."""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from language_self_play.errors import InputFileError


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package."""
    folder = resources.files("language_self_play") / "recipes"
    return sorted(
        f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml")
    )


def recipe_text(recipe: str | os.PathLike[str]) -> str:
    """The TOML text of a shipped recipe or of a file. Raises InputFileError."""
    path = Path(recipe)
    if os.fspath(recipe) in recipe_names():
        shipped = resources.files("language_self_play") / "recipes" / f"{recipe}.toml"
        return shipped.read_text("utf-8")
    if not os.path.lexists(path):
        raise InputFileError(no_such_recipe(recipe))
    return read_text(path)


def no_such_recipe(name: str | os.PathLike[str], files: bool = True) -> str:
    """The sentence for what is no recipe's name, nor with `files` a file's: with the nearest that is."""
    known = recipe_names()
    if Path(name).suffix == ".toml":
        what, otherwise = "file", ""
    else:
        what = "recipe or file" if files else "recipe"
        otherwise = f"; shipped recipes are {', '.join(known)}"
    if files:
        known += [os.fspath(file) for file in Path(name).parent.glob("*.toml")]
    near = difflib.get_close_matches(os.fspath(name), known, n=1)
    return f"{name}: no such {what}{f'; did you mean {near[0]}?' if near else otherwise}"


def load_recipe(recipe: str | os.PathLike[str]) -> dict[str, Any]:
    """The table of a recipe. Raises InputFileError."""
    text = recipe_text(recipe)
    if not text.strip():
        raise InputFileError(
            f"{recipe}: the file is empty; `lsp recipes show arena` shows a whole one"
        )
    return _parsed(text, recipe)


def load_toml(file: Path) -> dict[str, Any]:
    """The table of any TOML file. Raises InputFileError."""
    return _parsed(read_text(file), file)


def _parsed(text: str, named: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputFileError(f"{named}: not valid TOML: {error}") from None


def read_text(path: Path, setting: str | None = None) -> str:
    """The text of a file that the user named, in `setting`. Raises InputFileError."""
    named = f"{setting} = {os.fspath(path)!r}" if setting else f"{path}"
    try:
        return path.read_text("utf-8")
    except FileNotFoundError:
        raise InputFileError(f"{named}: no such file") from None
    except IsADirectoryError:
        raise InputFileError(f"{named}: is a folder; a file is needed") from None
    except UnicodeDecodeError:
        raise InputFileError(f"{named}: not a text file in UTF-8") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputFileError(f"{named}: can't be read ({reason})") from None


def merge(table: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`table` with the leaves of `overrides` laid over it."""
    merged = dict(table)
    for key, value in overrides.items():
        below = merged.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            value = merge(below, value)
        merged[key] = value
    return merged
