"""Which folder or hub id a model's name means, and what is a mistyped one. Never torch."""

from __future__ import annotations

import difflib
import os
from importlib import resources
from pathlib import Path

from language_self_play.errors import ModelError
from language_self_play.run_folder import RunFolder

BUILT_IN_MODEL = "arena"
# Of two names (difflib's ratio): two letters swapped in one of five are 0.8.
LIKENESS = 0.75
LONGEST_HUB_ID = 96


def resolve_model(path: str) -> str:
    """The folder or hub id to load from; `arena` is the built-in model. Raises ModelError."""
    if path == BUILT_IN_MODEL:
        return str(resources.files("language_self_play") / "arena" / "model")
    folder = Path(path)
    if os.path.isdir(folder):
        if (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file():
            return path
        inside = folder / "model"
        hint = f"; did you mean {inside}?" if (inside / "config.json").is_file() else ""
        raise ModelError(f"{path}: the folder holds no config.json, so it is no model{hint}")
    if os.path.exists(folder):
        raise ModelError(f"{path}: is a file; a model is a folder with config.json and safetensors")
    _refuse_mistyped(path)
    return path


def _refuse_mistyped(path: str) -> None:
    """Raises ModelError, with the nearest name, for what is meant as a folder and is none.

    `./x`, `a/b/c` and what is longer than any are no hub ids, `runs/x` is where runs lie by default. `a/x`
    could be a hub id, but not where a/ holds runs; nor is a bare name meant as one that is almost that of
    a run, or of the built-in model.
    """
    folder = Path(path)
    try:
        beside = [p for p in folder.parent.iterdir() if p.is_dir()]
    except OSError:
        beside = []
    runs = [p for p in beside if RunFolder.holding(p) is not None]
    is_path = path.startswith((".", "/", "~", "runs/")) or path.endswith("/") or path.count("/") > 1
    is_path = is_path or len(path) > LONGEST_HUB_ID
    if is_path or folder.parent != Path():
        is_path, near = is_path or bool(runs), _nearest(folder, beside)
    else:
        near = _nearest(folder, [*runs, Path(BUILT_IN_MODEL)])
        is_path = near is not None
    if is_path:
        raise ModelError(f"{path}: no such folder{f'; did you mean {near}?' if near else ''}")


def _nearest(missing: Path, folders: list[Path]) -> Path | None:
    """The one of `folders` whose name is most like the missing one's, if it is like it."""
    named = {folder.name: folder for folder in folders}
    near = difflib.get_close_matches(missing.name, named, n=1, cutoff=LIKENESS)
    return named[near[0]] if near else None
