"""Tensors in pieces of rows, one file a rank, read again by any number of ranks.

    shards/shard-00001-of-00004.safetensors

holds one rank's rows of every tensor; where they belong stands in its header as JSON, `pieces`:
{name: [first row, rows of the whole]}. A reader takes from all files the rows that it needs, no matter how many
wrote them. Safetensors and JSON only: nothing is unpickled, as torch.distributed.checkpoint's own reader would.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from language_self_play.errors import InputFileError

PIECES = "pieces"
# What of a model a file holds, as NAME:weight: a trained weight, or a buffer, which the first rank writes whole.
WEIGHT, BUFFER = "weight", "buffer"


def rows_of(rank: int, size: int, rows: int) -> range:
    """The rows of a tensor that lie on `rank`, as torch's Shard(0) has it: the last ranks may get less."""
    each = -(-rows // size)
    return range(min(rank * each, rows), min((rank + 1) * each, rows))


def local(tensor: Tensor) -> Tensor:
    """The rows of `tensor` that lie on this rank; all of one that is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def save_shard(
    folder: Path,
    tensors: Mapping[str, Tensor],
    pieces: Mapping[str, tuple[int, int]],
    rank: int,
    size: int,
) -> None:
    """Write one rank's file. `pieces` has (first row, rows of the whole) of those that are parts.

    What is no part of anything, such as a count, the first rank writes. Raises OSError.
    """
    own = {
        k: v
        for k, v in tensors.items()
        if (k in pieces and len(v)) or (k not in pieces and rank == 0)
    }
    header = {PIECES: json.dumps({k: pieces[k] for k in own if k in pieces})}
    save_file(own, folder / f"shard-{rank:05d}-of-{size:05d}.safetensors", header)


class _Piece(NamedTuple):
    file: Path
    name: str  # in the file
    start: int
    rows: int  # of the whole


class Shards:
    """Tensors that lie in `files`, whole or in pieces. Names get their file's prefix before them."""

    def __init__(self, files: Iterable[tuple[Path, str]]):
        self._pieces: dict[str, list[_Piece]] = defaultdict(list)
        for file, prefix in files:
            with safe_open(file, "pt") as opened:
                places = json.loads((opened.metadata() or {}).get(PIECES, "{}"))
                for name in opened.keys():  # noqa: SIM118  # it is no mapping
                    shape = opened.get_slice(name).get_shape()
                    start, rows = places.get(name, (0, shape[0] if shape else 1))
                    self._pieces[prefix + name].append(_Piece(file, name, start, rows))

    def __contains__(self, name: str) -> bool:
        return name in self._pieces

    def names(self, prefix: str) -> list[str]:
        """The names that begin with `prefix`."""
        return [name for name in self._pieces if name.startswith(prefix)]

    def read(self, name: str, rank: int = 0, size: int = 1) -> Tensor:
        """The rows of a tensor that lie on `rank` of `size`; by default all."""
        pieces = sorted(self._pieces[name], key=lambda piece: piece.start)
        wanted = rows_of(rank, size, pieces[0].rows)
        found = []
        for piece in pieces:
            with safe_open(piece.file, "pt") as opened:
                part = opened.get_slice(piece.name)
                shape = part.get_shape()
                if not shape:
                    return opened.get_tensor(piece.name)
                start = max(wanted.start - piece.start, 0)
                stop = min(wanted.stop - piece.start, shape[0])
                if start < stop or len(pieces) == 1:
                    found.append(part[start : max(start, stop)])
        read = torch.cat(found) if found else torch.empty(0, *shape[1:])
        if len(read) != len(wanted):
            raise InputFileError(
                f"{pieces[0].file.parent}: of {name} {len(wanted) - len(read)} rows are missing; a rank's"
                " file is gone, put it back"
            )
        return read

    def model(self) -> dict[str, Tensor]:
        """The whole model's weights and buffers by name, as a state dict has them; no moments."""
        named = {name: name.rsplit(":", 1) for name in self._pieces}
        return {
            of_model: self.read(name)
            for name, [of_model, what] in named.items()
            if what in (WEIGHT, BUFFER)
        }
