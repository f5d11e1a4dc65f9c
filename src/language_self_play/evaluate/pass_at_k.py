"""pass@k without bias, from n ≥ k answers to a question. Never torch."""

from __future__ import annotations

import math


def pass_at_k(n: int, c: int, k: int) -> float:
    """The probability that of k answers, drawn from n of which c are right, at least one is right.

    1 − C(n − c, k) / C(n, k): the unbiased estimate of 1 − (1 − p)^k. Chen et al., "Evaluating Large
    Language Models Trained on Code", arXiv 2107.03374, Equation 1. Raises ValueError unless
    1 ≤ k ≤ n and 0 ≤ c ≤ n.
    """
    if not (1 <= k <= n and 0 <= c <= n):
        raise ValueError(f"n = {n}, c = {c}, k = {k}: 1 ≤ k ≤ n and 0 ≤ c ≤ n are needed")
    # Exact integers: there are no factorials to overflow, and C(n - c, k) is 0 for k > n - c.
    return 1 - math.comb(n - c, k) / math.comb(n, k)
