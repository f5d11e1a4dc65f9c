"""A prompt once with all its completions behind it: what each completion alone behind it gives."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from language_self_play import forward, packed_prompt
from language_self_play.forward import (
    PLAIN,
    ForwardPath,
    checkpointed_layers,
    completion_logprobs,
)
from language_self_play.packed_prompt import PackedPrompt, attends_one_by_one
from language_self_play.packing import MicroBatch, micro_batches
from language_self_play.types import Completion, Group, Groups

LOGPROB_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-5
TEMPERATURE = 0.7
SCALE = 0.4
CAP = 0.5

LEAN = ForwardPath()


@pytest.fixture(autouse=True)
def _always_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches that are too small to gain from it, too."""
    monkeypatch.setattr(forward, "LEAST_SAVING", 0.0)


@pytest.fixture(params=["one by one", "repeated"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways on this machine: other devices repeat a prompt's keys, unless scores are capped."""
    if request.param == "repeated":
        monkeypatch.setattr(
            packed_prompt, "attends_one_by_one", lambda query, softcap: softcap is not None
        )
    return request.param


def dense(layout: PackedPrompt, query: Tensor, key: Tensor, value: Tensor, cap: float | None):
    """The definition: which token sees which, written out for each pair."""
    P, K, T, [window] = layout.P, layout.K, layout.T, layout.windows
    place = torch.cat([torch.arange(P), P + torch.arange(T).repeat(K)])
    completion = torch.cat([torch.full((P,), -1), torch.arange(K).repeat_interleave(T)])
    same = (completion[:, None] == completion) | (completion == -1)
    distance = place[:, None] - place
    visible = same & (distance >= 0)
    if window is not None:
        visible &= distance < window
    visible = visible.expand(len(query), 1, -1, -1).clone()
    if layout.padding_BP is not None:
        visible[..., :P] &= ~layout.padding_BP[:, None, None]
    heads = query.shape[1] // key.shape[1]
    scores = SCALE * query @ key.repeat_interleave(heads, 1).mT
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    scores = scores.masked_fill(~visible, -1e9)
    return scores.softmax(-1) @ value.repeat_interleave(heads, 1)


def random_layer(
    layout: PackedPrompt, B: int = 2, heads: int = 4, H: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as a layer hands them over: views of (B, tokens, heads, D)."""
    generator = torch.Generator().manual_seed(0)
    length = layout.P + layout.K * layout.T
    query, key, value = (
        torch.randn(B, length, h, 8, generator=generator, dtype=torch.float64)
        .requires_grad_()
        .transpose(1, 2)
        for h in (heads, H, H)
    )
    return 2 * query, 2 * key, value


# Windows within a completion, at its beginning, in the prompt, over everything, and of one token.
@pytest.mark.parametrize("window", [None, 1, 2, 4, 5, 8, 30])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("P", "K", "T"), [(6, 3, 4), (6, 1, 4), (6, 3, 1), (1, 2, 3), (6, 3, 0)], ids=str
)
def test_a_token_sees_its_prompt_and_its_own_completion(
    way: str, P: int, K: int, T: int, padded: bool, window: int | None
):
    padding = torch.arange(P) < torch.tensor([[P // 2], [0]]) if padded else None
    layout = PackedPrompt(P, K, T, padding, [window])
    layer = random_layer(layout)
    found, expected = layout.attend(0, *layer, SCALE, None), dense(layout, *layer, None)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).double()
    if padding is not None:
        weights[:, :, :P] *= ~padding[:, None, :, None]
    assert_close(found * (weights != 0), expected * (weights != 0), rtol=0, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad((found * weights).sum(), layer),
        torch.autograd.grad((expected * weights).sum(), layer),
        strict=True,
    ):
        assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [None, 5])
def test_scores_are_capped_in_the_prompt_and_in_completions(way: str, window: int | None):
    layout = PackedPrompt(6, 3, 4, None, [window])
    layer = random_layer(layout)
    found = layout.attend(0, *layer, SCALE, CAP)
    assert_close(found, dense(layout, *layer, CAP), rtol=0, atol=1e-12)
    assert (found - dense(layout, *layer, None)).abs().max() > 0.1


def test_each_layer_has_its_own_window():
    layout = PackedPrompt(6, 2, 4, None, [2, None])
    layer = random_layer(layout)
    for index, window in enumerate(layout.windows):
        alone = PackedPrompt(6, 2, 4, None, [window])
        found = layout.attend(index, *layer, SCALE, None)
        assert_close(found, dense(alone, *layer, None), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("device", "softcap", "expected"),
    [("cpu", None, True), ("cpu", 50.0, True), ("meta", None, False), ("meta", 50.0, True)],
)
def test_keys_are_repeated_where_torchs_kernels_keep_scores_to_themselves(
    device: str, softcap: float | None, expected: bool
):
    assert attends_one_by_one(torch.empty(1, device=device), softcap) is expected


def random_batch(prompts: tuple[int, ...], completions: tuple[tuple[int, ...], ...]) -> MicroBatch:
    """One micro-batch of prompts and completions of these lengths."""
    generator = torch.Generator().manual_seed(0)

    def tokens(length: int) -> list[int]:
        return torch.randint(80, (length,), generator=generator).tolist()

    groups = [
        Group(tokens(p), [Completion(tokens(n), "", [0.0] * n, "stop") for n in lengths])
        for p, lengths in zip(prompts, completions, strict=True)
    ]
    advantages = torch.zeros(len(groups), len(completions[0]))
    [batch] = micro_batches(
        Groups("solver", groups, 1.0, advantages), 10_000, 0, torch.device("cpu")
    )
    return batch


def with_gradient(
    model: Any, batch: MicroBatch, path: ForwardPath, again: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probs, and the gradient of their squares, each weighed differently, as one vector."""
    with checkpointed_layers(model, True) if again else nullcontext():
        logprobs = completion_logprobs(model, batch, TEMPERATURE, path)
        weights = torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(1))
        parameters = [p for p in model.parameters() if p.requires_grad]
        found = torch.autograd.grad(
            (weights * logprobs.square()).sum(),
            parameters,
            materialize_grads=True,
            allow_unused=True,
        )
    return logprobs.detach(), torch.cat([g.flatten() for g in found])


def assert_same(model: Any, batch: MicroBatch, again: bool = False) -> None:
    """The packed pass gives the log-probs and gradients of whole sequences."""
    logprobs, gradient = with_gradient(model, batch, LEAN, again)
    expected, expected_gradient = with_gradient(model, batch, PLAIN)
    assert_close(logprobs, expected, rtol=0, atol=LOGPROB_TOLERANCE)
    assert expected[batch.mask_BKT].std() > 0.3  # otherwise any model would do
    difference = (gradient - expected_gradient).norm()
    assert difference <= GRADIENT_TOLERANCE * expected_gradient.norm()


# With windows of 5 tokens: inside, at and beyond a window, in prompts and in completions.
UNEQUAL = (2, 9, 6), ((1, 4, 11), (3, 3, 3), (7, 2, 1))


@pytest.mark.parametrize("again", [False, True], ids=["kept", "computed again"])
def test_a_packed_group_gives_what_whole_sequences_give(way: str, any_model: Any, again: bool):
    assert_same(any_model, random_batch(*UNEQUAL), again)


@pytest.mark.parametrize(
    ("prompts", "completions"),
    [
        ((4, 4), ((3, 3), (3, 3))),  # no padding at all
        ((2, 9), ((1, 1), (1, 1))),
        ((2, 9), ((2, 1), (1, 2))),
        ((1,), ((12,),)),
        ((30,), ((1, 20),)),
    ],
    ids=["equal lengths", "one token", "two tokens", "one of each", "long"],
)
@pytest.mark.parametrize("name", ["mistral", "gemma2", "opt"])
def test_lengths_at_the_edges_change_nothing(way, make_model, name, prompts, completions):
    assert_same(make_model(name), random_batch(prompts, completions))


def adapted(model: Any, targets: list[str]) -> Any:
    """`model` with LoRA layers in it, and nothing else to train."""
    import peft

    torch.manual_seed(1)
    settings = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    peft.get_peft_model(model, settings)
    assert any(p.requires_grad for p in model.parameters())
    return model


# Keys or values alone: then the first layer's queries need no gradient, and its keys do.
@pytest.mark.parametrize(
    "targets", [["k_proj"], ["v_proj"], ["q_proj"], ["q_proj", "v_proj"]], ids=str
)
@pytest.mark.parametrize("again", [False, True], ids=["kept", "computed again"])
def test_adapters_get_the_gradient_of_whole_sequences(way, tiny_llama, targets, again):
    assert_same(adapted(tiny_llama, targets), random_batch(*UNEQUAL), again)


@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_adapters_of_keys_get_their_gradient_through_windows_and_caps(way, make_model, name):
    assert_same(adapted(make_model(name), ["k_proj"]), random_batch(*UNEQUAL))


def test_the_packed_pass_in_bfloat16_is_that_in_float32_but_for_rounding(way: str, tiny_llama: Any):
    batch = random_batch(*UNEQUAL)
    expected, expected_gradient = with_gradient(tiny_llama, batch, PLAIN)
    plain, plain_gradient = with_gradient(tiny_llama.bfloat16(), batch, PLAIN)
    found, gradient = with_gradient(tiny_llama, batch, LEAN)

    def error(x: Tensor, exact: Tensor) -> float:
        return ((x.float() - exact).norm() / exact.norm()).item()

    # As far from float32 as whole sequences are in bfloat16.
    assert error(found, expected) < 1.5 * error(plain, expected) < 0.1
    assert error(gradient, expected_gradient) < 1.5 * error(plain_gradient, expected_gradient) < 0.3


def test_a_packed_pass_is_the_same_again_bit_for_bit(way: str, any_model: Any):
    batch = random_batch(*UNEQUAL)
    first, second = (with_gradient(any_model, batch, LEAN) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_prompt_goes_through_the_model_once_for_all_its_completions(tiny_llama: Any):
    shapes = []
    tiny_llama.model.layers[0].register_forward_hook(
        lambda module, args, output: shapes.append(tuple(args[0].shape))
    )
    batch = random_batch((9, 6), ((4, 2, 3), (5, 5, 1)))
    completion_logprobs(tiny_llama, batch, 1.0, LEAN)
    # Nothing is predicted from a completion's last token: 9 + 3 · (5 - 1) = 21 places.
    assert shapes == [(2, 21, 32)]
