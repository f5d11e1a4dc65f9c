"""What an allocator says when there is no memory left, on whatever device."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")

# Some allocators raise a plain RuntimeError; these are of the CPU, of vLLM there, of CUDA's libraries, and of
# MPS.
PHRASES = (
    "can't allocate memory",
    "aligned_alloc failed",
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` means that a smaller batch could have worked."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and says_out_of_memory(str(error))


def says_out_of_memory(text: str) -> bool:
    """Whether `text`, what an error of another process says, means the same."""
    return any(phrase in text for phrase in (*PHRASES, "MemoryError"))


def unless_out_of_memory(compute: Callable[[], T]) -> T | None:
    """What `compute` returns; None where memory ran out, and then all that it held is free again."""
    try:
        return compute()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    # Outside of `except`: its traceback would keep the pass's tensors alive. What torch's allocator
    # keeps for later is given back, so that pieces of another size fit.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None
