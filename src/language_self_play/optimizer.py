"""AdamW on float32 weights, whatever type the model computes in; the learning rate of each step.

A weight in bfloat16 has 8 bits of mantissa: an update below 1/256 of it would be rounded away. So
such weights have float32 masters, which are what is optimized; the model holds their roundings.

An update that ran out of memory half-way would leave some weights updated and others not. So the moments
are there from the beginning, and what an update is computed in is tried out before it (`room`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from language_self_play.checkpoint import MASTER
from language_self_play.config import Learner
from language_self_play.extras import require
from language_self_play.shard_files import local


def learning_rate(step: int, peak: float, settings: Learner, steps: int) -> float:
    """The learning rate of `step`, a pure function of it: a warm-up, then the schedule.

    With W warm-up steps of S and u = (step - W) / (S - W), the share of the rest that has passed:

        step < W   peak · (step + 1) / (W + 1)
        constant   peak
        linear     peak · (1 - u)
        cosine     peak · (1 + cos(π u)) / 2
    """
    warmup = settings.warmup_steps
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    passed = (step - warmup) / (steps - warmup)
    match settings.schedule:
        case "constant":
            return peak
        case "linear":
            return peak * (1 - passed)
        case "cosine":
            return peak * (1 + math.cos(math.pi * passed)) / 2


class Optimizer:
    """AdamW (Loshchilov & Hutter 2019) on the parameters of `model` that have gradients."""

    def __init__(self, model: nn.Module, settings: Learner):
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.weights: dict[str, Tensor] = {}  # what is optimized, float32, by name
        for name, parameter in self.parameters.items():
            if parameter.dtype == torch.float32:
                self.weights[name] = parameter
                continue
            self.weights[name] = master = parameter.detach().float().requires_grad_()
            # As soon as a gradient is there it moves into the master's: two copies never exist.
            parameter.register_post_accumulate_grad_hook(_accumulate_in(master))
        self.settings = settings
        self.adamw = _adamw(list(self.weights.values()), settings)
        self._allocate_moments()

    def _allocate_moments(self) -> None:
        """What both libraries would allocate at a weight's first update, as they do."""
        [group] = self.adamw.param_groups
        for index, weight in enumerate(self.weights.values()):
            if not isinstance(self.adamw, torch.optim.AdamW):
                self.adamw.init_state(group, weight, 0, index)  # type: ignore[attr-defined]
                continue
            self.adamw.state[weight] = {
                "step": self._placed("step", torch.tensor(0.0), weight),
                "exp_avg": torch.zeros_like(weight),
                "exp_avg_sq": torch.zeros_like(weight),
            }

    def zero_grad(self) -> None:
        # A parameter's own is gone already, unless memory ran out on its way into the master's.
        for weight in (*self.weights.values(), *self.parameters.values()):
            weight.grad = None

    def clip(self, max_norm: float) -> float:
        """Scale the gradients to a norm of at most `max_norm`; returns the norm before."""
        norm = nn.utils.clip_grad_norm_(self.weights.values(), max_norm)
        return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()

    def room(self) -> int:
        """Take the memory that the next update is computed in, and give it back; its bytes."""
        weights = working_copies(self.settings.optimizer, list(self.weights.values()))
        taken = [torch.empty_like(weight) for weight in weights]
        return sum(t.nbytes for t in taken)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update of all weights with learning rate `lr`."""
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        self._round()

    def state(self) -> dict[str, Tensor]:
        """Everything to go on from, by `NAME:WHAT`: AdamW's state and the masters; this rank's rows."""
        tensors = {}
        for name, weight in self.weights.items():
            state = {k: torch.as_tensor(v) for k, v in self.adamw.state.get(weight, {}).items()}
            if weight is not self.parameters[name]:
                state[MASTER] = weight
            for what, value in state.items():
                value = local(value.detach()).cpu().contiguous()
                # bitsandbytes shares its quantization maps; a safetensors file shares nothing.
                tensors[f"{name}:{what}"] = value.clone() if what.startswith("qmap") else value
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `state` returned."""
        of_name: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            name, what = key.rsplit(":", 1)
            of_name.setdefault(name, {})[what] = value
        for name, state in of_name.items():
            weight = self.weights[name]
            if MASTER in state:
                weight.copy_(state.pop(MASTER))
            if state:
                self.adamw.state[weight] = {k: self._placed(k, v, weight) for k, v in state.items()}
        self._round()

    def _placed(self, what: str, value: Tensor, weight: Tensor) -> Any:
        if isinstance(weight, DTensor) and value.dim():
            pieces = torch.zeros_like(weight)
            local(pieces).copy_(value)
            return pieces
        if what != "step":
            return value.to(next(iter(self.weights.values())).device)
        if not isinstance(self.adamw, torch.optim.AdamW):
            return int(value)  # bitsandbytes counts in Python
        # AdamW counts on the CPU, unless the count is read by a kernel.
        fused = self.adamw.defaults["fused"]
        return value.to(next(iter(self.weights.values())).device) if fused else value

    def _round(self) -> None:
        for name, weight in self.weights.items():
            if weight is not self.parameters[name]:
                self.parameters[name].data.copy_(weight)


def working_copies(kind: str, weights: list[Tensor]) -> list[Tensor]:
    """Of which weights an update holds a copy's worth of memory at once.

    On a GPU of all, for the square roots of the second moments (torch's foreach form); elsewhere two of
    one weight after the other, here the largest. The other two kinds work in place.
    """
    if kind != "adamw":
        return []
    if weights[0].device.type == "cuda":
        return weights
    return [max(weights, key=lambda w: w.nbytes)] * 2


def _adamw(weights: list[Tensor], settings: Learner) -> torch.optim.Optimizer:
    options: dict[str, Any] = {"betas": settings.betas, "weight_decay": settings.weight_decay}
    if settings.optimizer == "adamw_8bit":
        bitsandbytes = require("bitsandbytes", "8bit", 'learner.optimizer = "adamw_8bit"')
        return bitsandbytes.optim.AdamW8bit(weights, **options)
    return torch.optim.AdamW(weights, fused=settings.optimizer == "adamw_fused", **options)


def _accumulate_in(master: Tensor) -> Any:
    def move(parameter: Tensor) -> None:
        assert parameter.grad is not None, "called once a gradient is there"
        gradient = parameter.grad.float()
        master.grad = gradient if master.grad is None else master.grad.add_(gradient)
        parameter.grad = None

    return move
