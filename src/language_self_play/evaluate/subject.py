"""The model that is measured: which weights a name means, and how its run speaks to them."""

from __future__ import annotations

from pathlib import Path

from language_self_play.config import Config, Policy
from language_self_play.errors import ConfigError
from language_self_play.model_paths import resolve_model
from language_self_play.recipe_files import merge
from language_self_play.run_folder import RunFolder


def subject(model: str, setting: str = "MODEL") -> tuple[Policy, str | None]:
    """(what to load, the system prompt to answer with) for a run, a model folder, a hub id or `arena`.

    A run's model, or a folder inside a run, is spoken to as the run does it: with its chat template
    and system prompt. Raises ConfigError for an empty name, RunFolderError for a run without a model,
    ModelError for a name that no model can have.
    """
    if not model.strip():
        raise ConfigError(f"{setting} is empty; name a folder, a hub id, or `arena`")
    if (run := RunFolder.holding(Path(model))) is None:
        resolve_model(model)  # a typing error is told before anything is loaded
        return Policy(path=model), None
    path = str(run.newest_model()) if Path(model) == run.folder else model
    config = Config.from_table(merge(run.config(), {"policy": {"path": path}}))
    return config.policy, config.solver.system_prompt
