"""Both ways of decoding give the logits of whole sequences, so the same tokens are drawn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from language_self_play import linear
from language_self_play.decoding import Decoding, PlainDecoding, SharedDecoding
from language_self_play.lean_decoder import NARROWEST_BFLOAT16, LeanDecoder, lean_decoder
from language_self_play.logprobs import draw_tokens
from language_self_play.prefill import prefill

LOGIT_TOLERANCE = 1e-5
CONTEXT = 512
PROMPTS = [[1, 20], [1, 30, 31, 32, 33, 34, 35, 36, 2], [1, 40, 41, 2]]
PROMPT_OF_ROW = [0, 0, 1, 2, 2]
LEAN = ("llama", "mistral", "qwen2", "qwen3")


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.inference_mode():
        yield


def plainly(model: Any, context: int = CONTEXT) -> Decoding:
    prompts = prefill(model, PROMPTS, 0)
    return PlainDecoding(model, context, prompts, torch.tensor(PROMPT_OF_ROW))


def shared(model: Any, context: int = CONTEXT) -> Decoding:
    prompts, rows = prefill(model, PROMPTS, 0), torch.tensor(PROMPT_OF_ROW)
    return SharedDecoding.behind(model, context, prompts, rows, lean_decoder(model))


def through_modules(model: Any, context: int = CONTEXT) -> Decoding:
    prompts = prefill(model, PROMPTS, 0)
    return SharedDecoding.behind(model, context, prompts, torch.tensor(PROMPT_OF_ROW))


WAYS = {"plain": plainly, "shared": shared, "through modules": through_modules}


@pytest.fixture(params=WAYS.values(), ids=WAYS)
def start(request: pytest.FixtureRequest) -> Callable[..., Decoding]:
    return request.param


def whole_logits(model: Any, sequence: list[int]) -> Tensor:
    ids = torch.tensor([sequence])
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, -1]


# Rows leave twice; the second time one of two prompts has none left.
LEAVE = {4: [0, 2, 3], 7: [2, 0]}


def test_every_step_gives_the_logits_of_whole_sequences(
    any_model: Any, start: Callable[..., Decoding]
):
    decoding = start(any_model)
    sequences = [list(PROMPTS[b]) for b in PROMPT_OF_ROW]
    generator = torch.Generator().manual_seed(0)
    for t in range(12):
        expected = torch.stack([whole_logits(any_model, s) for s in sequences])
        assert_close(decoding.logits_RV, expected, rtol=0, atol=LOGIT_TOLERANCE)
        assert decoding.positions_R.tolist() == [len(s) for s in sequences]
        if t in LEAVE:
            decoding.keep(torch.tensor(LEAVE[t]))
            sequences = [sequences[r] for r in LEAVE[t]]
        tokens = torch.randint(3, 80, (len(sequences),), generator=generator)
        for sequence, token in zip(sequences, tokens.tolist(), strict=True):
            sequence.append(token)
        decoding.step(tokens)
    assert expected.std() > 0.3


def drawn(decoding: Decoding, count: int) -> Tensor:
    """`count` tokens of every row, (R, T), by the same uniform numbers."""
    generator = torch.Generator().manual_seed(0)
    tokens = []
    for _ in range(count):
        uniforms = torch.rand(len(decoding.logits_RV), generator=generator, dtype=torch.float64)
        tokens.append(draw_tokens(decoding.logits_RV, uniforms, 1.0)[0])
        decoding.step(tokens[-1])
    return torch.stack(tokens, 1)


def test_all_ways_draw_the_same_tokens(any_model: Any):
    first, *others = (drawn(start(any_model), 20) for start in WAYS.values())
    assert all(torch.equal(tokens, first) for tokens in others)
    assert len(set(map(tuple, first.tolist()))) == len(PROMPT_OF_ROW)


def test_a_way_of_decoding_is_the_same_again_bit_for_bit(
    any_model: Any, start: Callable[..., Decoding]
):
    def once() -> Tensor:
        decoding = start(any_model)
        drawn(decoding, 5)
        return decoding.logits_RV

    assert torch.equal(once(), once())


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama"])
def test_rows_beyond_the_context_disturb_no_others(
    name: str, make_model: Callable[..., Any], start: Callable[..., Decoding]
):
    # The row of 9 tokens has a context of 11 to itself: 2 tokens. Those of 2 have 9.
    model = make_model(name, context=11)
    decoding = start(model, 11)
    sequences = [list(PROMPTS[0])] * 2
    for t in range(8):
        tokens = torch.full((len(PROMPT_OF_ROW),), 20 + t)
        sequences = [[*s, 20 + t] for s in sequences]
        decoding.step(tokens)
    expected = torch.stack([whole_logits(model, s) for s in sequences])
    assert_close(decoding.logits_RV[:2], expected, rtol=0, atol=LOGIT_TOLERANCE)
    assert torch.isfinite(decoding.logits_RV).all()


def test_prompts_can_be_gone_on_from_again(any_model: Any):
    prompts = prefill(any_model, PROMPTS, 0)
    rows = torch.tensor(PROMPT_OF_ROW)
    lean = lean_decoder(any_model)
    first, second = (
        drawn(SharedDecoding.behind(any_model, CONTEXT, prompts, rows, lean), 8) for _ in range(2)
    )
    assert torch.equal(first, second)


def test_a_step_behind_shared_prompts_computes_one_token_a_row(make_model: Callable[..., Any]):
    model = make_model("gemma2")
    decoding = shared(model)
    shapes = []
    model.model.layers[0].register_forward_hook(
        lambda module, args, output: shapes.append(tuple(args[0].shape[:2]))
    )
    decoding.step(torch.tensor([20] * 5))
    decoding.keep(torch.tensor([1, 3]))
    decoding.step(torch.tensor([21] * 2))
    assert shapes == [(5, 1), (2, 1)]


def test_the_step_written_out_is_that_of_llama_like_models(any_model: Any, architecture: str):
    assert bool(lean_decoder(any_model)) == (architecture in LEAN)


@pytest.mark.parametrize("name", LEAN)
def test_the_step_written_out_replaces_the_modules(
    name: str, make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    model, calls = make_model(name), []
    step = LeanDecoder.next_logits
    monkeypatch.setattr(LeanDecoder, "next_logits", lambda *args: calls.append(1) or step(*args))
    drawn(shared(model), 3)
    drawn(through_modules(model), 3)
    assert len(calls) == 3


@pytest.mark.parametrize("name", LEAN)
@pytest.mark.parametrize("change", ["biases", "tied", "another theta", "scaled positions"])
def test_the_step_written_out_knows_what_configurations_change(
    name: str, make_model: Callable[..., Any], change: str
):
    model = make_model(name)
    attention = model.model.layers[0].self_attn
    match change:
        case "biases":
            for layer in (attention.q_proj, attention.o_proj, model.model.layers[0].mlp.up_proj):
                layer.bias = torch.nn.Parameter(torch.randn(layer.out_features))
        case "tied":
            model.lm_head.weight = model.model.embed_tokens.weight
        case "another theta":
            model.model.rotary_emb.inv_freq.mul_(0.5)
        case "scaled positions":
            model.model.rotary_emb.attention_scaling = 1.3
    lean, modules = shared(model), through_modules(model)
    assert lean.lean
    for token in (20, 21, 22):
        lean.step(torch.full((5,), token))
        modules.step(torch.full((5,), token))
        assert_close(lean.logits_RV, modules.logits_RV, rtol=0, atol=LOGIT_TOLERANCE)


def test_norms_that_are_not_ones_are_applied_in_the_step_written_out(
    make_model: Callable[..., Any],
):
    model = make_model("qwen3")
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.copy_(0.5 + torch.rand(len(weight), generator=generator))
    lean, modules = shared(model), through_modules(model)
    for decoding in (lean, modules):
        decoding.step(torch.tensor([20, 21, 22, 23, 24]))
    assert_close(lean.logits_RV, modules.logits_RV, rtol=0, atol=LOGIT_TOLERANCE)


@pytest.fixture
def every_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of every size are laid out as large ones are."""
    monkeypatch.setattr(linear, "SMALLEST_PACKED", 1)
    monkeypatch.setattr(linear, "SMALLEST_WEIGHT", 1)


@pytest.mark.usefixtures("every_layout")
@pytest.mark.parametrize("name", LEAN)
def test_the_step_written_out_is_the_same_with_large_weights_layout(
    name: str, make_model: Callable[..., Any]
):
    model = make_model(name)
    assert torch.equal(drawn(shared(model), 12), drawn(plainly(model), 12))
    lean, plain = shared(model), plainly(model)
    for decoding in (lean, plain):
        decoding.step(torch.tensor([20, 21, 22, 23, 24]))
    assert_close(lean.logits_RV, plain.logits_RV, rtol=0, atol=LOGIT_TOLERANCE)


def test_a_new_decoder_has_the_weights_of_now(make_model: Callable[..., Any]):
    model = make_model("llama")
    drawn(shared(model), 2)
    for weight in model.parameters():
        weight.mul_(1.5)
    lean, plain = shared(model), plainly(model)
    for decoding in (lean, plain):
        decoding.step(torch.tensor([20, 21, 22, 23, 24]))
    assert_close(lean.logits_RV, plain.logits_RV, rtol=0, atol=10 * LOGIT_TOLERANCE)


@pytest.mark.usefixtures("every_layout")
@pytest.mark.parametrize("narrowest", [1, NARROWEST_BFLOAT16])
@pytest.mark.parametrize("name", LEAN)
def test_in_bfloat16_the_step_written_out_is_as_near_to_float32_as_the_modules(
    name: str, narrowest: int, make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    from language_self_play import lean_decoder as module

    monkeypatch.setattr(module, "NARROWEST_BFLOAT16", narrowest)
    rounded = make_model(name).bfloat16()
    exact = make_model(name)
    exact.load_state_dict(rounded.state_dict())
    decodings = shared(rounded), through_modules(rounded), plainly(exact)
    for decoding in decodings:
        for token in (20, 21, 22):
            decoding.step(torch.full((5,), token))
    lean, modules, expected = (decoding.logits_RV.float() for decoding in decodings)
    assert decodings[0].lean.dtype == (torch.bfloat16 if narrowest == 1 else torch.float32)
    distance = (modules - expected).norm()
    assert (lean - expected).norm() < 1.3 * distance < 0.1 * expected.norm()


def test_models_with_hooks_adapters_or_another_activation_go_through_their_modules(
    make_model: Callable[..., Any],
):
    import peft

    def hooked(model: Any) -> None:
        model.model.layers[1].mlp.register_forward_hook(lambda *call: None)

    def adapted(model: Any) -> None:
        peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["v_proj"]))

    def with_gelu(model: Any) -> None:
        model.config.hidden_act = "gelu"

    for change in (hooked, adapted, with_gelu):
        model = make_model("llama")
        assert lean_decoder(model)
        change(model)
        assert not lean_decoder(model), change.__name__


def test_adapted_layers_are_computed_with_their_adapters(make_model: Callable[..., Any]):
    import peft

    model = make_model("llama")
    torch.manual_seed(0)
    with torch.inference_mode(False):
        settings = peft.LoraConfig(
            r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False
        )
        peft.get_peft_model(model, settings)
    before = make_model("llama")
    found, plain, other = shared(model), plainly(model), shared(before)
    for decoding in (found, plain, other):
        decoding.step(torch.tensor([20, 21, 22, 23, 24]))
    assert_close(found.logits_RV, plain.logits_RV, rtol=0, atol=LOGIT_TOLERANCE)
    assert (found.logits_RV - other.logits_RV).abs().max() > 0.1
