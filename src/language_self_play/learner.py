"""The learning step: groups -> micro-batches -> log-probs -> loss -> one optimizer step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from language_self_play.advantages import centre
from language_self_play.config import Config
from language_self_play.errors import NonFiniteError
from language_self_play.forward import checkpointed_layers, choose_path, completion_logprobs
from language_self_play.losses import aggregate, kl_terms, policy_gradient
from language_self_play.optimizer import Optimizer, learning_rate
from language_self_play.packing import MicroBatch, micro_batches
from language_self_play.policy import Policy
from language_self_play.types import Groups


@dataclass
class StepResult:
    """What a learning step measured. KL and entropy are means per token, in nats, by role."""

    loss: float = 0.0
    grad_norm: float = 0.0
    kl: dict[str, float] = field(default_factory=dict)
    entropy: dict[str, float] = field(default_factory=dict)
    learning_rate: float = 0.0


class Learner:
    """AdamW on the policy, one step for both roles together (Algorithm 1)."""

    def __init__(self, policy: Policy, config: Config):
        self.policy = policy
        self.config = config
        self.optimizer = Optimizer(policy.model, config.learner)
        self.path = choose_path(policy.model)

    def step(self, solved: Groups, posed: Groups | None, alpha: float, step: int = 0) -> StepResult:
        """One step down the gradient of L_Sol + α_Ch · L_Ch. Paper, Algorithm 1, Eq. 4 and 5.

        `posed` is None for GRPO, which is the Solver's half; the learning rate is that of `step`.
        Raises NonFiniteError, before any weight has changed, if the loss or its gradient is not
        finite.
        """
        section = self.config.learner
        result = StepResult(
            learning_rate=learning_rate(step, self.config.lr, section, self.config.steps)
        )
        self.optimizer.zero_grad()
        self._backward(solved, 1.0, self.config.solver.beta, result)
        if posed is not None:
            self._backward(posed, alpha, self.config.challenger.beta, result)
        result.grad_norm = self.optimizer.clip(section.max_grad_norm)
        if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
            raise NonFiniteError(
                f"the loss is {result.loss} and its gradient's norm {result.grad_norm}; the update"
                " was not made. A lower learner.lr or a larger beta usually helps"
            )
        self.optimizer.step(result.learning_rate)
        self.optimizer.zero_grad()  # nothing needs their memory while the next step is played
        return result

    def _backward(self, groups: Groups, weight: float, beta: float, result: StepResult) -> None:
        """Add weight · L to the gradients, and what it measures to `result`."""
        section, model, role = self.config.learner, self.policy.model, groups.role
        batches = self._micro_batches(groups)
        num_completions = sum(b.mask_BKT[..., 0].numel() for b in batches)
        num_tokens = sum(int(b.mask_BKT.sum()) for b in batches)
        if num_completions == 0:
            return
        references: Iterable[Tensor | None] = self._reference_logprobs(batches, groups, beta)
        penalties = None
        if beta and section.kl == "reward":
            references = list(references)
            penalties = self._kl_penalties(groups, beta, batches, references)
        kl_sum = entropy_sum = 0.0
        for batch, of_reference in zip(batches, references, strict=True):
            advantages_BK = batch.advantages_BK
            if penalties is not None:
                advantages_BK = advantages_BK - penalties[batch.index_BK].to(advantages_BK.device)
            mask = batch.mask_BKT.flatten(0, 1)
            # Padding is 0 in both log-probs: an infinite term there would be NaN in the gradient.
            with checkpointed_layers(model, section.gradient_checkpointing):
                logprobs = completion_logprobs(model, batch, groups.temperature, self.path)
            logprobs = logprobs.flatten(0, 1)
            terms = policy_gradient(logprobs, advantages_BK.flatten())
            if of_reference is not None:
                reference = of_reference.flatten(0, 1)
                if section.kl != "reward":
                    terms = terms + beta * kl_terms(logprobs, reference, section.kl)
                kl_sum += kl_terms(logprobs.detach(), reference, "k3")[mask].sum().item()
            loss = weight * aggregate(terms, mask, section.aggregation, num_completions, num_tokens)
            loss.backward()
            result.loss += loss.item()
            entropy_sum -= logprobs.detach()[mask].sum().item()
        # On samples of π itself, the mean of -log π is an unbiased estimate of its entropy.
        result.entropy[role] = entropy_sum / num_tokens
        if beta:
            result.kl[role] = kl_sum / num_tokens

    def _reference_logprobs(
        self, batches: list[MicroBatch], groups: Groups, beta: float
    ) -> Iterator[Tensor | None]:
        """log π_Ref of each micro-batch's tokens, (B, K, T), one after the other; None at β = 0."""
        for batch in batches:
            if not beta:
                yield None
                continue
            with torch.no_grad(), self.policy.as_reference() as reference:
                logprobs = completion_logprobs(reference, batch, groups.temperature, self.path)
            yield logprobs

    def _kl_penalties(
        self,
        groups: Groups,
        beta: float,
        batches: list[MicroBatch],
        references: list[Tensor | None],
    ) -> Tensor:
        """What the KL folded into the reward takes from each completion's advantage, flat.

        Each completion's own β · Σ_t log(π/π_Ref), detached, is subtracted from its reward before
        centring; centring is linear, so its centred value may be subtracted from the advantage.
        The sampler's log-probs are log π. Completions that are masked from the loss count in the
        centring, as their rewards do.
        """
        if groups.keep is not None:
            batches = self._micro_batches(replace(groups, keep=None))
            references = list(self._reference_logprobs(batches, groups, beta))
        penalties = torch.tensor([sum(c.logprobs) for c in groups.completions()])
        for batch, reference in zip(batches, references, strict=True):
            assert reference is not None, "β is positive"
            penalties[batch.index_BK] -= reference.sum(-1).cpu()
        return beta * centre(penalties.view(len(groups.groups), -1)).flatten()

    def _micro_batches(self, groups: Groups) -> list[MicroBatch]:
        budget = self.config.learner.tokens_per_micro_batch
        pad_id, device = self.policy.chat.pad_id, self.policy.model.device
        return list(micro_batches(groups, budget, pad_id, device, self.path.shared_prompt))
