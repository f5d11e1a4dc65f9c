"""Groups into micro-batches: nothing lost, nothing twice, within the budget."""

from __future__ import annotations

import pytest
import torch

from language_self_play.packing import MicroBatch, micro_batches, pad_left
from language_self_play.types import Completion, Group, Groups

PAD = 0
CPU = torch.device("cpu")
# Prompt lengths and, for each, the lengths of its completions.
SHAPES = [(3, (2, 7, 1, 4)), (12, (5, 5, 5, 5)), (1, (1, 1, 1, 1)), (5, (9, 2, 2, 2))]


def make_groups(keep: list[list[bool]] | None = None) -> Groups:
    """Groups of SHAPES in which every token is another number, and every advantage."""
    token = iter(range(1, 1_000))
    groups = [
        Group(
            [next(token) for _ in range(prompt)],
            [
                Completion([next(token) for _ in range(length)], "", [0.0] * length, "stop")
                for length in lengths
            ],
        )
        for prompt, lengths in SHAPES
    ]
    advantages = torch.arange(16.0).view(4, 4) - 7.5
    return Groups("solver", groups, temperature=1.0, advantages=advantages, keep=keep)


def unpack(batches: list[MicroBatch]) -> list[tuple[int, list[int], list[int], float]]:
    """(index, prompt, completion, advantage) of every completion, by the masks."""
    found = []
    for batch in batches:
        B, K, _ = batch.completions_BKT.shape
        for b in range(B):
            prompt = batch.prompts_BP[b][batch.prompt_mask_BP[b].bool()].tolist()
            for k in range(K):
                completion = batch.completions_BKT[b, k][batch.mask_BKT[b, k]].tolist()
                index, advantage = batch.index_BK[b, k].item(), batch.advantages_BK[b, k].item()
                found.append((index, prompt, completion, advantage))
    return sorted(found)


def expected_of(groups: Groups) -> list[tuple[int, list[int], list[int], float]]:
    advantages = groups.advantages.flatten().tolist()
    pairs = [(g.prompt, c.tokens) for g in groups.groups for c in g.completions]
    keep = groups.keep or [[True] * len(pairs)]
    kept = [flag for row in keep for flag in row]
    return [(i, *pair, advantages[i]) for i, pair in enumerate(pairs) if kept[i]]


@pytest.mark.parametrize("budget", [1, 25, 10_000])
def test_the_samplers_log_probs_stand_where_their_tokens_do_and_padding_is_0(budget):
    groups = make_groups()
    for group in groups.groups:
        group.completions[:] = [
            c._replace(logprobs=[-float(token) for token in c.tokens]) for c in group.completions
        ]
    for batch in micro_batches(groups, budget, PAD, CPU):
        expected = torch.where(batch.mask_BKT, -batch.completions_BKT.float(), 0.0)
        assert torch.equal(batch.sampled_BKT, expected)


@pytest.mark.parametrize("budget", [1, 15, 25, 40, 60, 10_000])
def test_every_completion_is_in_one_micro_batch_with_its_prompt_and_advantage(budget):
    groups = make_groups()
    assert unpack(list(micro_batches(groups, budget, PAD, CPU))) == expected_of(groups)


@pytest.mark.parametrize("budget", [1, 25, 10_000])
def test_completions_that_are_not_kept_are_in_none(budget):
    keep = [[True, False, True, True], [False] * 4, [True] * 4, [False, False, False, True]]
    groups = make_groups(keep)
    batches = list(micro_batches(groups, budget, PAD, CPU))
    assert [index for index, *_ in unpack(batches)] == [0, 2, 3, 8, 9, 10, 11, 15]
    assert unpack(batches) == expected_of(groups)


@pytest.mark.parametrize("budget", [1, 15, 25, 40, 60, 10_000])
def test_a_micro_batch_exceeds_the_budget_only_for_a_single_completion(budget):
    for batch in micro_batches(make_groups(), budget, PAD, CPU):
        # Padding counts: B prompts of the longest length, B·K completions of the longest length.
        B, P = batch.prompts_BP.shape
        _, K, T = batch.completions_BKT.shape
        assert budget >= B * (P + K * T) or (B, K) == (1, 1)


def test_a_large_budget_takes_whole_groups_together():
    # 4 · (12 + 4 · 9) = 192 tokens.
    assert len(list(micro_batches(make_groups(), 192, PAD, CPU))) == 1
    assert len(list(micro_batches(make_groups(), 191, PAD, CPU))) == 2


def test_prompts_end_and_completions_begin_in_the_same_column():
    [batch] = micro_batches(make_groups(), 10_000, PAD, CPU)
    assert batch.prompts_BP.shape == (4, 12)
    assert batch.completions_BKT.shape == (4, 4, 9)
    assert batch.prompt_mask_BP[:, -1].tolist() == [1] * 4
    assert batch.mask_BKT[..., 0].all()
    # Masks have no holes, and what they leave out is padding.
    assert (batch.prompt_mask_BP.diff(dim=-1) >= 0).all()
    assert (batch.mask_BKT.int().diff(dim=-1) <= 0).all()
    assert (batch.prompts_BP[batch.prompt_mask_BP == 0] == PAD).all()
    assert (batch.completions_BKT[~batch.mask_BKT] == PAD).all()


def test_the_challengers_single_group_has_one_row_of_advantages():
    group = Group([5], [Completion([6 + k], "", [0.0], "stop") for k in range(3)])
    advantages = torch.tensor([0.5, -1.0, 0.5])
    posed = Groups("challenger", [group], temperature=1.0, advantages=advantages)
    [batch] = micro_batches(posed, 100, PAD, CPU)
    assert batch.advantages_BK.tolist() == [[0.5, -1.0, 0.5]]
    assert batch.completions_BKT.tolist() == [[[6], [7], [8]]]


def test_no_groups_make_no_micro_batches():
    empty = Groups("solver", [], temperature=1.0, advantages=torch.zeros(0, 0))
    assert list(micro_batches(empty, 100, PAD, CPU)) == []


def test_pad_left_masks_the_padding_and_nothing_else():
    tokens, mask = pad_left([[7], [8, PAD, 9]], PAD, CPU)
    assert tokens.tolist() == [[PAD, PAD, 7], [8, PAD, 9]]
    # A pad token inside a row is a token like any other.
    assert mask.tolist() == [[0, 0, 1], [1, 1, 1]]
