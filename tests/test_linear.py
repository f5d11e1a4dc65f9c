"""Linear layers for few rows: the same products, but for rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from language_self_play import linear as module
from language_self_play.linear import (
    MOST_ROWS,
    SMALLEST_PACKED,
    SMALLEST_WEIGHT,
    lay_out,
    linears_for_few_rows,
)

# The smallest weight that counts is 128 · 256.
IN, OUT = 256, 128
# bfloat16 has 8 bits; outputs are sums of size 1.
TOLERANCE = 2e-2


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def layer(bias: bool = True, dtype: torch.dtype = torch.bfloat16) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(IN, OUT, bias).to(dtype)


def rows(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, IN, generator=torch.Generator().manual_seed(1)).to(dtype)


def exactly(x: Tensor, layer: nn.Linear) -> Tensor:
    """The product of the rounded numbers, in float64."""
    bias = None if layer.bias is None else layer.bias.double()
    return nn.functional.linear(x.double(), layer.weight.double(), bias)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """A list that grows by the shape of what torch's own linear function is given."""
    shapes: list[tuple[int, ...]] = []
    plain = nn.functional.linear

    def counted(x: Tensor, *rest: Any) -> Tensor:
        shapes.append(tuple(x.shape))
        return plain(x, *rest)

    monkeypatch.setattr(nn.functional, "linear", counted)
    return shapes


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 1), (2, 3, 5), (MOST_ROWS,)], ids=str)
def test_few_rows_get_what_nn_linear_gives_but_for_rounding(
    bias: bool, shape: tuple[int, ...], products: list[Any]
):
    chosen, x = layer(bias), rows(*shape)
    with linears_for_few_rows(nn.Sequential(chosen)):
        found = chosen(x)
    assert products == []  # it is not torch's function that was called
    assert (found.shape, found.dtype) == ((*shape, OUT), torch.bfloat16)
    assert_close(found.double(), exactly(x, chosen), rtol=0, atol=TOLERANCE)
    assert_close(found, chosen(x), rtol=0, atol=TOLERANCE)
    assert found.double().std() > 0.3


def test_a_literal_product():
    # Ones in the first row of weights and twos in the second, and a bias: 256 + 0.5, 512 - 1.
    chosen = layer()
    chosen.weight.zero_()
    chosen.weight[0], chosen.weight[1] = 1.0, 2.0
    chosen.bias.zero_()
    chosen.bias[:2] = torch.tensor([2.0, -4.0])
    [found] = lay_out([chosen], torch.bfloat16)(torch.ones(3, IN, dtype=torch.bfloat16))
    # 256 + 2 and 512 - 4.
    assert found[:, :3].tolist() == [[258.0, 508.0, 0.0]] * 3


def test_more_rows_go_through_torchs_function(products: list[Any]):
    chosen = layer()
    for shape in ((MOST_ROWS + 1,), (3, MOST_ROWS // 2)):
        x = rows(*shape)
        with linears_for_few_rows(nn.Sequential(chosen)):
            found = chosen(x)
        assert products.pop() == (*shape, IN)
        assert not products
        assert torch.equal(found, chosen(x))
        products.clear()


def forwards(model: nn.Module) -> dict[str, Any]:
    """The forward of every linear layer that has one of its own."""
    return {
        name: vars(m)["forward"]
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and "forward" in vars(m)
    }


def test_forward_is_restored_even_after_an_error():
    model = nn.Sequential(layer(), layer())
    with linears_for_few_rows(model):
        assert set(forwards(model)) == {"0", "1"}
    assert forwards(model) == {}

    def fail() -> None:
        with linears_for_few_rows(model):
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        fail()
    assert forwards(model) == {}


def test_float32_small_weights_and_other_kinds_of_layers_keep_their_own():
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    small = nn.Linear(IN, OUT - 1).bfloat16()
    assert small.weight.numel() < SMALLEST_WEIGHT <= layer().weight.numel()
    doubled = Doubled(IN, OUT).bfloat16()
    model = nn.ModuleList([layer(dtype=torch.float32), small, doubled, layer(), nn.Embedding(9, 9)])
    x = rows(2)
    before = doubled(x)
    with linears_for_few_rows(model):
        assert set(forwards(model)) == {"3"}
        assert torch.equal(doubled(x), before)


LAYOUTS = {
    "packed": (torch.float32, 1, 1),
    "transposed": (torch.float32, 1 << 30, 1),
    "turned": (torch.bfloat16, 1, 1),
    "transposed bfloat16": (torch.bfloat16, 1, 1 << 30),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("count", [1, 5, 64, 200])
def test_layers_laid_out_together_give_what_each_gives(
    layout: str, count: int, monkeypatch: pytest.MonkeyPatch
):
    dtype, packed, turned = LAYOUTS[layout]
    monkeypatch.setattr(module, "SMALLEST_PACKED", packed)
    monkeypatch.setattr(module, "SMALLEST_WEIGHT", turned)
    torch.manual_seed(0)
    # The second has no bias, which is none of the first's.
    layers = [nn.Linear(IN, OUT), nn.Linear(IN, 24, bias=False), nn.Linear(IN, 7)]
    layers = [x.to(dtype) for x in layers]
    x = rows(count, dtype=dtype)
    found = lay_out(layers, dtype)(x)
    assert [y.dtype for y in found] == [dtype] * 3
    tolerance = 1e-5 if dtype == torch.float32 else TOLERANCE
    for y, one in zip(found, layers, strict=True):
        assert_close(y.double(), exactly(x, one), rtol=0, atol=tolerance)
        [alone] = lay_out([one], dtype)(x)
        assert_close(alone.double(), exactly(x, one), rtol=0, atol=tolerance)


def test_inputs_are_scaled_as_asked():
    # Rows of weights are 1s and 2s, inputs 3s, and half the inputs count twice: 3 · (128 + 2 · 128).
    two = nn.Linear(IN, 2, bias=False)
    two.weight.copy_(torch.tensor([[1.0], [2.0]]).expand(2, IN))
    scale = torch.tensor([1.0] * 128 + [2.0] * 128)
    [found] = lay_out([two], torch.float32, scale)(torch.full((1, IN), 3.0))
    assert found.tolist() == [[1152.0, 2304.0]]
    assert two.weight[0].unique().tolist() == [1.0]  # as it was


def test_what_is_laid_out_is_a_copy_of_the_weights_as_they_were():
    chosen, x = layer(dtype=torch.float32), rows(4, dtype=torch.float32)
    product, before = lay_out([chosen], torch.float32), chosen(x)
    chosen.weight.zero_()
    assert_close(product(x)[0], before, rtol=0, atol=1e-5)


def test_large_weights_in_float32_are_packed_by_onednn(monkeypatch: pytest.MonkeyPatch):
    packed = []
    reorder = torch.ops.mkldnn._reorder_linear_weight
    monkeypatch.setattr(
        torch.ops.mkldnn,
        "_reorder_linear_weight",
        lambda *args: packed.append(len(args[0])) or reorder(*args),
    )
    side = int(SMALLEST_PACKED**0.5)
    lay_out([nn.Linear(side, side)], torch.float32)
    lay_out([nn.Linear(side, side - 1)], torch.float32)
    lay_out([nn.Linear(side, side - 1), nn.Linear(side, 1)], torch.float32)
    assert packed == [side, side]


def test_without_onednns_operators_weights_are_transposed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "SMALLEST_PACKED", 1)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    chosen, x = layer(dtype=torch.float32), rows(4, dtype=torch.float32)
    assert_close(lay_out([chosen], torch.float32)(x)[0], chosen(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3", "opt"])
def test_a_model_gives_its_logits_but_for_rounding(
    name: str, make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "SMALLEST_WEIGHT", 1)
    ids = torch.arange(3, 33).view(3, 10)
    exact = make_model(name)(ids, use_cache=False).logits
    model = make_model(name).bfloat16()
    plain = model(ids, use_cache=False).logits.float()
    with linears_for_few_rows(model):
        assert len(forwards(model)) > 8
        found = model(ids, use_cache=False).logits.float()
    # As near to float32 as with nn.Linear's own products.
    assert (found - exact).norm() < 1.3 * (plain - exact).norm() < 0.1 * exact.norm()
    assert torch.equal(model(ids, use_cache=False).logits.float(), plain)


def test_the_layers_under_adapters_are_computed_so_and_the_adapters_stay(
    make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    import peft

    monkeypatch.setattr(module, "SMALLEST_WEIGHT", 1)
    model = make_model("llama")
    ids = torch.arange(3, 33).view(3, 10)
    without = model(ids, use_cache=False).logits
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    peft.get_peft_model(model, settings)
    exact = model(ids, use_cache=False).logits
    model.bfloat16()
    plain = model(ids, use_cache=False).logits.float()
    with linears_for_few_rows(model):
        assert any("base_layer" in name for name in forwards(model))
        found = model(ids, use_cache=False).logits.float()
    assert (found - exact).norm() < 1.3 * (plain - exact).norm() < 0.1 * exact.norm()
    assert (exact - without).norm() > 0.3 * exact.norm()


def test_few_rows_are_computed_the_same_again_bit_for_bit():
    product, x = lay_out([layer()], torch.bfloat16), rows(5)
    assert torch.equal(product(x)[0], product(x)[0])
