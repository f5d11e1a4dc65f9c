"""Groups into micro-batches: prompts padded on the left, completions on the right, prompt shared.

    prompts      (B, P)       one row a group, or a slice of one that exceeds the token budget
    completions  (B, K, T)    its completions; all rows of a micro-batch have the same K

In this layout a prompt ends and its completions begin in the same column of every row, so that
one forward pass over the prompts serves all K completions of each (see forward.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from language_self_play.types import Completion, Groups


@dataclass
class MicroBatch:
    """Group slices of one role that go through the model together."""

    prompts_BP: Tensor
    prompt_mask_BP: Tensor
    completions_BKT: Tensor
    mask_BKT: Tensor
    advantages_BK: Tensor
    index_BK: Tensor  # place of each completion in Groups.completions()
    sampled_BKT: Tensor  # the sampler's log-probs, 0 where padded
    counts: bool = True  # False where a rank only goes along with others' passes


class _Slice(NamedTuple):
    prompt: list[int]
    completions: list[list[int]]
    logprobs: list[list[float]]
    advantages: list[float]
    places: list[int]

    @property
    def longest(self) -> int:
        return max(map(len, self.completions))


def micro_batches(
    groups: Groups,
    tokens_per_micro_batch: int,
    pad_id: int,
    device: torch.device,
    shared_prompt: bool = True,
) -> Iterator[MicroBatch]:
    """Every completion of `groups` that is kept, in micro-batches of similar lengths.

    A micro-batch holds at most `tokens_per_micro_batch` tokens, but at least one completion. A
    prompt counts once for all its completions, or once for each without `shared_prompt`.
    """
    ready: list[_Slice] = []
    ordered = sorted(
        _slices(groups, tokens_per_micro_batch, shared_prompt),
        key=lambda s: (len(s.completions), s.longest, len(s.prompt)),
    )
    for new in ordered:
        if ready and (
            len(new.completions) != len(ready[0].completions)
            or _num_tokens([*ready, new], shared_prompt) > tokens_per_micro_batch
        ):
            yield _collate(ready, pad_id, device)
            ready = []
        ready.append(new)
    if ready:
        yield _collate(ready, pad_id, device)


def share_of_tokens(groups: Groups, rank: int, size: int) -> list[list[bool]] | None:
    """`groups.keep` of the part that `rank` of `size` learns from: so many tokens in a row.

    A prompt counts as so much of each of its completions. Every kept completion is in one rank's part.
    """
    if size == 1:
        return groups.keep
    kept = groups.keep or [[True] * len(group.completions) for group in groups.groups]
    tokens = [
        [
            (len(c.tokens) + len(g.prompt) / max(1, sum(flags))) * flag
            for c, flag in zip(g.completions, flags, strict=True)
        ]
        for g, flags in zip(groups.groups, kept, strict=True)
    ]
    total, before = sum(map(sum, tokens)), 0.0
    keep: list[list[bool]] = []
    for flags, row in zip(kept, tokens, strict=True):
        keep.append([])
        for flag, length in zip(flags, row, strict=True):
            middle = (before + length / 2) / total if total else 0.0
            keep[-1].append(flag and min(int(middle * size), size - 1) == rank)
            before += length
    return keep


def kept_completions(groups: Groups) -> list[Completion]:
    """The completions of `groups` that enter the loss."""
    if groups.keep is None:
        return groups.completions()
    flags = [flag for row in groups.keep for flag in row]
    return [c for c, flag in zip(groups.completions(), flags, strict=True) if flag]


def first_kept(groups: Groups) -> list[list[bool]]:
    """`groups.keep` with nothing but its first completion."""
    kept = groups.keep or [[True] * len(group.completions) for group in groups.groups]
    first = next((i, j) for i, row in enumerate(kept) for j, flag in enumerate(row) if flag)
    return [[(i, j) == first for j in range(len(row))] for i, row in enumerate(kept)]


def _slices(groups: Groups, budget: int, shared_prompt: bool) -> Iterator[_Slice]:
    """Groups without the completions that are not kept, cut where one exceeds the budget."""
    assert groups.advantages is not None, "advantages come before learning"
    advantages = groups.advantages.flatten().tolist()
    start = 0
    for i, group in enumerate(groups.groups):
        kept = [
            (completion.tokens, completion.logprobs, advantages[start + j], start + j)
            for j, completion in enumerate(group.completions)
            if groups.keep is None or groups.keep[i][j]
        ]
        start += len(group.completions)
        if not kept:
            continue
        longest = max(len(tokens) for tokens, *_ in kept)
        rows = completions_at_once(budget, len(group.prompt), longest, shared_prompt)
        for first in range(0, len(kept), rows):
            columns = map(list, zip(*kept[first : first + rows], strict=True))
            yield _Slice(group.prompt, *columns)


def completions_at_once(budget: int, prompt: int, completion: int, shared_prompt: bool) -> int:
    """Most completions of one group in a micro-batch of `budget` tokens; at least one."""
    if shared_prompt:
        return max(1, (budget - prompt) // completion)
    return max(1, budget // (prompt + completion))


def _num_tokens(slices: list[_Slice], shared_prompt: bool) -> int:
    longest_prompt = max(len(s.prompt) for s in slices)
    longest = max(s.longest for s in slices)
    K = len(slices[0].completions)
    prompts = 1 if shared_prompt else K
    return len(slices) * (prompts * longest_prompt + K * longest)


def _collate(slices: list[_Slice], pad_id: int, device: torch.device) -> MicroBatch:
    B, K = len(slices), len(slices[0].completions)
    prompts_BP, prompt_mask_BP = pad_left([s.prompt for s in slices], pad_id, device)
    rows = [tokens for s in slices for tokens in s.completions]
    longest = max(map(len, rows))
    completions = torch.tensor([r + [pad_id] * (longest - len(r)) for r in rows], device=device)
    logprobs = [row for s in slices for row in s.logprobs]
    sampled = torch.tensor([r + [0.0] * (longest - len(r)) for r in logprobs], device=device)
    lengths = torch.tensor([len(r) for r in rows], device=device)
    mask = torch.arange(longest, device=device) < lengths[:, None]
    return MicroBatch(
        prompts_BP,
        prompt_mask_BP,
        completions.view(B, K, longest),
        mask.view(B, K, longest),
        torch.tensor([s.advantages for s in slices], device=device),
        torch.tensor([s.places for s in slices]),
        sampled.view(B, K, longest),
    )


def num_tokens(batch: MicroBatch, shared_prompt: bool) -> int:
    """Tokens of the rectangle that a micro-batch is, padding included, as its budget counts them."""
    B, K, T = batch.completions_BKT.shape
    return B * ((1 if shared_prompt else K) * batch.prompts_BP.shape[1] + K * T)


def pad_left(rows: Iterable[list[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(tokens, mask) of rows that end in the same column, both int64 of shape (B, longest)."""
    rows = list(rows)
    longest = max(map(len, rows))
    tokens = torch.tensor([[pad_id] * (longest - len(r)) + r for r in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows], device=device)
    return tokens, mask


def batches(
    lengths: list[int], tokens_per_batch: float, rows_per_batch: float = math.inf
) -> Iterator[list[int]]:
    """Places of rows that go through the model together, of similar length, the longest first.

    With padding a batch holds at most `tokens_per_batch` tokens and `rows_per_batch` rows, but at least
    one row.
    """
    batch: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        rows = len(batch) + 1
        if batch and (rows * lengths[batch[0]] > tokens_per_batch or rows > rows_per_batch):
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch
