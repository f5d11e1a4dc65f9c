"""AdamW in its three forms, float32 masters, and the learning rate of each step."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from language_self_play.config import Learner
from language_self_play.live_bytes import LiveBytes
from language_self_play.optimizer import Optimizer, learning_rate, working_copies

OPTIMIZERS = ("adamw", "adamw_fused", "adamw_8bit")
# bitsandbytes keeps small tensors in 32 bits; this one is large enough for 8.
LARGE = (96, 64)


def model_of(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Module()
    model.large = nn.Parameter(torch.randn(LARGE, dtype=dtype))
    model.small = nn.Parameter(torch.randn(7, dtype=dtype))
    model.frozen = nn.Parameter(torch.randn(3, dtype=dtype), requires_grad=False)
    return model


def learn(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    """Steps down a loss whose gradient at each step is a fixed random one."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        loss = sum(
            (p.float() * torch.randn(p.shape, generator=generator)).sum()
            for p in (model.large, model.small)
        )
        loss.backward()
        optimizer.step(1e-2)


def by_hand(weight: Tensor, gradients: list[Tensor], settings: Learner) -> Tensor:
    """AdamW as in Loshchilov & Hutter 2019, Algorithm 2."""
    first = second = torch.zeros_like(weight)
    b1, b2 = settings.betas
    for t, g in enumerate(gradients, 1):
        first, second = b1 * first + (1 - b1) * g, b2 * second + (1 - b2) * g * g
        step = (first / (1 - b1**t)) / ((second / (1 - b2**t)).sqrt() + 1e-8)
        weight = weight - 1e-2 * (step + settings.weight_decay * weight)
    return weight


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_optimizer_is_adamw(name):
    settings = Learner(optimizer=name, betas=(0.8, 0.9), weight_decay=0.1)
    model = model_of()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    learn(model, Optimizer(model, settings), range(5))
    gradients: dict[str, list[Tensor]] = {"large": [], "small": []}
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        for n, found in gradients.items():
            found.append(torch.randn(before[n].shape, generator=generator))
    for n, found in gradients.items():
        expected = by_hand(before[n], found, settings)
        # Moments of 8 bits: a part of a learning rate off in five steps of 1e-2.
        tolerance = 5e-3 if name == "adamw_8bit" and n == "large" else 1e-6
        assert_close(getattr(model, n).detach(), expected, rtol=0, atol=tolerance)
    assert torch.equal(model.frozen, before["frozen"])


def test_eight_bits_are_an_eighth_of_the_moments_of_thirty_two():
    sizes = {}
    for name in ("adamw", "adamw_8bit"):
        model = model_of()
        optimizer = Optimizer(model, Learner(optimizer=name))
        learn(model, optimizer, range(1))
        state = {k: v for k, v in optimizer.state().items() if k.startswith("large:")}
        sizes[name] = sum(v.nbytes for k, v in state.items() if "qmap" not in k)
    assert sizes["adamw"] == pytest.approx(8 * 96 * 64, rel=0.01)
    assert sizes["adamw_8bit"] == pytest.approx(2 * 96 * 64, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_from_a_saved_state_it_goes_on_bit_for_bit(name, dtype):
    settings = Learner(optimizer=name)
    whole = model_of(dtype)
    learn(whole, Optimizer(whole, settings), range(6))
    first = model_of(dtype)
    optimizer = Optimizer(first, settings)
    learn(first, optimizer, range(3))
    state = {name: value.clone() for name, value in optimizer.state().items()}
    second = model_of(dtype)
    second.load_state_dict(first.state_dict())
    optimizer = Optimizer(second, settings)
    optimizer.load_state(state)
    learn(second, optimizer, range(3, 6))
    for n, weight in whole.named_parameters():
        assert torch.equal(getattr(second, n), weight), n


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_update_keeps_no_memory_and_is_computed_in_the_room_that_was_tried_out(name, dtype):
    model = model_of(dtype)
    optimizer = Optimizer(model, Learner(optimizer=name))
    (model.large.float().sum() + model.small.float().sum()).backward()
    gradients = [w.grad for w in optimizer.weights.values()]
    moments = [v for s in optimizer.adamw.state.values() for v in s.values() if torch.is_tensor(v)]
    with LiveBytes(
        [*model.parameters(), *optimizer.weights.values(), *gradients, *moments]
    ) as count:
        optimizer.step(1e-2)
    assert count.now == 0
    # Two copies of the larger weight, 4 bytes a number; the other two kinds work in place.
    assert count.most == optimizer.room() == (2 * 4 * 96 * 64 if name == "adamw" else 0)


def test_on_a_gpu_all_weights_are_updated_at_once():
    with FakeTensorMode():
        weights = [torch.empty(10, device="cuda"), torch.empty(50, device="cuda")]
        assert working_copies("adamw", weights) == weights
        assert working_copies("adamw_fused", weights) == []


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_that_are_there_from_the_beginning_change_no_update(name):
    ours, theirs = model_of(), model_of()
    learn(ours, Optimizer(ours, Learner(optimizer=name)), range(3))
    optimizer = Optimizer(theirs, Learner(optimizer=name))
    optimizer.adamw.state.clear()  # the library makes its own, at the first update
    learn(theirs, optimizer, range(3))
    for n, weight in theirs.named_parameters():
        assert torch.equal(getattr(ours, n), weight), n


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_of_before_the_first_update_goes_on_bit_for_bit(name):
    whole, resumed = model_of(), model_of()
    optimizer = Optimizer(whole, Learner(optimizer=name))
    state = {name: value.clone() for name, value in optimizer.state().items()}
    learn(whole, optimizer, range(2))
    optimizer = Optimizer(resumed, Learner(optimizer=name))
    optimizer.load_state(state)
    learn(resumed, optimizer, range(2))
    for n, weight in whole.named_parameters():
        assert torch.equal(getattr(resumed, n), weight), n


def test_in_bfloat16_many_small_updates_add_up():
    model = model_of(torch.bfloat16)
    nn.init.ones_(model.large)
    optimizer = Optimizer(model, Learner())
    for _ in range(100):
        optimizer.zero_grad()
        model.large.sum().backward()
        optimizer.step(1e-4)  # below 1/256, where bfloat16 would stay at 1
    assert_close(optimizer.weights["large"].detach(), torch.full(LARGE, 0.99), rtol=0, atol=1e-5)
    # The bfloat16 number nearest to 0.99.
    assert model.large.unique().tolist() == [0.98828125]


def test_gradients_of_several_backward_passes_add_up_in_float32():
    model = model_of(torch.bfloat16)
    optimizer = Optimizer(model, Learner())
    # In bfloat16 256 + 1 is 256.
    for scale in (256.0, 1.0, 1.0):
        (model.large * scale).sum().backward()
    assert model.large.grad is None
    assert optimizer.weights["large"].grad.unique().tolist() == [258.0]


def test_a_gradient_whose_way_to_the_master_was_cut_off_counts_no_second_time(monkeypatch):
    model = model_of(torch.bfloat16)
    optimizer = Optimizer(model, Learner())

    def no_memory(self):
        raise torch.OutOfMemoryError("no memory for the float32 copy")

    loss = (model.large * 2.0).sum()
    monkeypatch.setattr(Tensor, "float", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        loss.backward()
    monkeypatch.undo()
    optimizer.zero_grad()
    (model.large * 2.0).sum().backward()
    assert optimizer.weights["large"].grad.unique().tolist() == [2.0]


def test_clipping_scales_the_gradient_to_the_norm_and_returns_the_norm_before():
    model = model_of()
    optimizer = Optimizer(model, Learner())
    model.small.grad = torch.tensor([3.0, 4.0, 0, 0, 0, 0, 0])
    assert optimizer.clip(1.0) == pytest.approx(5.0)
    assert_close(model.small.grad[:2], torch.tensor([0.6, 0.8]), rtol=1e-5, atol=0)
    assert optimizer.clip(1e9) == pytest.approx(1.0)


# ---------------------------------------------------------------- learning rates


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # Two warm-up steps at 1/3 and 2/3, then four of the schedule.
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1]),
        ("linear", [1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25]),
        ("cosine", [1 / 3, 2 / 3, 1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)]),
    ],
)
def test_the_learning_rate_warms_up_and_then_follows_its_schedule(schedule, expected):
    settings = Learner(schedule=schedule, warmup_steps=2)
    found = [learning_rate(step, 10.0, settings, 6) for step in range(6)]
    assert found == pytest.approx([10 * e for e in expected])


def test_without_warm_up_the_first_step_has_the_whole_learning_rate():
    assert learning_rate(0, 3e-6, Learner(schedule="cosine"), 1) == 3e-6
