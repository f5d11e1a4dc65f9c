"""What an allocator says when there is no memory left, on whatever device."""

from __future__ import annotations

import torch

# Some allocators raise a plain RuntimeError; these are of the CPU, of CUDA's libraries, and of MPS.
PHRASES = (
    "can't allocate memory",
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` means that a smaller batch could have worked."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in PHRASES)


def free_cached_memory() -> None:
    """Give back what torch's allocator keeps for later, so that pieces of another size fit."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
