"""What a step has to compute, and how fast this machine multiplies matrices."""

from __future__ import annotations

import statistics

import torch

from speed.models import Work
from speed.timing import Seconds, timed

SIZE = 2048
REPEATS = 7
# A backward pass multiplies with the weights and with the inputs: twice the forward pass.
FORWARD_AND_BACKWARD = 3


def flops(work: Work) -> float:
    """Floating-point operations that a step can't do without, each prompt computed once.

    2 for every weight that a token goes through, embeddings are looked up; logits of completion tokens
    only; attention 4 · head size · heads for every pair of a token and one before it.
    """
    roles = [
        (1, work.challenger_prompt, work.num_queries),
        (work.num_queries, work.solver_prompt, work.group_size),
    ]
    passes = 1 + FORWARD_AND_BACKWARD + (work.beta > 0)  # sampling, learning, the reference
    return passes * sum(_forward(work, *role) for role in roles)


def _forward(work: Work, groups: int, prompt: int, completions: int) -> float:
    shape, T = work.shape, work.length
    hidden, layers = shape["hidden_size"], shape["num_hidden_layers"]
    of_keys = hidden * shape["num_key_value_heads"] // shape["num_attention_heads"]
    attention = 2 * hidden * hidden + 2 * hidden * of_keys
    weights = layers * (attention + 3 * hidden * shape["intermediate_size"])
    tokens = prompt + completions * T
    pairs = prompt * (prompt + 1) / 2 + completions * (T * prompt + T * (T + 1) / 2)
    head = completions * T * hidden * shape["vocab_size"]
    return groups * (2 * weights * tokens + 2 * head + layers * 4 * hidden * pairs)


def matmul_rate(dtype: torch.dtype, clock: Seconds) -> float:
    """Operations a second of a large matrix product."""
    a, b = torch.randn(SIZE, SIZE).to(dtype), torch.randn(SIZE, SIZE).to(dtype)
    times = [timed(lambda: a @ b, clock) for _ in range(REPEATS)]
    return 2 * SIZE**3 / statistics.median(times[1:])
