"""Allocators that have no memory left, and models that pass only so many rows, for several test files."""

from __future__ import annotations

from typing import Any

import torch

OUT_OF_MEMORY = {
    "torch": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cpu": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory:"
        " you tried to allocate 123456789 bytes. Error code 12 (Cannot allocate memory)"
    ),
}


def limit_rows(model: Any, most: int, error: Exception) -> list[int]:
    """Passes of `model` over more than `most` rows raise `error`; returns the rows of each, as they come.

    They raise it late, when the first layer has computed.
    """
    rows: list[int] = []

    def count(module: Any, args: Any, output: Any) -> None:
        rows.append(len(args[0]))

    def limited(module: Any, args: Any, output: Any) -> None:
        if rows[-1] > most:
            raise error

    model.get_input_embeddings().register_forward_hook(count)
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    layers[0].register_forward_hook(limited)
    return rows
