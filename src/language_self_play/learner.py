"""The learning step: groups -> micro-batches -> log-probs -> loss -> one optimizer step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from language_self_play.advantages import centre
from language_self_play.config import Config
from language_self_play.distributed import ALONE, Ranks, in_words
from language_self_play.errors import MemoryLimitError, NonFiniteError
from language_self_play.forward import checkpointed_layers, choose_path, completion_logprobs
from language_self_play.losses import aggregate, kl_terms, policy_gradient
from language_self_play.optimizer import Optimizer, learning_rate
from language_self_play.out_of_memory import free_cached_memory, is_out_of_memory
from language_self_play.packing import (
    MicroBatch,
    first_kept,
    kept_completions,
    micro_batches,
    num_tokens,
    share_of_tokens,
)
from language_self_play.policy import Policy
from language_self_play.types import Groups

Term = tuple[Groups, float, float]  # of the loss: what a role played, its weight, its β


@dataclass
class StepResult:
    """What a learning step measured. KL and entropy are means per token, in nats, by role."""

    loss: float = 0.0
    grad_norm: float = 0.0
    kl: dict[str, float] = field(default_factory=dict)
    entropy: dict[str, float] = field(default_factory=dict)
    learning_rate: float = 0.0
    skipped: str | None = None  # why no update was made, if none was


class Learner:
    """AdamW on the policy, one step for both roles together (Algorithm 1).

    Of several ranks each learns from its share of the completions; sums and counts are of all.
    """

    def __init__(self, policy: Policy, config: Config, ranks: Ranks = ALONE):
        self.ranks = ranks
        self.policy = policy
        self.config = config
        self.optimizer = Optimizer(policy.model, config.learner)
        # FSDP2 averages gradients over the ranks; here they are to be added.
        self.gradient_scale = 1 if policy.sharded is None else ranks.size
        self.path = policy.compute(choose_path)
        self.tokens_per_micro_batch = config.learner.tokens_per_micro_batch
        self.before_update: Callable[[], None] = lambda: None  # called when only the update is left

    def step(self, solved: Groups, posed: Groups | None, alpha: float, step: int = 0) -> StepResult:
        """One step down the gradient of L_Sol + α_Ch · L_Ch. Paper, Algorithm 1, Eq. 4 and 5.

        `posed` is None for GRPO, which is the Solver's half; the learning rate is that of `step`.
        Where memory does not suffice, micro-batches are halved from here on and the gradient is
        taken anew. Raises NonFiniteError, before any weight has changed, if the loss or its gradient
        is not finite, and MemoryLimitError, before that too, if one completion is too much.
        """
        terms: list[Term] = [(solved, 1.0, self.config.solver.beta)]
        if posed is not None:
            terms.append((posed, alpha, self.config.challenger.beta))
        result = self._gradient(terms)
        result.learning_rate = learning_rate(
            step, self.config.lr, self.config.learner, self.config.steps
        )
        if not _is_finite(result):
            places = self._places_not_finite(terms)
            self.optimizer.zero_grad()
            raise NonFiniteError(
                f"the loss is {result.loss} and its gradient's norm {result.grad_norm}; the update"
                " was not made. A lower learner.lr or a larger beta usually helps",
                places,
            )
        self.before_update()
        self.optimizer.step(result.learning_rate)
        self.optimizer.zero_grad()  # nothing needs their memory while the next step is played
        return result

    def _gradient(self, terms: list[Term]) -> StepResult:
        """The gradient of Σ weight · L, clipped, in micro-batches as large as memory allows."""
        while True:
            result, ran_out = StepResult(), False
            self.optimizer.zero_grad()
            try:
                for groups, weight, beta in terms:
                    self._backward(groups, weight, beta, result)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if self.policy.sharded is not None:
                    raise MemoryLimitError(
                        f"{self.policy.device} has no memory left to learn, and with"
                        ' distributed.parallel = "fsdp" a rank can\'t repeat its part alone; lower'
                        " learner.tokens_per_micro_batch, set learner.gradient_checkpointing or"
                        " distributed.cpu_offload, or use more ranks; it goes on by --resume"
                    ) from None
                ran_out = True
            if not any(self.ranks.any(ran_out)):
                return self._summed(result)
            # Outside of `except`: its traceback would keep the pass's tensors alive.
            self.optimizer.zero_grad()
            free_cached_memory()
            self._halve_micro_batches(terms)

    def _halve_micro_batches(self, terms: list[Term]) -> None:
        """Half the tokens of the largest micro-batch. Raises MemoryLimitError if it is one completion."""
        batches = [batch for groups, _, _ in terms for batch in self._micro_batches(groups)]
        one_each = all(batch.index_BK.numel() == 1 for batch in batches)
        largest = max((num_tokens(b, self.path.shared_prompt) for b in batches), default=1)
        largest = self.ranks.most(largest)
        if not any(self.ranks.any(not one_each)):
            raise MemoryLimitError(
                f"{self.policy.device} has no memory left to learn from one completion; lower"
                " solver.max_tokens or challenger.max_tokens, or set learner.gradient_checkpointing or"
                " policy.lora"
            )
        self.tokens_per_micro_batch = max(1, min(self.tokens_per_micro_batch, largest) // 2)

    def _places_not_finite(self, terms: list[Term]) -> list[tuple[str, int]]:
        """(role, group) of each Solver's group whose own loss or gradient is not finite, and
        (role, completion) of each of the Challenger's; one backward pass each."""
        places: list[tuple[str, int]] = []
        for groups, weight, beta in terms:
            shape = [len(group.completions) for group in groups.groups]
            of_group = groups.role != "challenger"
            for i in range(len(shape) if of_group else sum(shape)):
                keep = [
                    [(g if of_group else k) == i for k in range(K)] for g, K in enumerate(shape)
                ]
                if groups.keep is not None:
                    keep = [
                        [a and b for a, b in zip(*rows, strict=True)]
                        for rows in zip(keep, groups.keep, strict=True)
                    ]
                result = StepResult()
                self.optimizer.zero_grad()
                self._backward(replace(groups, keep=keep), weight, beta, result)
                if not _is_finite(self._summed(result)):
                    places.append((groups.role, i))
        return places

    def _summed(self, result: StepResult) -> StepResult:
        """`result` and the gradients, summed over the ranks, the latter then clipped."""
        measured = [result.loss, *result.kl.values(), *result.entropy.values()]
        result.loss, *by_role = self.ranks.sums(measured)
        result.kl = dict(zip(result.kl, by_role, strict=False))
        result.entropy = dict(zip(result.entropy, by_role[len(result.kl) :], strict=True))
        if self.policy.sharded is None:
            self.ranks.sum_gradients(list(self.optimizer.weights.values()))
        with in_words():
            result.grad_norm = self.optimizer.clip(self.config.learner.max_grad_norm)
        return result

    def _backward(self, groups: Groups, weight: float, beta: float, result: StepResult) -> None:
        """Add this rank's part of weight · L to the gradients, and what it measures to `result`."""
        section, model, role = self.config.learner, self.policy.model, groups.role
        lengths = [len(c.tokens) for c in kept_completions(groups)]
        num_completions, total_tokens = len(lengths), sum(lengths)
        if num_completions == 0:
            return
        batches = self._micro_batches(groups)
        references: Iterable[Tensor | None] = self._reference_logprobs(batches, groups, beta)
        penalties = None
        if beta and section.kl == "reward":
            references = self._together(references)
            penalties = self._kl_penalties(groups, beta, batches, references)
        kl_sum = entropy_sum = 0.0
        for batch, of_reference in zip(batches, references, strict=True):
            advantages_BK, counts = batch.advantages_BK, int(batch.counts)
            if penalties is not None:
                advantages_BK = advantages_BK - penalties[batch.index_BK].to(advantages_BK.device)
            mask = batch.mask_BKT.flatten(0, 1)
            # Padding is 0 in both log-probs: an infinite term there would be NaN in the gradient.
            with checkpointed_layers(model, section.gradient_checkpointing):
                logprobs = self.policy.compute(
                    completion_logprobs, batch, groups.temperature, self.path
                )
            logprobs = logprobs.flatten(0, 1)
            terms = policy_gradient(logprobs, advantages_BK.flatten())
            if of_reference is not None:
                reference = of_reference.flatten(0, 1)
                if section.kl != "reward":
                    terms = terms + beta * kl_terms(logprobs, reference, section.kl)
                kl_sum += counts * kl_terms(logprobs.detach(), reference, "k3")[mask].sum().item()
            total = aggregate(terms, mask, section.aggregation, num_completions, total_tokens)
            loss = counts * weight * total
            with in_words():
                (loss * self.gradient_scale).backward()
            result.loss += loss.item()
            entropy_sum -= counts * logprobs.detach()[mask].sum().item()
        # On samples of π itself, the mean of -log π is an unbiased estimate of its entropy.
        result.entropy[role] = entropy_sum / total_tokens
        if beta:
            result.kl[role] = kl_sum / total_tokens

    def _reference_logprobs(
        self, batches: list[MicroBatch], groups: Groups, beta: float
    ) -> Iterator[Tensor | None]:
        """log π_Ref of each micro-batch's tokens, (B, K, T), one after the other; None at β = 0."""
        for batch in batches:
            if not beta:
                yield None
                continue
            yield self.policy.compute_reference(
                completion_logprobs, batch, groups.temperature, self.path
            )

    def _together(self, logprobs: Iterable[Tensor | None]) -> list[Tensor | None]:
        """All of `logprobs`; where one rank's memory runs out, all raise what their own would."""
        found: list[Tensor | None] = []
        ran_out = False
        try:
            found.extend(logprobs)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            ran_out = True
        if any(self.ranks.any(ran_out)):
            raise MemoryError("a rank is out of memory")
        return found

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
            references = self._together(self._reference_logprobs(batches, groups, beta))
        sums = torch.zeros(len(groups.completions()))
        for batch, reference in zip(batches, references, strict=True):
            assert reference is not None, "β is positive"
            if not batch.counts:
                continue
            sums[batch.index_BK] = reference.sum(-1).cpu()
        sampled = torch.tensor([sum(c.logprobs) for c in groups.completions()])
        penalties = sampled - torch.tensor(self.ranks.sums(sums.tolist()))
        return beta * centre(penalties.view(len(groups.groups), -1)).flatten()

    def _micro_batches(self, groups: Groups) -> list[MicroBatch]:
        budget = self.tokens_per_micro_batch
        own = replace(groups, keep=share_of_tokens(groups, self.ranks.rank, self.ranks.size))
        pad_id, device = self.policy.chat.pad_id, self.policy.device
        shares_prompt = self.path.shared_prompt
        batches = list(micro_batches(own, budget, pad_id, device, shares_prompt))
        if self.policy.sharded is not None:
            # A pass takes all ranks, so those with fewer micro-batches go along with what doesn't count.
            one = replace(groups, keep=first_kept(groups))
            idle = [replace(b, counts=False) for b in micro_batches(one, budget, pad_id, device)]
            batches += idle * (self.ranks.most(len(batches)) - len(batches))
        return batches


def _is_finite(result: StepResult) -> bool:
    return math.isfinite(result.loss) and math.isfinite(result.grad_norm)
