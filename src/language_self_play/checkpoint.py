"""Checkpoints: everything that a run needs to go on as if it had never stopped.

    checkpoints/step-000100/    restores weights version 100, before step 100 is played
        model/                  the policy, loadable with AutoModelForCausalLM
        optimizer.safetensors   AdamW's moments, by parameter name
        state.json              step, and the hash of the reference's weights

Randomness is a function of the step, so no generator state is kept. A checkpoint is written beside
its place and renamed: it is whole or absent. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from language_self_play.errors import RunFolderError
from language_self_play.run_folder import RunFolder, remove_folder

if TYPE_CHECKING:
    from language_self_play.policy import Policy


# A reference never changes, so it is hashed once.
_HASHES: WeakKeyDictionary[torch.nn.Module, str] = WeakKeyDictionary()


def save_checkpoint(
    run: RunFolder, policy: Policy, optimizer: torch.optim.Optimizer, step: int, keep_last: int
) -> Path:
    """Write checkpoints/step-`step` and remove all but the newest `keep_last`."""

    def fill(folder: Path) -> None:
        policy.save(folder / "model")
        save_file(_optimizer_tensors(policy, optimizer), folder / "optimizer.safetensors")
        state = {"step": step, "reference_hash": reference_hash(policy)}
        (folder / "state.json").write_text(json.dumps(state), "utf-8")

    place = run.checkpoints_folder / f"step-{step:06d}"
    _write_whole(place, fill)
    for old in checkpoints(run)[:-keep_last]:
        remove_folder(old)
    return place


def save_model(run: RunFolder, policy: Policy) -> None:
    """Write the run's model/, the policy at its end."""
    _write_whole(run.model_folder, policy.save)


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


def load_checkpoint(run: RunFolder, policy: Policy, optimizer: torch.optim.Optimizer) -> int:
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
    if began_with != reference_hash(policy):
        raise RunFolderError(
            f"{place}: the reference model has changed since the run began; restore the model that"
            " policy.path named then, or start a new run"
        )
    policy.load_weights(place / "model")
    _restore_optimizer(policy, optimizer, tensors)
    return int(step)


def reference_hash(policy: Policy) -> str | None:
    """SHA-256 over the reference's weights; None where no reference is loaded."""
    if policy.reference is None:
        return None
    if policy.reference in _HASHES:
        return _HASHES[policy.reference]
    digest = hashlib.sha256()
    for name, weight in sorted(policy.reference.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return _HASHES.setdefault(policy.reference, digest.hexdigest())


def _optimizer_tensors(policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {}
    for name, parameter in policy.model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}:{key}"] = value.detach().cpu().contiguous()
    return tensors


def _restore_optimizer(
    policy: Policy, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    for name, parameter in policy.model.named_parameters():
        mine = {k.split(":")[1]: v for k, v in tensors.items() if k.split(":")[0] == name}
        if mine:
            # AdamW counts its steps on the CPU; its moments live with the parameter.
            optimizer.state[parameter] = {
                key: value if key == "step" else value.to(parameter.device)
                for key, value in mine.items()
            }
