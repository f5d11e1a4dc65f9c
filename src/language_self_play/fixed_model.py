"""A model that is sampled and never trained, by an engine that reads its weights from a folder itself."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from huggingface_hub import snapshot_download

from language_self_play.chat import load_chat
from language_self_play.config import Policy as PolicySection
from language_self_play.errors import ModelError
from language_self_play.policy import check_vocabulary, load_chat_model
from language_self_play.pretrained import (
    adapter_base,
    hollow_model,
    read,
    resolve_model,
    shards_in,
)

INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"


class FixedModel:
    """What an engine takes in place of a `Policy`. `model` has shapes only; no weights are loaded here.

    `folder` holds the weights as they are. It is None where an engine could not read them so: of an
    adapter, which `save_weights` merges with its base, and of a checkpoint's shards, which it puts together.
    """

    adapter = None

    def __init__(self, section: PolicySection, device: torch.device, dtype: torch.dtype):
        """Raises ModelError for what could not be loaded either, as far as it shows without weights."""
        self.section, self.device = section, device
        self.chat = load_chat(section)
        self.model = self.whole = hollow_model(section.path, dtype, section.trust_remote_code)
        check_vocabulary(section.path, self.chat, self.model)
        in_parts = adapter_base(section.path) is not None or shards_in(resolve_model(section.path))
        self.folder = None if in_parts else _weights_of(section.path)

    def save_weights(self, folder: Path) -> None:
        """Write the whole model, an adapter merged with its base."""
        _, merged = load_chat_model(self.section, torch.device("cpu"), self.model.dtype)
        merged.save_pretrained(folder)


def _weights_of(path: str) -> Path:
    """The folder of the model's safetensors; those of a hub id are fetched, if they are not here yet."""
    found = resolve_model(path)
    folder = Path(found)
    if not folder.is_dir():
        folder = read(path, lambda: _fetched(found))
    if not any(folder.glob("*.safetensors")):
        raise ModelError(f"policy.path = {path!r}: can't be loaded: it has no file *.safetensors")
    return folder


def _fetched(hub_id: str) -> Path:
    """The weights that transformers would read, and none of those that lie beside them in other forms."""
    folder = Path(snapshot_download(hub_id, allow_patterns=["*.json", "*.py", WHOLE]))
    index = folder / INDEX
    if index.is_file() and not (folder / WHOLE).is_file():
        parts = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        snapshot_download(hub_id, allow_patterns=sorted(parts))
    return folder
