"""Linear layers for few rows in bfloat16: the same products, but for rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from language_self_play import linear as module
from language_self_play.linear import MOST_ROWS, SMALLEST_WEIGHT, linear, linears_for_few_rows

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
    found = linear(torch.ones(3, IN, dtype=torch.bfloat16), chosen)
    # 256 + 2 and 512 - 4.
    assert found[:, :3].tolist() == [[258.0, 508.0, 0.0]] * 3


def test_more_rows_go_through_torchs_function(products: list[Any]):
    chosen = layer()
    for shape in ((MOST_ROWS + 1,), (3, MOST_ROWS // 2)):
        x = rows(*shape)
        with linears_for_few_rows(nn.Sequential(chosen)):
            found = chosen(x)
        assert len(products.pop()) == 2
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


def test_float32_is_left_to_torch_bit_for_bit():
    chosen, x = layer(dtype=torch.float32), rows(4, dtype=torch.float32)
    assert torch.equal(linear(x, chosen), chosen(x))


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
    chosen, x = layer(), rows(5)
    assert torch.equal(linear(x, chosen), linear(x, chosen))
