"""Linear layers in bfloat16 on CPUs for few rows, as decoding has them.

A matrix product packs its second operand on every call. In x Wᵀ that is the weight, which a decoded
token reads but once; in (W xᵀ)ᵀ it is x. benchmarks/linear.py measures what this gains.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

# Above this many rows, packing the weight is no longer what takes the time; below this size of a weight
# it never was.
MOST_ROWS = 512
SMALLEST_WEIGHT = 1 << 15


def linear(x: Tensor, layer: Any) -> Tensor:
    """`layer`, an nn.Linear, of few rows (R, in): (R, out). No gradients."""
    weight, bias = layer.weight, layer.bias
    if not _packs_weight(weight) or len(x) > MOST_ROWS:
        return nn.functional.linear(x, weight, bias)
    y = (weight @ x.T).T
    return y if bias is None else y + bias


@contextmanager
def linears_for_few_rows(model: nn.Module) -> Iterator[None]:
    """While active, the model's linear layers are computed so where that is faster. No gradients."""
    layers = [
        layer
        for layer in model.modules()
        # Subclasses compute in their own ways.
        if type(layer) is nn.Linear and _packs_weight(layer.weight)
    ]
    for layer in layers:
        vars(layer)["forward"] = partial(_forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            del vars(layer)["forward"]  # the instance's; the class keeps its own


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    return linear(x.flatten(0, -2), layer).unflatten(0, x.shape[:-1])


def _packs_weight(weight: Tensor) -> bool:
    return (
        weight.dtype == torch.bfloat16
        and weight.device.type == "cpu"
        and weight.numel() >= SMALLEST_WEIGHT
    )
