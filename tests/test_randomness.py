"""Random numbers are pure functions of what they are for."""

from __future__ import annotations

import torch
from torch import Tensor

from language_self_play.randomness import choose, permutation, stream_key, uniforms

MASK = 2**64 - 1


def splitmix64(x: int) -> int:
    """The generator's output for state x, as published, on Python's integers."""
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def correlation(a: Tensor, b: Tensor) -> float:
    return torch.corrcoef(torch.stack([a, b]))[0, 1].item()


def test_uniform_numbers_have_known_values():
    # Without coordinates, the upper 53 bits of the key as a fraction of 2⁵³.
    assert uniforms(0xE220A8397B1DCDAF).item() == 0.8833108082136426
    # Group 0 to 1, completion 0, position 0 to 1.
    drawn = uniforms(1431757950322055470, torch.tensor([[0], [1]]), 0, torch.tensor([0, 1]))
    assert drawn.tolist() == [
        [0.5211626125257989, 0.5355995431078421],
        [0.2496375555595175, 0.6788531140829343],
    ]


def test_the_hash_is_splitmix64_on_the_bits_of_signed_tensors():
    # The first outputs that are published for the seeds 0 and 1234567.
    assert splitmix64(0) == 0xE220A8397B1DCDAF
    assert splitmix64(1234567) == 6457827717110365317
    coordinates = [(0, 0, 0), (3, 1, 4), (2**40, 7, 10**9), (2**62, 2**62, 1)]
    for key in (0, 1, 2**63, MASK, stream_key(5)):
        drawn = uniforms(key, *torch.tensor(coordinates).T)
        for number, parts in zip(drawn.tolist(), coordinates, strict=True):
            state = key
            for part in parts:
                state = splitmix64(state ^ splitmix64(part))
            assert number == (state >> 11) / 2**53


def test_a_number_does_not_depend_on_what_else_is_drawn():
    key = stream_key(0, 1, "solver")
    groups, completions, positions = torch.arange(3), torch.arange(4), torch.arange(5)
    together = uniforms(key, groups[:, None, None], completions[:, None], positions)
    assert together.shape == (3, 4, 5)
    assert torch.equal(uniforms(key, 2, completions, 4), together[2, :, 4])
    assert torch.equal(uniforms(key, groups.flip(0), 1, 3), together[:, 1, 3].flip(0))
    assert uniforms(key, 1, 3, 2).item() == together[1, 3, 2].item()


def test_numbers_fill_the_unit_interval_evenly():
    drawn = uniforms(stream_key(0, 0, "challenger"), torch.arange(100)[:, None], torch.arange(1000))
    assert drawn.dtype == torch.float64
    assert drawn.min() >= 0
    assert drawn.max() < 1
    counts = torch.histc(drawn.float(), bins=20, min=0, max=1)
    # χ² with 19 degrees of freedom: above 43.8 once in a thousand.
    assert ((counts - 5_000) ** 2 / 5_000).sum() < 43.8


def test_neighbours_are_uncorrelated():
    drawn = uniforms(stream_key(0, 0, "challenger"), torch.arange(100)[:, None], torch.arange(1000))
    # Standard error 1/√100,000 = 0.003.
    assert abs(correlation(drawn[:-1].flatten(), drawn[1:].flatten())) < 0.012
    assert abs(correlation(drawn[:, :-1].flatten(), drawn[:, 1:].flatten())) < 0.012


def test_seeds_steps_and_roles_have_streams_of_their_own():
    streams = [
        uniforms(stream_key(seed, step, role), torch.arange(10_000))
        for seed in (0, 1)
        for step in (0, 1)
        for role in ("challenger", "solver", "judge")
    ]
    assert len({s[0].item() for s in streams}) == 12
    for i, a in enumerate(streams):
        for b in streams[:i]:
            assert abs(correlation(a, b)) < 0.05  # standard error 0.01


def test_the_order_of_a_keys_parts_matters():
    assert stream_key(0, 1, 2) != stream_key(0, 2, 1)
    assert stream_key(0, 1) != stream_key(1, 0)
    # Where the seed equals the step it must still matter which they are.
    assert len({stream_key(i, i, "solver") for i in range(10)}) == 10


def test_a_permutation_holds_each_index_once_and_every_order_is_as_likely():
    orders = [tuple(permutation(stream_key(0, "data", epoch), 3)) for epoch in range(1_200)]
    assert all(sorted(order) == [0, 1, 2] for order in orders)
    counts = torch.tensor([orders.count(order) for order in sorted(set(orders))])
    assert len(counts) == 6
    # χ² with 5 degrees of freedom: above 20.5 once in a thousand.
    assert ((counts - 200.0) ** 2 / 200).sum() < 20.5


def test_choose_is_even_and_repeatable():
    chosen = [choose(stream_key(0, step, "task"), 4) for step in range(4_000)]
    assert chosen == [choose(stream_key(0, step, "task"), 4) for step in range(4_000)]
    counts = torch.tensor([chosen.count(i) for i in range(4)])
    # χ² with 3 degrees of freedom: above 16.3 once in a thousand.
    assert counts.sum() == 4_000
    assert ((counts - 1_000.0) ** 2 / 1_000).sum() < 16.3
