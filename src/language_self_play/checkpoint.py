"""Checkpoints: everything that a run needs to go on as if it had never stopped.

    checkpoints/step-000100/    restores weights version 100, before step 100 is played
        model/                  the policy, loadable with AutoModelForCausalLM; with LoRA instead
        adapter/                the adapter alone, loadable with PEFT
        shards/                 or with distributed.parallel = "fsdp" each rank's rows of weights and moments,
                                with the model's config and tokenizer: lsp play and lsp eval load it
        optimizer.safetensors   AdamW's moments and float32 weights, by parameter name
        state.json              step, and the hash of the reference's weights
        SHA256SUMS              of every other file, written last; `sha256sum -c SHA256SUMS` checks it

Randomness, the schedule and the position in the data are functions of the step, so no more is kept.
A checkpoint is written beside its place, flushed and renamed: it is whole or absent. One that was
damaged later is told by its checksums, and the one before it is used. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

from language_self_play.config import Checkpoint
from language_self_play.distributed import ALONE, Ranks
from language_self_play.durable import NO_ROOM, errno_of, make_folder, remove_folder, sync
from language_self_play.errors import RunFolderError
from language_self_play.run_folder import Part, RunFolder, step_of, unwritable
from language_self_play.shard_files import BUFFER, WEIGHT, Shards, local, rows_of, save_shard

if TYPE_CHECKING:
    from language_self_play.optimizer import Optimizer
    from language_self_play.policy import Policy

CHECKSUMS = "SHA256SUMS"
SHARDS, MASTER = "shards", "master"


def save_checkpoint(
    run: RunFolder,
    policy: Policy,
    optimizer: Optimizer,
    step: int,
    keep: Checkpoint,
    ranks: Ranks = ALONE,
) -> None:
    """Write checkpoints/step-`step`, then remove the older ones that `keep` does not keep.

    All ranks call it and the first one writes, but for shards, of which each writes its own.

    Records that wait for the disk are written first: what a checkpoint skips on resume is recorded.
    A whole checkpoint of the step is left as it is. Raises RunFolderError, with the errno of what the
    file system says; the checkpoints that were there are as before, or where room was missing those
    that `keep` would have kept.
    """
    shards = None
    if policy.trains_shards:
        shards = run.checkpoints_folder / f".shards-{step:06d}"
        _write_shards(shards, run, policy, optimizer, ranks)
    ranks.once(_save_checkpoint, run.own, policy, optimizer, step, keep, shards)


def _write_shards(
    folder: Path, run: RunFolder, policy: Policy, optimizer: Optimizer, ranks: Ranks
) -> None:
    """Every rank's file, into a folder beside; where one can't be written, all raise RunFolderError."""

    def begin() -> None:
        for unfinished in run.checkpoints_folder.glob(".shards-*"):
            remove_folder(unfinished)
        try:
            folder.mkdir()
            policy.save_without_weights(folder)
        except OSError as error:
            raise unwritable(folder, error) from None

    ranks.once(begin)
    tensors = optimizer.state()
    for name, weight in optimizer.weights.items():
        tensors[f"{name}:{WEIGHT}"] = local(weight.detach()).cpu().contiguous()
    for name, buffer in policy.saved_buffers().items():
        tensors[f"{name}:{BUFFER}"] = buffer.cpu().contiguous()
    pieces = {}
    for key, tensor in tensors.items():
        if tensor.dim() and not key.endswith(f":{BUFFER}"):
            rows = len(optimizer.weights[key.rsplit(":", 1)[0]])
            pieces[key] = (rows_of(ranks.rank, ranks.size, rows).start, rows)
    number = 0
    try:
        save_shard(folder, tensors, pieces, ranks.rank, ranks.size)
    except Exception as error:
        if (number := errno_of(error) or 0) == 0:
            raise
    if number := ranks.most(number):
        ranks.once(remove_folder, folder)
        failure = unwritable(folder, OSError(number, os.strerror(number)))
        failure.agreed = True
        raise failure


def _save_checkpoint(
    run: RunFolder,
    policy: Policy,
    optimizer: Optimizer,
    step: int,
    keep: Checkpoint,
    shards: Path | None,
) -> None:
    run.flush()
    place = run.checkpoints_folder / f"step-{step:06d}"

    def fill(folder: Path) -> None:
        if shards is not None:
            os.replace(shards, folder / SHARDS)
        else:
            policy.save_trained(folder / _trained(policy))
            save_file(optimizer.state(), folder / "optimizer.safetensors")
        state = {"step": step, "reference_hash": policy.reference_hash}
        (folder / "state.json").write_text(json.dumps(state), "utf-8")
        (folder / CHECKSUMS).write_text(checksums(folder), "utf-8")

    for unfinished in run.checkpoints_folder.glob(".step-*.new"):  # by a process that was killed
        remove_folder(unfinished)
    if not place.is_dir() or damage(place) is not None:
        try:
            make_folder(place, fill)
        except OSError as error:
            if error.errno not in NO_ROOM or not _make_room(run, step, keep):
                raise unwritable(place, error) from None
            try:
                make_folder(place, fill)
            except OSError as still:
                raise unwritable(place, still) from None
    if shards is not None:
        remove_folder(shards)  # of a step that a whole checkpoint was there of
    run.written("checkpoint")
    for old in _superseded(run.checkpoints(), keep):
        remove_folder(old)


def save_model(run: RunFolder, policy: Policy, card: Callable[[Path, Part], str]) -> None:
    """Write the run's model/, the policy at its end, and with LoRA its adapter/ alone.

    `card` writes their README.md from the run's folder, told which of the two it is for. Raises
    Paused, as RunFolder.stop does, if they or the last records can't be written.
    """
    saves: dict[Part, Callable[[Path], None]] = {"model": policy.save}
    if policy.adapter is not None:
        saves["adapter"] = policy.save_adapter
    try:
        run.flush()
        for part, save in saves.items():

            def fill(folder: Path, part: Part = part, save: Callable[[Path], None] = save) -> None:
                save(folder)
                (folder / "README.md").write_text(card(run.folder, part), "utf-8")

            place = run.folder / part
            try:
                make_folder(place, fill)
            except OSError as error:
                raise unwritable(place, error) from None
    except RunFolderError as error:
        run.stop(error)


def load_checkpoint(
    run: RunFolder, policy: Policy, optimizer: Optimizer, ranks: Ranks = ALONE
) -> int:
    """Restore the newest whole checkpoint into `policy` and `optimizer`; return its step.

    Damaged newer ones are renamed, `damaged-step-000100`, with a warning: nothing is removed that
    could still be of use. Without any checkpoint nothing is restored and the step is 0. Raises
    RunFolderError if all are damaged, or if the reference is no longer the model that the run began
    with.
    """
    name = ranks.once(_newest_whole, run.own, policy)
    if name is None:
        return 0
    place = run.checkpoints_folder / name
    if not (policy.trains_shards or (place / SHARDS).is_dir()):
        policy.load_trained(place / _trained(policy))
        optimizer.load_state(load_file(place / "optimizer.safetensors"))
    else:
        _load_shards(place, policy, optimizer, ranks)
    return step_of(place)


def _load_shards(place: Path, policy: Policy, optimizer: Optimizer, ranks: Ranks) -> None:
    """Restore from shards on however many ranks, or into shards what one rank wrote."""
    files = [(file, "") for file in sorted((place / SHARDS).glob("*.safetensors"))]
    if not files:
        files = [(place / "optimizer.safetensors", "")]
        files += [(file, "model ") for file in sorted((place / "model").glob("*.safetensors"))]
    shards = Shards(files)
    rank, size = (ranks.rank, ranks.size) if policy.trains_shards else (0, 1)
    state = {}
    with torch.no_grad():
        for name, weight in optimizer.weights.items():
            # The most exact that there is of a weight, in whichever way it was written.
            named = [f"{name}:{WEIGHT}", f"{name}:{MASTER}", f"model {name}"]
            found = next((n for n in named if n in shards), None)
            if found is None:
                raise RunFolderError(f"{place}: has no {name}; it is of another model")
            local(weight).copy_(shards.read(found, rank, size))
            for key in shards.names(f"{name}:"):
                if key not in named:
                    state[key] = shards.read(key, rank, size)
    optimizer.load_state(state)


def _newest_whole(run: RunFolder, policy: Policy) -> str | None:
    """The name of the newest whole checkpoint, damaged newer ones set aside; None if there is none."""
    damaged: list[tuple[Path, str]] = []
    for place in reversed(run.checkpoints()):
        if (problem := damage(place)) is None:
            break
        damaged.append((place, problem))
    else:
        if damaged:
            listed = "; ".join(f"{place.name}: {problem}" for place, problem in damaged)
            raise RunFolderError(
                f"{run.checkpoints_folder}: no checkpoint is whole ({listed}); put back a copy of one,"
                " or move them away to play from the beginning"
            )
        return None
    state = json.loads((place / "state.json").read_text("utf-8"))
    if state["reference_hash"] != policy.reference_hash:
        raise RunFolderError(
            f"{place}: the reference model has changed since the run began; restore the model that"
            " policy.path named then, or start a new run"
        )
    for other, problem in damaged:
        _set_aside(run, other, f"{other}: damaged, {problem}", place)
    return place.name


def checksums(folder: Path) -> str:
    """One line for each file under `folder`, as sha256sum writes and reads them."""
    return "".join(f"{_digest(folder / name)}  {name}\n" for name in _files(folder))


def damage(place: Path) -> str | None:
    """What is wrong with the checkpoint at `place`, beginning with the file's name; None if nothing.

    A file that is not listed is wrong too, unless hidden: it could change what is loaded.
    """
    try:
        text = (place / CHECKSUMS).read_bytes().decode("utf-8")
        listed = dict(line.split("  ", 1)[::-1] for line in text.split("\n")[:-1])
    except FileNotFoundError:
        return f"{CHECKSUMS}: missing"
    except (OSError, ValueError) as error:
        return f"{CHECKSUMS}: can't be read ({error})"
    if "state.json" not in listed:  # the last line: cut off with a part of it, or without its end
        return f"{CHECKSUMS}: torn or overwritten"
    present = set(_files(place))
    if missing := sorted(set(listed) - present):
        return f"{missing[0]}: missing"
    if unlisted := sorted(present - set(listed)):
        return f"{unlisted[0]}: not among its checksums"
    for name, digest in listed.items():
        try:
            if _digest(place / name) != digest:
                return f"{name}: its checksum is another"
        except OSError as error:
            return f"{name}: can't be read ({error.strerror})"
    return None


def _files(folder: Path) -> list[str]:
    """Every file under `folder` but the checksums' own and hidden ones, relative, in order."""
    names = (p.relative_to(folder) for p in folder.rglob("*") if not p.is_dir())
    shown = (n for n in names if not any(part.startswith(".") for part in n.parts))
    return sorted(n.as_posix() for n in shown if n.as_posix() != CHECKSUMS)


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _superseded(places: list[Path], keep: Checkpoint) -> list[Path]:
    """Those of `places`, oldest first, that are neither among the newest nor kept for ever."""
    return [
        place
        for place in places[: -keep.keep_last]
        if keep.keep_every is None or step_of(place) % keep.keep_every != 0
    ]


def _make_room(run: RunFolder, step: int, keep: Checkpoint) -> bool:
    """Remove what a checkpoint of `step` would supersede, if a whole one stays; whether it did."""
    places = [place for place in run.checkpoints() if step_of(place) != step]
    removed = _superseded([*places, run.checkpoints_folder / f"step-{step:06d}"], keep)
    kept = [place for place in places if place not in removed]
    if not removed or not any(damage(place) is None for place in reversed(kept)):
        return False
    for old in removed:
        remove_folder(old)
    return True


def _set_aside(run: RunFolder, place: Path, problem: str, used: Path) -> None:
    aside, number = place.with_name(f"damaged-{place.name}"), 1
    while aside.exists():
        number += 1
        aside = place.with_name(f"damaged-{place.name}-{number}")
    try:
        place.rename(aside)
        sync(place.parent)
    except OSError as error:
        raise unwritable(place, error) from None
    warnings.warn(f"{problem}; going on from {used.name}, and it is now {aside.name}", stacklevel=3)
    run.event("damaged", checkpoint=place.name, reason=problem, moved_to=aside.name)


def _trained(policy: Policy) -> str:
    return "model" if policy.adapter is None else "adapter"
