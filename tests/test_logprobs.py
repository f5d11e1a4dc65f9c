"""Log-probabilities under a temperature, and drawing tokens by inverse CDF."""

from __future__ import annotations

import math

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


# Drawn in blocks of 512: below, at and above one block, of whole blocks and not.
VOCABULARIES = (1, 2, 511, 512, 513, 1024, 1025, 1600)


@pytest.mark.parametrize("size", VOCABULARIES)
def test_every_token_is_drawn_exactly_as_often_as_its_share_of_the_uniform_numbers(size: int):
    # Weights of 1 to 3 sixty-fourths: on a grid between the bounds every count is exact.
    weights = torch.arange(size) % 3 + 1
    total = int(weights.sum())
    logits = weights.double().log().float()
    tokens, logprobs = draw_tokens(logits.expand(2 * total, -1), grid(2 * total), 1.0)
    assert torch.equal(torch.bincount(tokens, minlength=size), 2 * weights)
    # In the order of the vocabulary, as the cumulative sum goes.
    assert (tokens.diff() >= 0).all()
    expected = (weights[tokens].double() / total).log().float()
    assert_close(logprobs, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize("size", VOCABULARIES)
def test_draws_follow_the_softmax(size: int, temperature: float):
    logits = 2 * torch.randn(size, generator=torch.Generator().manual_seed(0))
    count = 5_000
    tokens, _ = draw_tokens(logits.expand(count, -1), grid(count), temperature)
    expected = count * (logits.double() / temperature).softmax(-1)
    # A grid leaves each interval at most one number short or over.
    assert ((torch.bincount(tokens, minlength=size) - expected).abs() <= 1.01).all()


@pytest.mark.parametrize("size", VOCABULARIES)
def test_the_smallest_and_the_largest_uniform_number_draw_the_first_and_the_last_token(size: int):
    edges = torch.tensor([0.0, LARGEST_UNIFORM], dtype=torch.float64)
    tokens, logprobs = draw_tokens(torch.zeros(2, size), edges, 1.0)
    assert tokens.tolist() == [0, size - 1]
    assert_close(logprobs, torch.full((2,), -math.log(size)))


@pytest.mark.parametrize("size", VOCABULARIES[2:])
@pytest.mark.parametrize("possible", [[0], [-1], [5, 300], [510], [7, -3]], ids=str)
def test_whole_blocks_of_probability_zero_are_stepped_over(size: int, possible: list[int]):
    logits = torch.full((size,), -torch.inf)
    logits[possible] = 0.0
    edges = torch.tensor([0.0, 0.5, LARGEST_UNIFORM], dtype=torch.float64)
    uniforms = torch.cat([grid(10), edges])
    tokens, logprobs = draw_tokens(logits.expand(len(uniforms), -1), uniforms, 1.0)
    expected = sorted(place % size for place in possible)
    assert tokens.unique().tolist() == expected
    assert_close(logprobs, torch.full_like(logprobs, -math.log(len(expected))))


@pytest.mark.parametrize("size", VOCABULARIES[2:])
def test_a_token_of_a_vanishing_share_can_be_drawn(size: int):
    # The last token, of probability e^-25 = 1.4e-11, is beyond what float32 numbers in [0, 1) reach.
    logits = torch.zeros(size)
    logits[-1] = -25.0 + math.log(size - 1)
    share = 1 / (1 + math.exp(25.0))
    uniforms = torch.tensor([1 - 1.5 * share, 1 - 0.5 * share], dtype=torch.float64)
    tokens, logprobs = draw_tokens(logits.expand(2, -1), uniforms, 1.0)
    # The sums of blocks are float32, so the bound stands within 1e-7 of its place.
    assert tokens[1] == size - 1
    assert_close(logprobs[1], torch.tensor(-25.0), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("size", VOCABULARIES)
def test_the_logprob_of_a_draw_is_that_of_the_log_softmax(size: int, dtype: torch.dtype):
    logits = 3 * torch.randn(64, size, generator=torch.Generator().manual_seed(0)).to(dtype)
    tokens, logprobs = draw_tokens(logits, grid(64), 0.7)
    expected = (logits.double() / 0.7).log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)
    assert logprobs.dtype == torch.float32
    assert_close(logprobs.double(), expected, rtol=1e-6, atol=1e-6)
    # Those that the trainer computes round the logits.
    assert_close(logprobs, token_logprobs(logits, tokens, 0.7), rtol=0, atol=1e-5)


@pytest.mark.parametrize("damaged", [torch.nan, torch.inf])
@pytest.mark.parametrize("size", [5, 513, 1600])
def test_damaged_logits_give_a_token_of_the_vocabulary_and_no_finite_logprob(
    size: int, damaged: float
):
    for place in (0, size // 2, size - 1):
        logits = torch.zeros(3, size)
        logits[1, place] = damaged
        tokens, logprobs = draw_tokens(logits, grid(3), 1.0)
        assert ((tokens >= 0) & (tokens < size)).all()
        assert torch.isfinite(logprobs).tolist() == [True, False, True]


@pytest.mark.parametrize("size", VOCABULARIES[2:])
def test_cuts_keep_to_the_likeliest_tokens_of_all_blocks(size: int):
    # 8, 4, 2 and 2 sixteenths of what is likely, wherever they stand; all others share e^-10.
    places = torch.tensor([size - 1, 3, 400, 200])
    logits = torch.full((size,), -30.0)
    logits[places] = torch.tensor([8.0, 4.0, 2.0, 2.0]).log()
    many = logits.expand(1_600, -1)

    def counts(**cuts: float) -> list[int]:
        tokens, _ = draw_tokens(many, grid(1_600), 1.0, **cuts)
        assert torch.isin(tokens, places).all()
        return torch.bincount(tokens, minlength=size)[places].tolist()

    assert counts(top_k=1) == [1600, 0, 0, 0]
    # 2/3 and 1/3 of 1,600.
    assert counts(top_k=2) in ([1067, 533, 0, 0], [1066, 534, 0, 0])
    assert counts(top_p=0.7) in ([1067, 533, 0, 0], [1066, 534, 0, 0])
    assert counts(top_p=0.9) == [800, 400, 200, 200]
    assert counts(top_p=0.5) == [1600, 0, 0, 0]


def test_a_row_is_drawn_as_it_is_alone():
    logits = torch.randn(9, 1025, generator=torch.Generator().manual_seed(0))
    together = draw_tokens(logits, grid(9), 0.8)
    for row in range(9):
        alone = draw_tokens(logits[row : row + 1], grid(9)[row : row + 1], 0.8)
        assert (alone[0].item(), alone[1].item()) == (together[0][row], together[1][row])
