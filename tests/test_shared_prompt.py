"""Rows behind prompts that exist once: the logits of each row's whole sequence, however it came there."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from language_self_play import shared_prompt
from language_self_play.prefill import Prefilled, prefill
from language_self_play.shared_prompt import (
    SharedPrompt,
    attention_to_shared_prompts,
    go_on,
    layer_windows,
)

LOGIT_TOLERANCE = 1e-5
PAD = 0
# With windows of 5 tokens: shorter, longer, and one that ends just in it.
PROMPTS = ([1, 20], [1, 30, 31, 32, 33, 34, 35, 36, 2], [1, 40, 41, 2])
ROWS_OF_PROMPTS = {
    "in order": [0, 0, 1, 1, 2, 2],
    "mixed": [2, 0, 1, 1, 0, 2],
    "unequal numbers": [0, 1, 1, 1, 2],
    "unequal and mixed": [1, 2, 1, 0, 1],
    "one each": [0, 1, 2],
}


@pytest.fixture(params=ROWS_OF_PROMPTS.values(), ids=ROWS_OF_PROMPTS)
def prompt_of_row(request: pytest.FixtureRequest) -> list[int]:
    return request.param


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.inference_mode():
        yield


def random_tokens(rows: int, length: int) -> Tensor:
    return torch.randint(3, 80, (rows, length), generator=torch.Generator().manual_seed(0))


class Rows:
    """A cache with rows behind PROMPTS, and what each row's whole sequence is so far."""

    def __init__(self, model: Any, prompt_of_row: list[int], prefilled: Prefilled | None = None):
        self.model = model
        prefilled = prefilled or prefill(model, list(PROMPTS), PAD)
        self.cache = SharedPrompt(prefilled.cache, prefilled.mask_BP, torch.tensor(prompt_of_row))
        self.sequences = [list(PROMPTS[b]) for b in prompt_of_row]

    def go_on(self, tokens: Tensor) -> Tensor:
        """Logits (R, Q, V) after each of the tokens (R, Q)."""
        positions = torch.tensor([range(n := len(s), n + tokens.shape[1]) for s in self.sequences])
        for sequence, new in zip(self.sequences, tokens.tolist(), strict=True):
            sequence += new
        return go_on(self.model, self.cache, input_ids=tokens, position_ids=positions)

    def keep(self, rows: list[int]) -> None:
        self.cache.keep(torch.tensor(rows))
        self.sequences = [self.sequences[r] for r in rows]

    def expected(self, last: int) -> Tensor:
        """The last logits of each whole sequence, alone, without a cache."""
        return torch.stack(
            [
                self.model(
                    input_ids=torch.tensor([s]),
                    attention_mask=torch.ones(1, len(s), dtype=torch.int64),
                    use_cache=False,
                ).logits[0, -last:]
                for s in self.sequences
            ]
        )


def check(rows: Rows, tokens: Tensor, widths: list[int]) -> None:
    """Going on by `widths` tokens at a time gives the logits of whole sequences."""
    found = torch.cat([rows.go_on(piece) for piece in tokens.split(widths, 1)], 1)
    expected = rows.expected(tokens.shape[1])
    assert expected.std() > 0.3  # otherwise any model would do
    assert_close(found, expected, rtol=0, atol=LOGIT_TOLERANCE)


def test_rows_go_on_token_by_token_as_whole_sequences(any_model: Any, prompt_of_row: list[int]):
    check(Rows(any_model, prompt_of_row), random_tokens(len(prompt_of_row), 8), [1] * 8)


@pytest.mark.parametrize("widths", [[8], [3, 1, 4], [1, 7]], ids=str)
def test_rows_go_on_by_many_tokens_at_once_as_whole_sequences(any_model: Any, widths: list[int]):
    check(Rows(any_model, [1, 2, 1, 0, 1]), random_tokens(5, 8), widths)


@pytest.mark.parametrize("piece", [1, 3, 8])
def test_buffers_that_grow_keep_what_is_in_them(
    any_model: Any, monkeypatch: pytest.MonkeyPatch, piece: int
):
    monkeypatch.setattr(shared_prompt, "PIECE", piece)
    check(Rows(any_model, [0, 1, 1, 2]), random_tokens(4, 10), [1, 1, 1, 4, 1, 1, 1])


def test_buffers_grow_a_piece_at_a_time_and_are_moved_no_more_often(tiny_llama: Any):
    rows = Rows(tiny_llama, [0, 1, 1, 2])
    layer = rows.cache.of_layer[0]
    addresses, capacities = [], set()
    for tokens in random_tokens(4, 300).split(1, 1):
        rows.go_on(tokens)
        addresses.append(layer.own_keys.data_ptr())
        capacities.add(layer.own_keys.shape[2])
    # 300 tokens in pieces of 128 take three.
    assert capacities == {128, 256, 384}
    assert sum(a != b for a, b in pairwise(addresses)) == 2
    assert layer.length == rows.cache.get_seq_length() == 300


def test_growth_past_a_real_piece_changes_nothing(make_model: Any):
    check(Rows(make_model("gemma2"), [1, 2, 1]), random_tokens(3, 140), [100, 20, *[1] * 20])


# Rows of one prompt, of several, in another order; prompts that lose all their rows, the one that
# was longest and the padded ones among them.
KEPT = {
    "all": [0, 1, 2, 3, 4],
    "some of each": [0, 2, 4],
    "without the shortest prompt": [1, 2, 3, 4],
    "without the longest prompt": [0, 4],
    "one prompt": [1, 3],
    "one row": [4],
    "reordered": [4, 3, 0],
}


@pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT)
def test_rows_that_stay_are_not_disturbed_by_those_that_leave(any_model: Any, kept: list[int]):
    rows = Rows(any_model, [0, 1, 1, 1, 2])
    check(rows, random_tokens(5, 3), [1, 2])
    rows.keep(kept)
    check(rows, random_tokens(len(kept), 4), [1, 1, 2])


def test_rows_leave_again_and_again(any_model: Any):
    rows = Rows(any_model, [2, 0, 1, 1, 0, 2, 1])
    for kept in ([0, 2, 3, 4, 6], [4, 1, 0], [2, 0], [1]):
        check(rows, random_tokens(len(rows.sequences), 2), [1, 1])
        rows.keep(kept)
    check(rows, random_tokens(1, 6), [1] * 6)


def test_prompts_without_rows_are_dropped(tiny_llama: Any):
    cache = Rows(tiny_llama, [0, 1, 1, 2]).cache
    assert cache.of_layer[0].prompt_keys.shape[0] == 3
    cache.keep(torch.tensor([1, 2]))
    assert [len(layer.prompt_keys) for layer in cache.of_layer] == [1, 1]
    assert [len(layer.prompt_values) for layer in cache.of_layer] == [1, 1]
    assert cache.prompt_of_row.tolist() == [0, 0]


def test_prompts_are_not_changed_by_rows_that_go_on_or_leave(any_model: Any):
    prefilled = prefill(any_model, list(PROMPTS), PAD)
    before = [layer.keys.clone() for layer in prefilled.cache.layers]
    first, second = (Rows(any_model, [0, 1, 1, 2], prefilled) for _ in range(2))
    check(first, random_tokens(4, 3), [1, 2])
    first.keep([0])
    check(second, random_tokens(4, 3), [3])
    after = [layer.keys for layer in prefilled.cache.layers]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_rows_of_a_prompt_stand_side_by_side_with_zeros_where_it_has_fewer(tiny_llama: Any):
    cache = Rows(tiny_llama, [1, 2, 1, 0, 1]).cache
    x = torch.arange(1.0, 6).view(5, 1, 1, 1)
    by_prompt = cache.by_prompt(x)
    # Three places each: row 3 of the first prompt, rows 0, 2 and 4 of the second, row 1 of the third.
    assert by_prompt.view(3, 3).tolist() == [[4, 0, 0], [1, 3, 5], [2, 0, 0]]
    assert torch.equal(cache.by_row(by_prompt), x)


def test_rows_in_order_are_not_copied_to_places(tiny_llama: Any):
    assert Rows(tiny_llama, [0, 0, 1, 1, 2, 2]).cache.place is None
    assert Rows(tiny_llama, [0, 1, 0, 1, 2, 2]).cache.place is not None
    unequal = Rows(tiny_llama, [0, 1, 1, 2, 2]).cache
    assert unequal.place is not None
    unequal.keep(torch.tensor([1, 2, 3, 4]))
    assert unequal.place is None


@pytest.mark.parametrize("tokens", [1, 3])
def test_rows_of_one_prompt_attend_to_the_heads_that_are_their_own(make_model: Any, tokens: int):
    # The rows exchanged, the logits are exchanged, and nothing else happens.
    new = random_tokens(4, tokens)
    order = [3, 1, 0, 2]
    one = Rows(make_model("llama"), [1, 1, 1, 1]).go_on(new)
    other = Rows(make_model("llama"), [1, 1, 1, 1]).go_on(new[order])
    assert_close(other, one[order], rtol=0, atol=LOGIT_TOLERANCE)
    assert (one[0] - one[1]).abs().max() > 0.3


# Beginning.before (prefill.py): own tokens are padded on the left where rests are of unequal length.
@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "gpt2", "opt"])
@pytest.mark.parametrize("kept", [[0, 1, 2], [2, 0], [1]], ids=str)
def test_own_tokens_may_begin_with_padding(make_model: Any, name: str, kept: list[int]):
    model = make_model(name)
    beginning, rests = [1, 30, 31, 32], ([40], [50, 51, 52, 53], [60, 61])
    prefilled = prefill(model, [beginning], PAD)
    # What stands in the padding must not matter.
    tokens = torch.tensor([[77, 78, 79, 40], [50, 51, 52, 53], [77, 78, 60, 61]])
    padding = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 0, 0]]).bool()
    positions = torch.tensor([[4, 4, 4, 4], [4, 5, 6, 7], [4, 4, 4, 5]])
    rows = Rows(model, [0, 0, 0])
    rows.cache = SharedPrompt(prefilled.cache, prefilled.mask_BP, torch.zeros(3).long(), padding)
    rows.sequences = [beginning + rest for rest in rests]
    logits = go_on(model, rows.cache, input_ids=tokens, position_ids=positions)
    assert_close(logits[:, -1:], rows.expected(1), rtol=0, atol=LOGIT_TOLERANCE)
    rows.keep(kept)
    check(rows, random_tokens(len(kept), 5), [1, 1, 3])


def test_layers_windows_are_the_models(make_model: Any):
    assert layer_windows(make_model("llama")) == [None, None]
    assert layer_windows(make_model("mistral")) == [5, 5]
    assert layer_windows(make_model("gemma3")) == [5, None]


def test_the_models_own_attention_is_back_even_after_an_error(tiny_llama: Any):
    config = tiny_llama.config
    before = config._attn_implementation
    with attention_to_shared_prompts(tiny_llama):
        assert config._attn_implementation != before
    assert config._attn_implementation == before
    # Tokens of no vocabulary.
    cache, nowhere = Rows(tiny_llama, [0]).cache, torch.tensor([[10**6]])
    with pytest.raises(IndexError):
        go_on(tiny_llama, cache, input_ids=nowhere, position_ids=torch.tensor([[2]]))
    assert config._attn_implementation == before


def test_rows_go_on_the_same_again_bit_for_bit(any_model: Any):
    def once() -> Tensor:
        rows, tokens = Rows(any_model, [1, 2, 1, 0, 1]), random_tokens(5, 5)
        return torch.cat([rows.go_on(piece) for piece in tokens.split([1, 3, 1], 1)], 1)

    assert torch.equal(once(), once())
