"""Count the bytes that a pass of a model keeps alive. On fake tensors it takes neither time nor memory."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel

HEAP_BLOCK = 32 * 2**20  # larger blocks glibc returns at once; see memory.py


class LiveBytes(TorchDispatchMode):
    """While active, counts the bytes of tensors that operations make, until they are freed.

    `now` and at `most`, and of those in blocks that the C library's heap would hold `most_in_heap`.
    `known` tensors and their views are not counted.
    """

    def __init__(self, known: list[Tensor]):
        super().__init__()
        self.now = self.most = 0
        self._in_heap = self.most_in_heap = 0
        self._known = [t.untyped_storage() for t in known]  # held: no other gets their addresses
        self._sizes = {storage._cdata: 0 for storage in self._known}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = _on_fake_tensors(func, args, kwargs or {})
        tree_map_only(Tensor, self._count, result)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address not in self._sizes:
            self._sizes[address] = storage.nbytes()
            self._add(storage.nbytes(), 1)
            weakref.finalize(storage, self._forget, address)

    def _forget(self, address: int) -> None:
        self._add(self._sizes.pop(address), -1)

    def _add(self, size: int, sign: int) -> None:
        self.now += sign * size
        self.most = max(self.most, self.now)
        if size <= HEAP_BLOCK:
            self._in_heap += sign * size
            self.most_in_heap = max(self.most_in_heap, self._in_heap)


class FullBatch(TorchDispatchMode):
    """Answers yes where a pass asks of fake tensors, which have no numbers, whether none is padding."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        asked = func is torch.ops.aten._local_scalar_dense.default
        if asked and isinstance(args[0], FakeTensor) and args[0].dtype == torch.bool:
            return True
        return _on_fake_tensors(func, args, kwargs or {})


def _on_fake_tensors(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """`func`'s result. Of experts' products torch knows the shape in bfloat16 alone."""
    if func is not torch.ops.aten._grouped_mm.default or args[0].dtype == torch.bfloat16:
        return func(*args, **kwargs)
    left, right, *rest = args
    shaped = func(left.to(torch.bfloat16), right.to(torch.bfloat16), *rest, **kwargs)
    return shaped.to(left.dtype)


@contextmanager
def counting(model: PreTrainedModel, *known: Tensor) -> Iterator[LiveBytes]:
    """Beside the model's own tensors and those `known`."""
    own = [*model.parameters(), *model.buffers(), *known]
    with LiveBytes(own) as count:
        yield count
