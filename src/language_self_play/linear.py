"""Linear layers in bfloat16 on CPUs for few rows, as decoding has them.

A matrix product packs its second operand on every call. In x Wᵀ that is the weight, which a decoded
token reads but once; in (W xᵀ)ᵀ it is x. benchmarks/linear.py measures what this gains.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

# Above these, packing the weight is no longer what takes the time.
MOST_ROWS = 512


@contextmanager
def linears_for_few_rows(model: nn.Module) -> Iterator[None]:
    """While active, the model's linear layers are computed so where that is faster. No gradients."""
    layers = [
        layer
        for layer in model.modules()
        if isinstance(layer, nn.Linear)
        and layer.weight.device.type == "cpu"
        and layer.weight.dtype == torch.bfloat16
    ]
    for layer in layers:
        vars(layer)["forward"] = partial(_linear, layer)
    try:
        yield
    finally:
        for layer in layers:
            del vars(layer)["forward"]  # the instance's; the class keeps its own


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    rows = x.flatten(0, -2)
    if len(rows) > MOST_ROWS:
        return nn.functional.linear(x, layer.weight, layer.bias)
    y = (layer.weight @ rows.T).T
    if layer.bias is not None:
        y = y + layer.bias
    return y.unflatten(0, x.shape[:-1])
