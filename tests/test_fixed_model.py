"""A model for an engine that reads its weights itself: it is given whole weights, or none."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from language_self_play.config import Policy as PolicySection
from language_self_play.fixed_model import FixedModel
from language_self_play.pretrained import load_model, resolve_model
from language_self_play.shard_files import WEIGHT, rows_of, save_shard

CPU = torch.device("cpu")


def fixed(path: object) -> FixedModel:
    return FixedModel(PolicySection(path=str(path)), CPU, torch.float32)


def test_a_whole_models_folder_is_what_the_engine_reads():
    assert fixed("arena").folder == Path(resolve_model("arena"))


def test_shards_are_put_together_for_the_engine(tmp_path: Path):
    """As a checkpoint of two ranks holds them: half of the rows of each weight in each file."""
    model = load_model("arena", torch.float32, CPU)
    fixed("arena").chat.tokenizer.save_pretrained(tmp_path / "shards")
    model.config.save_pretrained(tmp_path / "shards")
    state = model.state_dict()
    for rank in range(2):
        rows = {name: rows_of(rank, 2, len(tensor)) for name, tensor in state.items()}
        save_shard(
            tmp_path / "shards",
            {f"{n}:{WEIGHT}": t[rows[n].start : rows[n].stop].clone() for n, t in state.items()},
            {f"{n}:{WEIGHT}": (rows[n].start, len(t)) for n, t in state.items()},
            rank,
            2,
        )
    shards = fixed(tmp_path / "shards")
    assert shards.folder is None
    shards.save_weights(tmp_path / "whole")
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    theirs = load_file(Path(resolve_model("arena")) / "model.safetensors")
    assert whole.keys() == theirs.keys()
    assert all(torch.equal(whole[name], theirs[name]) for name in whole)
