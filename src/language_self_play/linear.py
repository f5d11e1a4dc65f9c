"""Linear layers of few rows, as decoding has them, on CPUs.

A matrix product packs its second operand on every call. In x Wᵀ that is the weight, which a decoded
token reads but once. So either the weights are laid out beforehand, in a copy that serves many tokens
(`lay_out`), or in bfloat16 (W xᵀ)ᵀ is computed, which packs x instead. benchmarks/linear.py measures
what both gain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

# Above this many rows, packing the weight is no longer what takes the time; below this size of a weight
# it never was.
MOST_ROWS = 512
SMALLEST_WEIGHT = 1 << 15
# From this size on, in float32, the layout of oneDNN's kernels is faster than a plain transposed one.
SMALLEST_PACKED = 1 << 18
# The rows for which oneDNN lays a weight out; with others it is as fast.
ROWS_PACKED_FOR = 64

Product = Callable[[Tensor], Sequence[Tensor]]


def lay_out(layers: Sequence[Any], dtype: torch.dtype, scale: Tensor | None = None) -> Product:
    """Several nn.Linear of one input, as one function of few rows: (R, in) to their outputs (R, ·).

    They compute in `dtype`, with their weights as they are now: on CPUs it is a copy that is read, in
    which their inputs are multiplied by `scale`, (in,). Elsewhere the layers themselves are called, and
    there must be no scale. No gradients.
    """
    if layers[0].weight.device.type != "cpu":
        assert scale is None
        return lambda x: [layer(x) for layer in layers]
    weight = torch.cat([layer.weight.to(dtype) for layer in layers])
    if scale is not None:
        weight *= scale.to(dtype)
    biases = [layer.bias for layer in layers]
    bias = None
    if any(b is not None for b in biases):
        sizes = [len(layer.weight) for layer in layers]
        bias = torch.cat(
            [
                b if b is not None else weight.new_zeros(n)
                for b, n in zip(biases, sizes, strict=True)
            ]
        ).to(dtype)
    product = _product(weight, bias)
    if len(layers) == 1:
        return lambda x: (product(x),)
    sizes = [len(layer.weight) for layer in layers]
    return lambda x: product(x).split(sizes, -1)


def _product(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """x Wᵀ + b of few rows, from W's best layout."""
    if weight.dtype == torch.float32 and weight.numel() >= SMALLEST_PACKED and _has_packed():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS_PACKED_FOR)
        compute = torch.ops.mkldnn._linear_pointwise
        return lambda x: compute(x, packed, bias, "none", [], "")
    if _packs_weight(weight):
        if bias is None:
            return lambda x: (weight @ x.T).T
        return lambda x: (weight @ x.T).T + bias
    transposed = weight.T.contiguous()
    if bias is None:
        return lambda x: x @ transposed
    return lambda x: torch.addmm(bias, x, transposed)


def _has_packed() -> bool:
    """Whether torch has what its own compiler uses for oneDNN's layout, which is not documented."""
    names = ("_reorder_linear_weight", "_linear_pointwise")
    return torch.backends.mkldnn.is_available() and all(
        hasattr(torch.ops.mkldnn, name) for name in names
    )


@contextmanager
def linears_for_few_rows(model: nn.Module) -> Iterator[None]:
    """While active, the model's bfloat16 layers compute (W xᵀ)ᵀ where that is faster. No gradients."""
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
    rows, weight, bias = x.flatten(0, -2), layer.weight, layer.bias
    if len(rows) > MOST_ROWS:
        return nn.functional.linear(x, weight, bias)
    y = (weight @ rows.T).T.unflatten(0, x.shape[:-1])
    return y if bias is None else y + bias


def _packs_weight(weight: Tensor) -> bool:
    return (
        weight.dtype == torch.bfloat16
        and weight.device.type == "cpu"
        and weight.numel() >= SMALLEST_WEIGHT
    )
