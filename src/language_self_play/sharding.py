"""A model whose weights lie in pieces on all ranks (FSDP2), and its whole form for sampling.

Each layer is gathered when it computes and let go of again; what is outside of layers (embeddings, norm, head)
forms one group, so that tied weights stay one. Gradients arrive as pieces too, averaged over the ranks.
Sampling would gather every layer for each token: instead the weights are gathered once a step into
`whole`, a model like the first but without hooks, and let go of before learning.

The first rank alone has read the model; the others' is without weights, and gets its rows from there. What an
adapter adds is small and lies on every rank: `whole` has the very same tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
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
from language_self_play.out_of_memory import is_out_of_memory, unless_out_of_memory
from language_self_play.shard_files import local, rows_of

T = TypeVar("T")


class PassAbandoned(MemoryError):
    """All ranks gave up a forward pass, as one had no memory for it: smaller ones can be tried."""


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
    """`model`, sharded from here on over all ranks. What it computes, all ranks compute together.

    The weights are those of `like`, a model of the same weights that is sharded already, or else those of
    the first rank's `model`. `everywhere` names parameters that are not sharded.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        ranks: Ranks,
        device: torch.device,
        dtype: torch.dtype,
        cpu_offload: bool,
        everywhere: Collection[str] = (),
        like: ShardedModel | None = None,
    ):
        self.model, self.ranks, self.device, self.dtype = model, ranks, device, dtype
        if like is None:
            _receive(model, ranks, device, everywhere)
        self._everywhere = set(everywhere)
        kept = {p for name, p in model.named_parameters() if name in self._everywhere}
        self.whole = hollow(model, device, dtype, kept)
        self._first_name = _first_names(model)
        keeps_type = all(p.dtype == dtype for p in model.parameters() if p not in kept)
        options: dict[str, Any] = {
            "mesh": init_device_mesh(device.type, (ranks.size,)),
            "mp_policy": MixedPrecisionPolicy()
            if keeps_type
            else MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32),
            "offload_policy": CPUOffloadPolicy(pin_memory=device.type == "cuda")
            if cpu_offload
            else OffloadPolicy(),
        }
        if kept:
            options["ignored_params"] = kept
        layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
        # Only one layer at a time is there as a whole, but for what the first rank has read.
        for module in layers:
            _lay_out(module, ranks, device, kept, sent=like is None)
            fully_shard(module, **options)
        _lay_out(model, ranks, device, kept, sent=like is None)
        self._root: Any = fully_shard(_Root(model), **options)
        self.abandoned = False
        self._order: list[Any] = []  # the root and the layers as a pass enters them
        self._reached: list[Any] = []  # in this pass, before and
        self._entered: list[Any] = []  # after each was gathered
        parts: list[Any] = [self._root, *layers]
        for part in parts:
            part.register_forward_pre_hook(lambda m, _: self._reached.append(m), prepend=True)
            part.register_forward_pre_hook(lambda m, _: self._entered.append(m))
        if like is not None:
            with torch.no_grad():
                for own, other in zip(model.parameters(), like.model.parameters(), strict=True):
                    local(own).copy_(local(other))

    def __call__(self, function: Callable[..., T], *args: Any) -> T:
        """`function(model, *args)`, called by all ranks with arguments of their own.

        Raises PassAbandoned, on all of them, where memory ran out on any. An allocator's own error, on
        this rank alone, says that they could not agree: it came while a layer was gathered.
        """
        self.abandoned = False
        self._reached.clear()
        self._entered.clear()
        with in_words():
            result = unless_out_of_memory(lambda: self._root(function, *args))
            if result is None:
                self._gather_rest()
            [self.abandoned] = self.ranks.any(result is None)
        if self.abandoned:
            result = None  # its graph holds the pass's tensors
            self._root.reset_iter_state()
            raise PassAbandoned(f"{self.device}: a rank has no memory left for a forward pass")
        self._order = list(dict.fromkeys(self._entered))
        assert result is not None
        return result

    def _gather_rest(self) -> None:
        """Gather what others gather for the rest of a pass that this rank has left, and let go of it."""
        is_told_apart = len(self._reached) == len(self._entered) and self._order
        if not (is_told_apart and hasattr(self._root, "reset_iter_state")):  # torch 2.13 has it
            raise torch.OutOfMemoryError(f"{self.device}: out of memory while layers were gathered")
        self._root.reset_iter_state()
        for layer in self._order[len(self._entered) :]:
            layer.unshard()
            layer.reshard()

    @torch.no_grad()
    def gather(self) -> None:
        """Give `whole` its weights. Raises MemoryLimitError if they don't fit beside the pieces."""
        found: dict[str, Tensor] = {}
        self._root.reshard()  # its own group stays gathered after a pass without backward
        try:
            for name, pieces in self.model.named_parameters():
                if name in self._everywhere:
                    continue
                assert isinstance(pieces, DTensor)
                with in_words():
                    converted: Any = pieces.detach().to(self.device, self.dtype)
                    found[name] = converted.full_tensor()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise MemoryLimitError(
                f"{self.device} has no memory for the whole model beside its shards, which sampling in"
                " this process needs; set distributed.cpu_offload, or use more ranks or GPUs with more"
                " memory (docs/scaling.md)"
            ) from None
        self._fill(lambda name: found[self._first_name[name]])

    def release(self) -> None:
        """Let go of the weights of `whole`."""
        self._fill(lambda name: None)

    def _fill(self, weight_of: Callable[[str], Tensor | None]) -> None:
        for name, parameter in list(self.whole.named_parameters(remove_duplicate=False)):
            if name in self._everywhere:
                continue
            module_name, _, leaf = name.rpartition(".")
            weight = weight_of(name)
            weight = parameter.detach().to("meta") if weight is None else weight
            module = self.whole.get_submodule(module_name)
            module._parameters[leaf] = nn.Parameter(weight, requires_grad=False)


def hollow(
    model: PreTrainedModel,
    device: torch.device,
    dtype: torch.dtype,
    kept: Collection[nn.Parameter] = (),
) -> PreTrainedModel:
    """A copy of `model` whose weights are on the meta device, in `dtype`; those `kept` both have.

    Buffers keep their types: rotary frequencies in bfloat16 would be other ones.
    """
    empty: dict[int, Any] = {
        id(p): p if p in kept else nn.Parameter(p.detach().to("meta", dtype), requires_grad=False)
        for p in model.parameters()
    }
    copied: PreTrainedModel = copy.deepcopy(model, empty)
    for module in copied.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
    return copied


def _receive(
    model: PreTrainedModel, ranks: Ranks, device: torch.device, everywhere: Collection[str]
) -> None:
    """The first rank's buffers and the parameters `everywhere`, on all ranks and `device`."""
    names = {id(p): name for name, p in model.named_parameters()}
    for module in model.modules():
        tables: list[dict[str, Any]] = [module._buffers, module._parameters]
        for table in tables:
            for leaf, tensor in table.items():
                is_parameter = isinstance(tensor, nn.Parameter)
                if tensor is None or (is_parameter and names[id(tensor)] not in everywhere):
                    continue
                received: Tensor = torch.empty_like(tensor, device="cpu")
                if ranks.is_first:
                    received = tensor.detach().contiguous()
                ranks.from_first(received)
                received = received.to(device)
                table[leaf] = nn.Parameter(received) if is_parameter else received


def _lay_out(
    module: nn.Module,
    ranks: Ranks,
    device: torch.device,
    kept: Collection[nn.Parameter],
    sent: bool,
) -> None:
    """Give weights that have none on this rank a tensor, of which this rank's rows are filled if `sent`.

    On a CPU the rest of such a tensor takes no memory: it is never touched.
    """
    # Of tied weights there is one. What is replaced is held: no other gets its id.
    replaced: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is None or isinstance(weight, DTensor) or weight in kept:
                continue
            if id(weight) not in replaced:
                filled = _with_own_rows(weight.detach(), ranks, device, sent)
                new = nn.Parameter(filled, requires_grad=weight.requires_grad)
                replaced[id(weight)] = weight, new
            part._parameters[name] = replaced[id(weight)][1]


def _with_own_rows(weight: Tensor, ranks: Ranks, device: torch.device, sent: bool) -> Tensor:
    def rows(rank: int) -> range:
        return rows_of(rank, ranks.size, len(weight))

    received = ranks.rows_from_first(weight, rows) if sent else None
    if not weight.is_meta:
        return weight
    laid_out = torch.empty_like(weight, device=device)
    if received is not None:
        laid_out[rows(ranks.rank).start : rows(ranks.rank).stop] = received
    return laid_out


def _first_names(model: nn.Module) -> dict[str, str]:
    """Parameter's name -> the name under which `named_parameters` has it, another's where tied."""
    first: dict[int, str] = {}
    named: Iterator[tuple[str, nn.Parameter]] = model.named_parameters(remove_duplicate=False)
    return {name: first.setdefault(id(parameter), name) for name, parameter in named}
