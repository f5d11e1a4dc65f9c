"""Every random number is a pure function of what it is for; no generator lives across steps.

A counter is hashed to a uniform number with the finaliser of splitmix64 (Steele, Lea, Flood,
"Fast splittable pseudorandom number generators", 2014). A resumed run therefore needs no random
state, and splitting groups among batches or ranks changes nothing that is drawn.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

_MASK = 2**64 - 1
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
# Mantissa bits of a float64: the largest count for which every value is exact and below 1.
_UNIFORM_BITS = 53


def stream_key(seed: int, *parts: int | str) -> int:
    """A 64-bit key for (seed, *parts), such as (seed, step, role)."""
    key = 0
    for part in (seed, *parts):
        number = zlib.crc32(part.encode()) if isinstance(part, str) else part
        key = _mix(key ^ _mix(number))
    return key


def uniforms(key: int, *coordinates: Tensor | int) -> Tensor:
    """Uniform numbers in [0, 1), float64: one for each broadcast tuple of integer coordinates.

    `coordinates` are int64 tensors or ints, such as (group, completion, position).
    """
    state = torch.tensor(_signed(key))
    for coordinate in coordinates:
        number = torch.as_tensor(coordinate, dtype=torch.int64)
        state = _mix_tensor(state.to(number.device) ^ _mix_tensor(number))
    return _shift_right(state, 64 - _UNIFORM_BITS).double() * 2.0**-_UNIFORM_BITS


def permutation(key: int, length: int) -> list[int]:
    """A random order of range(length)."""
    return uniforms(key, torch.arange(length)).argsort(stable=True).tolist()


def choose(key: int, length: int) -> int:
    """A random element of range(length)."""
    return int(uniforms(key).item() * length)


def _mix(x: int) -> int:
    x = (x + _GOLDEN_GAMMA) & _MASK
    x = ((x ^ (x >> 30)) * _MIX_1) & _MASK
    x = ((x ^ (x >> 27)) * _MIX_2) & _MASK
    return x ^ (x >> 31)


def _mix_tensor(x: Tensor) -> Tensor:
    # int64 arithmetic wraps around, so the bits are those of the unsigned computation above.
    x = x + _signed(_GOLDEN_GAMMA)
    x = (x ^ _shift_right(x, 30)) * _signed(_MIX_1)
    x = (x ^ _shift_right(x, 27)) * _signed(_MIX_2)
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    # torch shifts int64 arithmetically; the mask makes it the logical shift.
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x
