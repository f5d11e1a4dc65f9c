"""Attention to a prompt's keys and a row's own, merged: what one softmax over all of them gives."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from language_self_play.attention import (
    Keys,
    Mapping,
    attend,
    merged_attention,
    own_keys,
    prompt_keys,
)

SCALE = 0.3
CAP = 0.5  # most scores of the random numbers below are beyond it
# Of the outputs, which are of size 1.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}
# Of gradients, over their norm. In bfloat16 a number has 8 bits.
GRADIENT_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


class Case(NamedTuple):
    """B prompts of P tokens, K rows behind each; Q queries at the end of a row's L tokens."""

    B: int = 2
    K: int = 3
    P: int = 7
    L: int = 4
    Q: int = 4
    H: int = 2
    q: int = 2
    window: int | None = None
    softcap: float | None = None
    prompt_padding: bool = False
    own_padding: bool = False


CASES = {
    "causal": Case(),
    "one token": Case(L=1, Q=1),
    "one query of many tokens": Case(L=6, Q=1),
    "some queries of many tokens": Case(L=6, Q=3),
    "one row": Case(B=1, K=1),
    "a head of keys for each of queries": Case(H=4, q=1),
    "one head of keys for all": Case(H=1, q=4),
    "prompts of unequal lengths": Case(prompt_padding=True),
    "rows of unequal lengths": Case(L=6, Q=6, own_padding=True),
    "rows of unequal lengths, goes on": Case(L=6, Q=2, own_padding=True),
    "window over the whole prompt": Case(window=30),
    "window into the prompt": Case(window=6),
    "window that leaves the prompt": Case(window=3),
    "window that has left the prompt": Case(L=6, Q=2, window=4),
    "window that just reaches the prompt": Case(L=4, Q=1, window=5),
    "window that just doesn't": Case(L=4, Q=1, window=4),
    "window, goes on, padding": Case(L=5, Q=2, window=8, prompt_padding=True),
    "window that ends in the padding of prompts": Case(window=9, prompt_padding=True),
    "window of one": Case(window=1),
    "cap": Case(softcap=CAP),
    "cap, window, padding": Case(softcap=CAP, window=6, prompt_padding=True, L=5, Q=3),
}


class Inputs(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    prompt_key: Tensor
    prompt_value: Tensor

    def requiring_gradients(self) -> Inputs:
        return Inputs(*(x.detach().clone().requires_grad_() for x in self))


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def random_inputs(case: Case, dtype: torch.dtype, D: int = 8) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    rows, prompts = (case.B * case.K, case.H), (case.B, case.H)
    shapes = [(*rows, case.q, case.Q, D), *[(*rows, case.L, D)] * 2, *[(*prompts, case.P, D)] * 2]
    # Queries and keys are larger, so that a few keys have most of the weight.
    sizes = (2, 2, 1, 2, 1)
    return Inputs(
        *(
            (size * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
            for size, shape in zip(sizes, shapes, strict=True)
        )
    )


def paddings(case: Case) -> tuple[Tensor | None, Tensor | None]:
    """True at padding: the b-th prompt begins with b + 1, every other row with two."""
    prompt = own = None
    if case.prompt_padding:
        prompt = torch.arange(case.P) < torch.arange(1, case.B + 1)[:, None]
    if case.own_padding:
        first = 2 * (torch.arange(case.B * case.K) % 2)
        # Shorter than L: tokens that came later are none.
        own = torch.arange(case.L - 1) < first[:, None]
    return prompt, own


def mapping(K: int) -> Mapping:
    """Of K rows of each prompt, the rows of a prompt next to each other."""
    return Mapping(
        lambda x: x.unflatten(0, (-1, K)).transpose(1, 2).flatten(2, 3),
        lambda x: x.unflatten(2, (K, -1)).transpose(1, 2).flatten(0, 1),
    )


def merged(case: Case, inputs: Inputs) -> Tensor:
    query, key, value, prompt_key, prompt_value = inputs
    prompt_padding, own_padding = paddings(case)
    own = own_keys(key, value, case.Q, case.q, case.window, own_padding)
    shared = prompt_keys(
        prompt_key,
        prompt_value,
        case.Q,
        case.K * case.q,
        case.L - case.Q,
        case.window,
        prompt_padding,
    )
    return merged_attention(query, own, shared, mapping(case.K), SCALE, case.softcap)


def dense(case: Case, inputs: Inputs) -> Tensor:
    """The definition, one query after the other, a softmax over the keys that it sees."""
    query, key, value, prompt_key, prompt_value = inputs
    prompt_padding, own_padding = paddings(case)
    out = torch.empty_like(query)
    for r, h, i, t in torch.cartesian_prod(*map(torch.arange, query.shape[:4])).tolist():
        b, place = r // case.K, case.P + case.L - case.Q + t
        keys = torch.cat([prompt_key[b, h], key[r, h]])
        values = torch.cat([prompt_value[b, h], value[r, h]])
        visible = torch.arange(case.P + case.L) <= place
        if case.window is not None:
            visible &= torch.arange(case.P + case.L) > place - case.window
        if prompt_padding is not None:
            visible[: case.P] &= ~prompt_padding[b]
        if own_padding is not None:
            visible[case.P : -1] &= ~own_padding[r]
        scores = keys[visible] @ query[r, h, i, t] * SCALE
        if case.softcap is not None:
            scores = case.softcap * torch.tanh(scores / case.softcap)
        out[r, h, i, t] = scores.softmax(0) @ values[visible]
    return out


def real_queries(case: Case) -> Tensor:
    """True at queries that are no padding, broadcasts over (R, H, q, Q, D)."""
    own = paddings(case)[1]
    if own is None:
        return torch.ones(1, 1, 1, case.Q, 1, dtype=torch.bool)
    longer = torch.nn.functional.pad(own, (0, 1))[:, -case.Q :]
    return ~longer[:, None, None, :, None]


def loss(case: Case, out: Tensor) -> Tensor:
    """Weighs every output of a real query differently."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    return (out * weights * real_queries(case)).sum()


def test_literal_scores_are_weighed_as_one_softmax():
    # Scores log 1 and log 3 of the row's own keys, log 2 of the prompt's: weights 1/6, 3/6, 2/6.
    query = torch.tensor([1.0, 0.0]).view(1, 1, 1, 1, 2)
    key = torch.tensor([[0.0, 0.0], [1.0986123, 5.0]]).view(1, 1, 2, 2)
    value = torch.tensor([[6.0, 0.0], [12.0, 6.0]]).view(1, 1, 2, 2)
    prompt_key = torch.tensor([[0.6931472, -5.0]]).view(1, 1, 1, 2)
    prompt_value = torch.tensor([[30.0, -3.0]]).view(1, 1, 1, 2)
    own, shared = Keys(key, value), Keys(prompt_key, prompt_value)
    out = merged_attention(query, own, shared, mapping(1), 1.0, None)
    # 6/6 + 36/6 + 60/6 = 17 and 0 + 18/6 - 6/6 = 2.
    assert_close(out.flatten(), torch.tensor([17.0, 2.0]))
    # Without the prompt 1/4 and 3/4: 6/4 + 36/4 = 10.5 and 18/4 = 4.5.
    alone = merged_attention(query, own, None, None, 1.0, None)
    assert_close(alone.flatten(), torch.tensor([10.5, 4.5]))


def test_a_literal_cap_bends_scores():
    # Scores 0 and 4 · tanh(8 / 4) = 3.856110: the weight of the second is 1 / (1 + e^-3.856110).
    query = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
    key = torch.tensor([[0.0, 0.0], [8.0, 0.0]]).view(1, 1, 2, 2)
    value = torch.tensor([[0.0, 0.0], [1.0, 0.0]]).view(1, 1, 2, 2)
    out, lse = attend(query, Keys(key, value), 1.0, 4.0)
    assert_close(out.flatten(), torch.tensor([0.979291, 0.0]))
    assert_close(lse.flatten(), torch.tensor([3.877036]))  # 3.856110 - log 0.979291


@pytest.mark.parametrize("softcap", [None, 1e9])  # torch's kernel, and scores written out
def test_the_log_sum_exp_is_that_of_the_scaled_scores(softcap: float | None):
    # Scores 0.5 · (0, 2, 4): log(1 + e + e²) = 2.407606.
    query = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
    key = torch.tensor([[0.0, 1.0], [2.0, 1.0], [4.0, 1.0]]).view(1, 1, 3, 2)
    _, lse = attend(query, Keys(key, torch.zeros_like(key)), 0.5, softcap)
    assert_close(lse.flatten(), torch.tensor([2.407606]))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_merge_is_one_softmax_over_all_visible_keys(case: Case, dtype: torch.dtype):
    inputs = random_inputs(case, dtype)
    found = merged(case, inputs)
    assert found.dtype == dtype
    # The inputs as they were rounded, computed in float64.
    expected = dense(case, Inputs(*(x.double() for x in inputs)))
    difference = (found.double() - expected) * real_queries(case)
    assert difference.abs().max() <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", GRADIENT_TOLERANCE, ids=str)
def test_the_gradients_are_those_of_one_softmax(case: Case, dtype: torch.dtype):
    inputs = random_inputs(case, dtype).requiring_gradients()
    found = torch.autograd.grad(loss(case, merged(case, inputs)), inputs, materialize_grads=True)
    wide = Inputs(*(x.double() for x in inputs)).requiring_gradients()
    expected = torch.autograd.grad(loss(case, dense(case, wide)), wide, materialize_grads=True)
    for a, b in zip(found, expected, strict=True):
        # With a window of one token no score matters: the queries' gradient is 0.
        assert (a - b).norm() <= GRADIENT_TOLERANCE[dtype] * b.norm().clamp_min(1.0)


@pytest.mark.parametrize("name", ["causal", "window, goes on, padding", "cap"])
def test_the_gradients_are_the_slopes(name: str):
    case = CASES[name]._replace(B=2, K=2, P=4, L=3, Q=2 if "goes on" in name else 3, H=1)
    inputs = random_inputs(case, torch.float64, D=2).requiring_gradients()
    assert torch.autograd.gradcheck(lambda *x: merged(case, Inputs(*x)), tuple(inputs))


# An adapter may train any of them alone: gradients reach it through the weights of both sets.
@pytest.mark.parametrize("trained", range(5), ids=Inputs._fields)
@pytest.mark.parametrize("name", ["causal", "window into the prompt", "cap"])
def test_what_is_trained_alone_gets_the_gradient_it_gets_with_all_others(name: str, trained: int):
    case = CASES[name]
    together = random_inputs(case, torch.float64).requiring_gradients()
    expected = torch.autograd.grad(loss(case, merged(case, together)), together)[trained]
    alone = [x.detach() for x in together]
    alone[trained].requires_grad_()
    [found] = torch.autograd.grad(loss(case, merged(case, Inputs(*alone))), [alone[trained]])
    assert_close(found, expected)


# Torch's kernel, and scores written out (a cap that bends nothing).
WAYS = {"kernel": None, "written out": 1e9}


@pytest.mark.parametrize("softcap", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_set_whose_keys_are_all_hidden_has_no_part(dtype: torch.dtype, softcap: float | None):
    case = Case(Q=1)
    query, key, value, prompt_key, prompt_value = random_inputs(case, dtype)
    visible = Keys(key, value), Keys(prompt_key, prompt_value)
    own_hidden = torch.ones(case.B * case.K, 1, 1, case.L, dtype=torch.bool)
    prompt_hidden = torch.ones(case.B, 1, 1, case.P, dtype=torch.bool)

    own_alone = merged_attention(query, visible[0], None, None, SCALE, softcap)
    shared = visible[1]._replace(hidden=prompt_hidden)
    found = merged_attention(query, visible[0], shared, mapping(case.K), SCALE, softcap)
    assert_close(found, own_alone, rtol=0, atol=TOLERANCE[dtype])

    # A prompt alone: what its own keys would give, all rows of it at once.
    at_once = mapping(case.K).by_prompt(query.flatten(2, 3))
    expected = mapping(case.K).by_row(attend(at_once, visible[1], SCALE, softcap)[0])
    own = visible[0]._replace(hidden=own_hidden)
    found = merged_attention(query, own, visible[1], mapping(case.K), SCALE, softcap)
    assert_close(found, expected.view(query.shape), rtol=0, atol=TOLERANCE[dtype])
    assert (found - own_alone).abs().max() > 0.3


@pytest.mark.parametrize("softcap", WAYS.values(), ids=WAYS)
def test_a_prompt_whose_keys_are_all_hidden_gets_no_gradient(softcap: float | None):
    case = Case(Q=1)
    query, key, value, prompt_key, prompt_value = inputs = random_inputs(
        case, torch.float32
    ).requiring_gradients()
    # The first prompt is hidden, the second is not.
    hidden = torch.tensor([True, False]).view(2, 1, 1, 1).expand(2, 1, 1, case.P)
    own, shared = Keys(key, value), Keys(prompt_key, prompt_value, hidden)
    out = merged_attention(query, own, shared, mapping(case.K), SCALE, softcap)
    found = torch.autograd.grad(loss(case, out), inputs)
    assert all(torch.isfinite(g).all() for g in found)
    for of_prompt in found[3:]:
        assert of_prompt[0].abs().max() == 0
        assert of_prompt[1].abs().max() > 0.1
    # The rows behind it are as they would be without a prompt.
    alone = merged_attention(query, own, None, None, SCALE, softcap)
    expected = torch.autograd.grad(loss(case, alone), inputs[:3])
    for a, b in zip(found[:3], expected, strict=True):
        assert_close(a[: case.K], b[: case.K])


def strided(x: Tensor) -> Tensor:
    """`x` with the memory of its last two axes exchanged."""
    return x.mT.contiguous().mT


# Attention layers hand over whatever views their architecture has made.
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", ["causal", "one query of many tokens", "window into the prompt"])
def test_the_layout_in_memory_changes_nothing(name: str, gradients: bool):
    case = CASES[name]
    inputs = random_inputs(case, torch.float32)
    views = Inputs(*map(strided, inputs))
    assert all(x.stride(-1) > 1 or x.shape[-2] == 1 for x in views)
    if not gradients:
        assert_close(merged(case, views), merged(case, inputs))
        return
    views = Inputs(*(x.requires_grad_() for x in views))
    inputs = inputs.requiring_gradients()
    found = torch.autograd.grad(loss(case, merged(case, views)), views)
    expected = torch.autograd.grad(loss(case, merged(case, inputs)), inputs)
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b)


def test_the_merge_is_the_same_again_bit_for_bit(case: Case):
    def once() -> list[Tensor]:
        inputs = random_inputs(case, torch.float32).requiring_gradients()
        out = merged(case, inputs)
        return [out, *torch.autograd.grad(loss(case, out), inputs, materialize_grads=True)]

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))


def test_keys_that_no_query_sees_are_left_out():
    key = torch.arange(6.0).view(1, 1, 6, 1)
    # Queries at 4 and 5 with a window of 3 see 2 to 4, and 3 to 5.
    own = own_keys(key, key, Q=2, q=1, window=3, padding_RL=None)
    assert own.key.flatten().tolist() == [2, 3, 4, 5]
    assert own.hidden is not None
    assert own.hidden.int().tolist() == [[0, 0, 0, 1], [1, 0, 0, 0]]
    # One token between the prompt and the first of two queries: it sees the last 2 of the prompt.
    shared = prompt_keys(key, key, Q=2, q=1, first=1, window=4, padding_BP=None)
    assert shared is not None
    assert shared.hidden is not None
    assert shared.key.flatten().tolist() == [4, 5]
    assert shared.hidden.int().tolist() == [[0, 0], [1, 0]]


def test_no_mask_is_made_where_nothing_is_hidden():
    key = torch.zeros(1, 1, 6, 1)
    own = own_keys(key, key, Q=1, q=1, window=3, padding_RL=None)
    assert (own.hidden, own.causal, own.key.shape[2]) == (None, False, 3)
    own = own_keys(key, key, Q=6, q=1, window=6, padding_RL=None)
    assert (own.hidden, own.causal, own.key.shape[2]) == (None, True, 6)
    shared = prompt_keys(key, key, Q=2, q=1, first=1, window=None, padding_BP=None)
    assert shared is not None
    assert (shared.hidden, shared.causal, shared.key.shape[2]) == (None, False, 6)
    # The last of 2 queries stands 1 + 1 + 6 behind the first key: a window of 9 holds all of them.
    shared = prompt_keys(key, key, Q=2, q=1, first=1, window=9, padding_BP=None)
    assert shared is not None
    assert shared.hidden is None


def test_a_prompt_beyond_the_window_is_not_attended_to():
    key = torch.zeros(1, 1, 6, 1)
    # The query itself and 2 tokens before it fill a window of 3.
    assert prompt_keys(key, key, Q=1, q=1, first=2, window=3, padding_BP=None) is None
    assert prompt_keys(key, key, Q=1, q=1, first=1, window=3, padding_BP=None) is not None
