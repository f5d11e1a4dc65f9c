"""Prompts to where their completions begin; what they have in common goes through the model once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from language_self_play import prefill as module
from language_self_play.decoding import SharedDecoding
from language_self_play.lean_decoder import lean_decoder
from language_self_play.prefill import (
    SHORTEST_BEGINNING,
    Beginning,
    beginning_length,
    next_logits,
    prefill,
)

LOGIT_TOLERANCE = 1e-5
PAD = 0
CONTEXT = 512
COMMON = torch.randint(3, 80, (70,), generator=torch.Generator().manual_seed(0)).tolist()
# Rests of unequal length; one begins as another does.
PROMPTS = [COMMON + rest for rest in ([5], [6, 7, 8, 9, 10], [11, 12], [6, 7])]
WITHOUT_WINDOWS = ("llama", "qwen2", "qwen3", "phi3", "olmo2", "gpt2", "opt")


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture
def short_beginnings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any beginning is worth a pass of its own."""
    monkeypatch.setattr(module, "SHORTEST_BEGINNING", 1)


def plain_logits(model: Any, prompt: list[int]) -> Tensor:
    ids = torch.tensor([prompt])
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, -1]


def count_tokens(model: Any) -> list[int]:
    """A list that grows by the tokens, padding included, of every pass of the model."""
    counts: list[int] = []
    model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: counts.append(args[0].numel())
    )
    return counts


def test_prefilled_prompts_have_the_logits_of_each_alone(any_model: Any):
    prompts = [[1, 20], [1, 30, 31, 32, 33, 34, 35, 36, 2], [1], [1, 20]]
    found = prefill(any_model, prompts, PAD)
    expected = torch.stack([plain_logits(any_model, p) for p in prompts])
    assert expected.std() > 0.3
    assert_close(found.logits_BV, expected, rtol=0, atol=LOGIT_TOLERANCE)
    read_once = next_logits(any_model, prompts, PAD)
    assert_close(read_once, expected, rtol=0, atol=LOGIT_TOLERANCE)
    assert found.mask_BP.sum(-1).tolist() == [2, 9, 1, 2]
    assert found.mask_BP[0].tolist() == [0, 0, 0, 0, 0, 0, 0, 1, 1]
    sevens = prefill(any_model, prompts, pad_id=7)
    assert_close(sevens.logits_BV, found.logits_BV, rtol=0, atol=LOGIT_TOLERANCE)


@pytest.mark.parametrize("name", WITHOUT_WINDOWS)
def test_behind_a_beginning_prompts_have_the_logits_of_each_alone(
    name: str, make_model: Callable[..., Any]
):
    model = make_model(name)
    beginning = Beginning(model, PROMPTS, PAD)
    assert beginning.length == 70
    expected = torch.stack([plain_logits(model, p) for p in PROMPTS])
    behind = beginning.before(PROMPTS)
    assert_close(behind.logits_RV, expected, rtol=0, atol=LOGIT_TOLERANCE)
    assert behind.lengths_R.tolist() == [71, 75, 72, 72]
    # Some of them, in another order, and again: the beginning is as it was.
    for some in ([2], [3, 0], [0, 1, 2, 3]):
        behind = beginning.before([PROMPTS[i] for i in some])
        assert_close(behind.logits_RV, expected[some], rtol=0, atol=LOGIT_TOLERANCE)
        read_once = beginning.next_logits([PROMPTS[i] for i in some])
        assert_close(read_once, expected[some], rtol=0, atol=LOGIT_TOLERANCE)


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "mistral"])
def test_prompts_within_a_window_share_their_beginning(
    name: str, make_model: Callable[..., Any], short_beginnings: None
):
    # A window of 5 sees all of 4 tokens.
    model, prompts = make_model(name), [[1, 20, 21], [1, 20, 22, 23]]
    beginning = Beginning(model, prompts, PAD)
    assert beginning.length == 2
    expected = torch.stack([plain_logits(model, p) for p in prompts])
    found = beginning.before(prompts).logits_RV
    assert_close(found, expected, rtol=0, atol=LOGIT_TOLERANCE)


def going_on(
    model: Any, behind: Any, prompts: list[list[int]], count: int
) -> tuple[Tensor, Tensor]:
    """The logits after `count` more tokens, and those of whole sequences; one row leaves on the way."""
    decoding = SharedDecoding(model, CONTEXT, *behind, lean_decoder(model))
    sequences = [list(p) for p in prompts]
    generator = torch.Generator().manual_seed(1)
    for t in range(count):
        if t == count // 2:
            decoding.keep(torch.arange(1, len(sequences)))
            sequences = sequences[1:]
        tokens = torch.randint(3, 80, (len(sequences),), generator=generator)
        for sequence, token in zip(sequences, tokens.tolist(), strict=True):
            sequence.append(token)
        decoding.step(tokens)
    return decoding.logits_RV, torch.stack([plain_logits(model, s) for s in sequences])


@pytest.mark.parametrize("name", WITHOUT_WINDOWS)
def test_rows_behind_a_beginning_go_on_as_whole_sequences(
    name: str, make_model: Callable[..., Any]
):
    model = make_model(name)
    behind = Beginning(model, PROMPTS, PAD).before(PROMPTS)
    found, expected = going_on(model, behind, PROMPTS, 6)
    assert_close(found, expected, rtol=0, atol=LOGIT_TOLERANCE)


@pytest.mark.parametrize("window", [14, 15, 16, 17, 30])
def test_completions_that_outgrow_a_window_are_those_of_whole_sequences(
    make_model: Callable[..., Any], short_beginnings: None, window: int
):
    # 8 and 11 tokens, and 5 more: the shorter prompt's padding must not count in its window.
    model = make_model("mistral")
    model.config.sliding_window = window
    prompts = [[1, *range(20, 26), 30], [1, *range(20, 26), 31, 32, 33, 34]] * 2
    beginning = Beginning(model, prompts, PAD, new_tokens=5)
    assert beginning.length == (7 if window > 16 else 0)
    if beginning.length:
        found, expected = going_on(model, beginning.before(prompts), prompts, 5)
        assert_close(found, expected, rtol=0, atol=LOGIT_TOLERANCE)


def test_a_common_beginning_goes_through_the_model_once(tiny_llama: Any):
    counts = count_tokens(tiny_llama)
    beginning = Beginning(tiny_llama, PROMPTS, PAD)
    beginning.before(PROMPTS[:2])
    beginning.before(PROMPTS[2:])
    # 70 in common; then rests of 1 and 5, padded to 2 · 5, and of 2 and 2.
    assert counts == [70, 10, 4]


@pytest.mark.parametrize(
    ("prompts", "length"),
    [
        ([[1, 2, 3], [1, 2, 4]], 2),
        ([[1, 2, 3], [1, 2, 3]], 2),  # equal: one token is left to each
        ([[1, 2], [1, 2, 3, 4]], 1),  # one begins the other
        ([[1, 2, 3, 4], [1, 2], [1, 2, 3]], 1),
        ([[1, 2, 3, 9], [1, 5, 3, 9], [1, 2, 3, 8]], 1),  # the one in the middle differs first
        ([[1, 2, 3], [2, 2, 3]], 0),
        ([[1], [1, 2]], 0),
        ([[1, 2, 3]], 0),  # nobody to share with
        ([], 0),
    ],
)
def test_the_beginning_is_what_all_prompts_have_in_common(
    tiny_llama: Any, short_beginnings: None, prompts: list[list[int]], length: int
):
    assert beginning_length(tiny_llama, prompts) == length


def test_equal_prompts_and_beginnings_of_others_get_their_own_logits(
    tiny_llama: Any, short_beginnings: None
):
    for prompts in ([[1, 20, 21]] * 3, [[1, 20], [1, 20, 21, 22]]):
        beginning = Beginning(tiny_llama, prompts, PAD)
        expected = torch.stack([plain_logits(tiny_llama, p) for p in prompts])
        found = beginning.before(prompts).logits_RV
        assert_close(found, expected, rtol=0, atol=LOGIT_TOLERANCE)


def test_a_beginning_must_be_worth_a_pass_of_its_own(tiny_llama: Any):
    assert SHORTEST_BEGINNING == 64
    for length, expected in ((63, 0), (64, 64)):
        prompts = [COMMON[:length] + rest for rest in ([5], [6])]
        assert beginning_length(tiny_llama, prompts) == expected
    counts = count_tokens(tiny_llama)
    assert Beginning(tiny_llama, [[1, 5], [1, 6]], PAD).length == 0
    assert counts == []


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3"])
def test_prompts_longer_than_a_window_have_no_shared_beginning(
    name: str, make_model: Callable[..., Any], short_beginnings: None
):
    # Windows are 5 tokens, in gemma2 and gemma3 of every other layer.
    model = make_model(name)
    assert beginning_length(model, [[1, 2, 3], [1, 2, 4, 5]]) == 2
    assert beginning_length(model, [[1, 2, 3], [1, 2, 4, 5, 6]]) == 0
    assert beginning_length(model, [[1, 2, 3], [1, 2, 4]], new_tokens=1) == 2
    assert beginning_length(model, [[1, 2, 3], [1, 2, 4]], new_tokens=2) == 0
