"""Checkpoints: everything that a run needs to go on as if it had never stopped.

    checkpoints/step-000100/    restores weights version 100, before step 100 is played
        model/                  the policy, loadable with AutoModelForCausalLM; with LoRA instead
        adapter/                the adapter alone, loadable with PEFT
        optimizer.safetensors   AdamW's moments and float32 weights, by parameter name
        state.json              step, and the hash of the reference's weights

Randomness is a function of the step, so no generator state is kept. A checkpoint is written beside
its place and renamed: it is whole or absent. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from language_self_play.errors import RunFolderError
from language_self_play.run_folder import Part, RunFolder, remove_folder

if TYPE_CHECKING:
    from language_self_play.optimizer import Optimizer
    from language_self_play.policy import Policy


def save_checkpoint(
    run: RunFolder, policy: Policy, optimizer: Optimizer, step: int, keep_last: int
) -> Path:
    """Write checkpoints/step-`step` and remove all but the newest `keep_last`."""

    def fill(folder: Path) -> None:
        policy.save_trained(folder / _trained(policy))
        save_file(optimizer.state(), folder / "optimizer.safetensors")
        state = {"step": step, "reference_hash": policy.reference_hash}
        (folder / "state.json").write_text(json.dumps(state), "utf-8")

    place = run.checkpoints_folder / f"step-{step:06d}"
    _write_whole(place, fill)
    for old in checkpoints(run)[:-keep_last]:
        remove_folder(old)
    return place


def save_model(run: RunFolder, policy: Policy, card: Callable[[Path, Part], str]) -> None:
    """Write the run's model/, the policy at its end, and with LoRA its adapter/ alone.

    `card` writes their README.md from the run's folder, told which of the two it is for.
    """
    saves: dict[Part, Callable[[Path], None]] = {"model": policy.save}
    if policy.adapter is not None:
        saves["adapter"] = policy.save_adapter
    for part, save in saves.items():

        def fill(folder: Path, part: Part = part, save: Callable[[Path], None] = save) -> None:
            save(folder)
            (folder / "README.md").write_text(card(run.folder, part), "utf-8")

        _write_whole(run.folder / part, fill)


def _write_whole(place: Path, fill: Callable[[Path], None]) -> None:
    """Make the folder `place` by `fill`, beside it and then renamed. Raises RunFolderError."""
    beside = place.with_name(f".{place.name}.new")
    remove_folder(beside)
    try:
        beside.mkdir(parents=True)
        fill(beside)
        remove_folder(place)
        os.replace(beside, place)
    except (OSError, SafetensorError) as error:
        raise RunFolderError(f"{place}: can't be written ({error})") from None


def checkpoints(run: RunFolder) -> list[Path]:
    """The checkpoints that are there, oldest first."""
    found = run.checkpoints_folder.glob("step-*")
    return sorted(found, key=lambda folder: int(folder.name.removeprefix("step-")))


def load_checkpoint(run: RunFolder, policy: Policy, optimizer: Optimizer) -> int:
    """Restore the newest checkpoint into `policy` and `optimizer`; return its step.

    Without a checkpoint nothing is restored and the step is 0. Raises RunFolderError for a
    damaged checkpoint, or if the reference is no longer the model that the run began with.
    """
    if not (found := checkpoints(run)):
        return 0
    place = found[-1]
    try:
        state = json.loads((place / "state.json").read_text("utf-8"))
        tensors = load_file(place / "optimizer.safetensors")
        step, began_with = state["step"], state["reference_hash"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise RunFolderError(
            f"{place}: the checkpoint is damaged ({error}); remove it to resume from an earlier one"
        ) from None
    if began_with != policy.reference_hash:
        raise RunFolderError(
            f"{place}: the reference model has changed since the run began; restore the model that"
            " policy.path named then, or start a new run"
        )
    policy.load_trained(place / _trained(policy))
    optimizer.load_state(tensors)
    return int(step)


def _trained(policy: Policy) -> str:
    return "model" if policy.adapter is None else "adapter"
