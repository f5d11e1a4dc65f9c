"""Log-probabilities under a temperature, and drawing tokens by inverse CDF."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from language_self_play.logprobs import draw_tokens, shared_logprobs, token_logprobs, truncate

# Dyadic probabilities: their sums are exact, so that cuts can be tested at the boundary.
PROBABILITIES = torch.tensor([0.125, 0.5, 0.0, 0.25, 0.125])
LOGITS = PROBABILITIES.log()
LARGEST_UNIFORM = 1 - 2.0**-53


def draw(uniforms: Tensor, temperature: float = 1.0, **cuts: float) -> tuple[Tensor, Tensor]:
    return draw_tokens(LOGITS.expand(len(uniforms), -1), uniforms, temperature, **cuts)


def grid(count: int) -> Tensor:
    """Numbers that fill [0, 1) evenly."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def shares(tokens: Tensor) -> Tensor:
    return torch.bincount(tokens, minlength=len(PROBABILITIES)) / len(tokens)


def test_token_logprobs_divide_logits_by_the_temperature():
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    # τ = 1/2 doubles the logits: 2 - log(1 + e² + e⁴) = 2 - log 62.987206 = -2.142932.
    assert_close(token_logprobs(logits, torch.tensor([1]), 0.5), torch.tensor([-2.142932]))
    # τ = 2 halves them: 0.5 - log(1 + e^0.5 + e) = 0.5 - log 5.367003 = -1.180270.
    assert_close(token_logprobs(logits, torch.tensor([1]), 2.0), torch.tensor([-1.180270]))


def test_shared_logprobs_are_those_of_each_token_alone():
    logits = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]])
    tokens = torch.tensor([[2, 0], [0, 0]])
    expected = torch.stack([token_logprobs(logits, tokens[:, k], 0.7) for k in range(2)], 1)
    assert_close(shared_logprobs(logits, tokens, 0.7), expected)


def test_logprobs_are_float32_whatever_the_models_type():
    logits = torch.tensor([[0.0, 1.0, 2.0]], dtype=torch.bfloat16)
    logprobs = token_logprobs(logits, torch.tensor([2]), 1.0)
    assert logprobs.dtype == torch.float32
    # 2 - log(1 + e + e²) = 2 - log 11.107338 = -0.407606, which bfloat16 can't hold.
    assert_close(logprobs, torch.tensor([-0.407606]), rtol=1e-5, atol=0)


def test_uniform_numbers_pick_tokens_in_proportion_to_their_probabilities():
    tokens, _ = draw(grid(8_000))
    assert_close(shares(tokens), PROBABILITIES, rtol=0, atol=1e-3)


def test_the_draw_is_the_inverse_of_the_cumulative_distribution():
    # Cumulative: 0.125, 0.625, 0.625, 0.875, 1.
    uniforms = torch.tensor([0.0, 0.1, 0.13, 0.62, 0.63, 0.87, 0.88, 0.99], dtype=torch.float64)
    tokens, _ = draw(uniforms)
    assert tokens.tolist() == [0, 0, 1, 1, 3, 3, 4, 4]


def test_a_token_of_probability_zero_is_never_drawn():
    # At the edges of its empty interval, and where the first and the last token are the empty ones.
    tokens, _ = draw(torch.tensor([0.625, 0.625 - 1e-12], dtype=torch.float64))
    assert tokens.tolist() == [3, 1]
    logits = torch.tensor([[0.0, 0.5, 0.5, 0.0]]).log().expand(2, -1)
    edges = torch.tensor([0.0, LARGEST_UNIFORM], dtype=torch.float64)
    assert draw_tokens(logits, edges, 1.0)[0].tolist() == [1, 2]


def test_the_largest_uniform_number_draws_a_token_of_the_vocabulary():
    torch.manual_seed(0)
    for size in (2, 3, 1_000, 50_000):
        logits = torch.randn(4, size)
        logits[:, -1] = -torch.inf
        uniforms = torch.full((4,), LARGEST_UNIFORM, dtype=torch.float64)
        tokens, logprobs = draw_tokens(logits, uniforms, 1.0)
        assert (tokens < size - 1).all()
        assert torch.isfinite(logprobs).all()


def test_temperature_sharpens_what_is_drawn():
    tokens, _ = draw(grid(8_000), temperature=0.5)
    # Squares 1/64, 1/4, 0, 1/16, 1/64, of sum 22/64.
    expected = torch.tensor([1 / 22, 16 / 22, 0, 4 / 22, 1 / 22])
    assert_close(shares(tokens), expected, rtol=0, atol=1e-3)


def test_top_k_keeps_exactly_the_likeliest_tokens_and_their_ties():
    kept = {k: (truncate(PROBABILITIES[None], 1.0, k)[0] > 0).tolist() for k in (1, 2, 3, 99)}
    assert kept[1] == [False, True, False, False, False]
    assert kept[2] == [False, True, False, True, False]
    # The third and the fourth are equally likely.
    assert kept[3] == [True, True, False, True, True]
    assert kept[99] == [True, True, False, True, True]


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (0.25, [1]),
        (0.5, [1]),  # 0.5 reaches it
        (0.51, [1, 3]),
        (0.75, [1, 3]),  # 0.5 + 0.25 reach it
        (0.76, [0, 1, 3, 4]),  # 0 and 4 are equally likely
        (1.0, [0, 1, 3, 4]),
    ],
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p, kept):
    truncated = truncate(PROBABILITIES[None], top_p, 0)[0]
    assert truncated.nonzero().flatten().tolist() == kept
    assert_close(truncated[kept], PROBABILITIES[kept])


def test_top_p_is_a_share_of_what_top_k_left():
    # Top-k 2 leaves 0.5 and 0.25; the first is 2/3 of them.
    assert truncate(PROBABILITIES[None], 0.66, 2)[0].nonzero().flatten().tolist() == [1]
    assert truncate(PROBABILITIES[None], 0.67, 2)[0].nonzero().flatten().tolist() == [1, 3]


@pytest.mark.parametrize("cuts", [{"top_k": 2}, {"top_p": 0.75}])
def test_what_is_kept_is_drawn_in_proportion_to_its_probabilities(cuts):
    tokens, _ = draw(grid(9_000), **cuts)
    # 0.5 and 0.25 of 0.75.
    assert_close(shares(tokens), torch.tensor([0, 2 / 3, 0, 1 / 3, 0]), rtol=0, atol=1e-3)


@pytest.mark.parametrize("cuts", [{}, {"top_k": 2}, {"top_p": 0.75}])
def test_the_logprob_of_a_draw_is_that_before_the_cut(cuts):
    tokens, logprobs = draw(torch.tensor([0.3], dtype=torch.float64), **cuts)
    assert tokens.tolist() == [1]
    assert_close(logprobs, torch.tensor([-0.693147]))  # log 0.5
    tokens, logprobs = draw(torch.tensor([0.3], dtype=torch.float64), temperature=0.5, **cuts)
    assert tokens.tolist() == [1]
    assert_close(logprobs, torch.tensor([-0.318454]))  # log 16/22
