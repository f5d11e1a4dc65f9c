"""A model whose weights lie in pieces on all ranks (FSDP2), and its whole form for sampling.

Each layer is gathered when it computes and let go of again; what is outside of layers (embeddings, norm, head)
forms one group, so that tied weights stay one. Gradients arrive as pieces too, averaged over the ranks.
Sampling would gather every layer for each token: instead the weights are gathered once a step into
`whole`, a model like the first but without hooks, and let go of before learning.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from language_self_play.distributed import Ranks, in_words
from language_self_play.errors import MemoryLimitError
from language_self_play.out_of_memory import is_out_of_memory

T = TypeVar("T")


class _Root(nn.Module):
    """What FSDP2 takes for the outermost module: any function of the model is its forward pass."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        result = function(self.model, *args)
        # FSDP2 hangs its backward pass on the result, and warns where that is a view.
        return result.clone() if isinstance(result, Tensor) else result


class ShardedModel:
    """`model`, sharded from here on over all ranks. What it computes, all ranks compute together."""

    def __init__(
        self,
        model: PreTrainedModel,
        ranks: Ranks,
        device: torch.device,
        dtype: torch.dtype,
        cpu_offload: bool,
    ):
        self.model, self.ranks, self.device, self.dtype = model, ranks, device, dtype
        self.whole = _hollow(model, device)
        self._first_name = _first_names(model)
        keeps_type = all(parameter.dtype == dtype for parameter in model.parameters())
        options: dict[str, Any] = {
            "mesh": init_device_mesh(device.type, (ranks.size,)),
            "mp_policy": MixedPrecisionPolicy()
            if keeps_type
            else MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32),
            "offload_policy": CPUOffloadPolicy() if cpu_offload else OffloadPolicy(),
        }
        for module in list(model.modules()):
            if isinstance(module, GradientCheckpointingLayer):
                fully_shard(module, **options)
        self._root: Any = fully_shard(_Root(model), **options)

    def __call__(self, function: Callable[..., T], *args: Any) -> T:
        """`function(model, *args)`, called by all ranks with arguments of their own."""
        with in_words():
            return self._root(function, *args)

    @torch.no_grad()
    def gather(self, on_first_only: bool = False) -> None:
        """Give `whole` its weights, on all ranks, or on the first alone and there on the CPU.

        Raises MemoryLimitError if they don't fit beside the pieces.
        """
        found: dict[str, Tensor] = {}
        self._root.reshard()  # its own group stays gathered after a pass without backward
        try:
            for name, pieces in self.model.named_parameters():
                assert isinstance(pieces, DTensor)
                with in_words():
                    converted: Any = pieces.detach().to(self.device, self.dtype)
                    full = converted.full_tensor()
                if not on_first_only:
                    found[name] = full
                elif self.ranks.is_first:
                    found[name] = full.cpu()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise MemoryLimitError(
                f"{self.device} has no memory for the whole model beside its shards, which sampling in"
                " this process needs; set distributed.cpu_offload, or use more ranks or GPUs with more"
                " memory (docs/scaling.md)"
            ) from None
        if found:
            self._fill(lambda name: found[self._first_name[name]])

    def release(self) -> None:
        """Let go of the weights of `whole`."""
        self._fill(lambda name: None)

    def _fill(self, weight_of: Callable[[str], Tensor | None]) -> None:
        for name, parameter in list(self.whole.named_parameters(remove_duplicate=False)):
            module_name, _, leaf = name.rpartition(".")
            weight = weight_of(name)
            weight = parameter.detach().to("meta") if weight is None else weight
            module = self.whole.get_submodule(module_name)
            module._parameters[leaf] = nn.Parameter(weight, requires_grad=False)


def _hollow(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """A copy of `model` without weights: its parameters are on the meta device."""
    empty: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in model.parameters()
    }
    copied: PreTrainedModel = copy.deepcopy(model, empty)
    for module in copied.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
    return copied


def _first_names(model: nn.Module) -> dict[str, str]:
    """Parameter's name -> the name under which `named_parameters` has it, another's where tied."""
    first: dict[int, str] = {}
    named: Iterator[tuple[str, nn.Parameter]] = model.named_parameters(remove_duplicate=False)
    return {name: first.setdefault(id(parameter), name) for name, parameter in named}
