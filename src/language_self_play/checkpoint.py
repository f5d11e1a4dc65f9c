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
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from language_self_play.errors import RunFolderError
from language_self_play.run_folder import RunFolder, remove_folder

if TYPE_CHECKING:
    from language_self_play.policy import Policy


def save_checkpoint(
    run: RunFolder, policy: Policy, optimizer: torch.optim.Optimizer, step: int, keep_last: int
) -> Path:
    """Write checkpoints/step-`step` and remove all but the newest `keep_last`."""
    place = run.checkpoints_folder / f"step-{step:06d}"
    beside = run.checkpoints_folder / f".step-{step:06d}.new"
    remove_folder(beside)
    try:
        beside.mkdir(parents=True)
        policy.save(beside / "model")
        save_file(_optimizer_tensors(policy, optimizer), beside / "optimizer.safetensors")
        state = {"step": step, "reference_hash": reference_hash(policy)}
        (beside / "state.json").write_text(json.dumps(state), "utf-8")
        remove_folder(place)
        os.replace(beside, place)
    except (OSError, SafetensorError) as error:
        raise RunFolderError(f"{place}: the checkpoint can't be written ({error})") from None
    for old in checkpoints(run)[:-keep_last]:
        remove_folder(old)
    return place


def checkpoints(run: RunFolder) -> list[Path]:
    """The checkpoints that are there, oldest first."""
    return sorted(run.checkpoints_folder.glob("step-*"))


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
    except (OSError, ValueError, KeyError, SafetensorError) as error:
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
    digest = hashlib.sha256()
    for name, weight in sorted(policy.reference.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


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
