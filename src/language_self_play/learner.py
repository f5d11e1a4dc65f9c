"""The learning step: groups -> micro-batches -> log-probs -> loss -> one optimizer step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from language_self_play.advantages import centre
from language_self_play.config import Config
from language_self_play.distributed import ALONE, Ranks, in_words
from language_self_play.errors import MemoryLimitError, NonFiniteError, SamplerError
from language_self_play.forward import checkpointed_layers, choose_path, completion_logprobs
from language_self_play.losses import aggregate, importance_weights, kl_terms, policy_gradient
from language_self_play.optimizer import Optimizer, learning_rate
from language_self_play.out_of_memory import unless_out_of_memory
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

T = TypeVar("T")


class Term(NamedTuple):
    """Of the loss: what a role played, its weight, its β."""

    groups: Groups
    weight: float
    beta: float
    reference_KT: Tensor | None = None  # log π_Ref of all completions, where rewards contain the KL


@dataclass
class StepResult:
    """What a learning step measured. KL and entropy are means per token, in nats, by role."""

    loss: float = 0.0
    grad_norm: float = 0.0
    kl: dict[str, float] = field(default_factory=dict)
    entropy: dict[str, float] = field(default_factory=dict)
    logprob_differences: list[tuple[float, int]] = field(default_factory=list)  # sums, of tokens
    capped: list[float] = field(default_factory=list)  # importance weights at their cap
    learning_rate: float = 0.0
    skipped: str | None = None  # why no update was made, if none was

    @property
    def logprob_difference(self) -> float | None:
        """Mean of |log μ - log π| over tokens, in nats: the sampler's and the trainer's."""
        num_tokens = sum(n for _, n in self.logprob_differences)
        return sum(s for s, _ in self.logprob_differences) / num_tokens if num_tokens else None

    @property
    def capped_fraction(self) -> float | None:
        """Share of tokens whose importance weight the cap has cut; None without weights."""
        num_tokens = sum(n for _, n in self.logprob_differences)
        return sum(self.capped) / num_tokens if self.capped else None


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
        self.gradient_scale = ranks.size if policy.trains_shards else 1
        self.path = policy.compute(choose_path)
        self.tokens_per_micro_batch = config.learner.tokens_per_micro_batch
        self.before_update: Callable[[], None] = lambda: None  # called when only the update is left

    def step(self, solved: Groups, posed: Groups | None, alpha: float, step: int = 0) -> StepResult:
        """One step down the gradient of L_Sol + α_Ch · L_Ch. Paper, Algorithm 1, Eq. 4 and 5.

        `posed` is None for GRPO, which is the Solver's half; the learning rate is that of `step`.
        Where memory does not suffice, micro-batches are halved from here on and the gradient is
        taken anew. All before any weight has changed it raises NonFiniteError if the loss or its
        gradient is not finite, SamplerError if the sampler's log-probs are too far from the trainer's,
        and MemoryLimitError if one completion is too much.
        """
        terms = [Term(solved, 1.0, self.config.solver.beta)]
        if posed is not None:
            terms.append(Term(posed, alpha, self.config.challenger.beta))
        terms = self._with_references(terms)
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
        self._check_room()
        self._check_sampler(result)
        self.before_update()
        self.optimizer.step(result.learning_rate)
        self.optimizer.zero_grad()  # nothing needs their memory while the next step is played
        return result

    def _check_sampler(self, result: StepResult) -> None:
        """Raises SamplerError if vLLM's log-probs are not those of the weights that learn."""
        rollout, difference = self.config.rollout, result.logprob_difference
        if rollout.engine != "vllm" or difference is None:
            return
        if difference > (bound := rollout.vllm.max_logprob_difference):
            self.optimizer.zero_grad()
            raise SamplerError(
                f"the sampler's log-probs differ from the trainer's by {difference:.3g} nats a token on"
                f" average, more than rollout.vllm.max_logprob_difference = {bound:g}; vLLM computes"
                " something else than the policy, or other weights; the update was not made."
                " docs/vllm.md says what to look at"
            )

    def _gradient(self, terms: list[Term]) -> StepResult:
        """The gradient of Σ weight · L, clipped, in micro-batches as large as memory allows."""

        def attempt() -> StepResult:
            result = StepResult()
            for term in terms:
                self._backward(term, result)
            return result

        self.optimizer.zero_grad()
        return self._summed(self._as_memory_allows(terms, attempt))

    def _with_references(self, terms: list[Term]) -> list[Term]:
        """The terms with what a KL in the reward needs: every completion's reference log-probs.

        They come before any gradient, so that ranks wait for each other once, and are computed once.
        """
        if self.config.learner.kl != "reward":
            return terms
        whole = [t._replace(groups=replace(t.groups, keep=None)) for t in terms]
        found = self._as_memory_allows(whole, lambda: [self._reference_of_all(t) for t in whole])
        for reference_KT in found:
            self.ranks.sum(reference_KT)
        return [t._replace(reference_KT=r) for t, r in zip(terms, found, strict=True)]

    def _as_memory_allows(self, terms: list[Term], compute: Callable[[], T]) -> T:
        """What `compute` returns; where memory runs out, on any rank, all halve their micro-batches."""
        while True:
            result = unless_out_of_memory(compute)
            if result is None and self.policy.sharded is not None and not self.policy.abandoned:
                raise MemoryLimitError(
                    f"{self.policy.device} has no memory left to learn, and with"
                    ' distributed.parallel = "fsdp" a rank can\'t repeat a backward pass alone; lower'
                    " learner.tokens_per_micro_batch, set learner.gradient_checkpointing or"
                    " distributed.cpu_offload, or use more ranks; it goes on by --resume"
                )
            [ran_out] = self.ranks.any(result is None)
            if result is not None and not ran_out:
                return result
            result = None
            self.optimizer.zero_grad()  # what was added before memory ran out must not count twice
            self._halve_micro_batches(terms)

    def _check_room(self) -> None:
        """Raises MemoryLimitError, while all weights are still whole, if an update finds no memory."""
        # The second time without what torch's allocator had kept for later.
        has_none = all(unless_out_of_memory(self.optimizer.room) is None for _ in range(2))
        if any(self.ranks.any(has_none)):
            failure = MemoryLimitError(
                f"{self.policy.device} has no memory left to compute an update in, and none was made;"
                ' learner.optimizer = "adamw_fused" needs none, and policy.lora little'
            )
            failure.agreed = True
            raise failure

    def _halve_micro_batches(self, terms: list[Term]) -> None:
        """Half the tokens of the largest micro-batch. Raises MemoryLimitError if it is one completion."""
        batches = [batch for term in terms for batch in self._micro_batches(term.groups)]
        one_each = all(batch.index_BK.numel() == 1 for batch in batches)
        largest = max((num_tokens(b, self.path.shared_prompt) for b in batches), default=1)
        largest = self.ranks.most(largest)
        if not any(self.ranks.any(not one_each)):
            failure = MemoryLimitError(
                f"{self.policy.device} has no memory left to learn from one completion; lower"
                " solver.max_tokens or challenger.max_tokens, or set learner.gradient_checkpointing or"
                " policy.lora"
            )
            failure.agreed = True
            raise failure
        self.tokens_per_micro_batch = max(1, min(self.tokens_per_micro_batch, largest) // 2)

    def _places_not_finite(self, terms: list[Term]) -> list[tuple[str, int]]:
        """(role, group) of each Solver's group whose own loss or gradient is not finite, and
        (role, completion) of each of the Challenger's; one backward pass each."""
        places: list[tuple[str, int]] = []
        for term in terms:
            groups = term.groups
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
                self._backward(term._replace(groups=replace(groups, keep=keep)), result)
                if not _is_finite(self._summed(result)):
                    places.append((groups.role, i))
        return places

    def _summed(self, result: StepResult) -> StepResult:
        """`result` and the gradients, summed over the ranks, the latter then clipped."""
        of_tokens = result.logprob_differences
        measured: list[float] = [result.loss, sum(s for s, _ in of_tokens)]
        measured += [sum(n for _, n in of_tokens), sum(result.capped)]
        measured += [*result.kl.values(), *result.entropy.values()]
        result.loss, difference, num_tokens, capped, *by_role = self.ranks.sums(measured)
        if num_tokens:
            result.logprob_differences = [(difference, int(num_tokens))]
            result.capped = [capped] if self.config.importance_cap else []
        result.kl = dict(zip(result.kl, by_role, strict=False))
        result.entropy = dict(zip(result.entropy, by_role[len(result.kl) :], strict=True))
        if not self.policy.trains_shards:
            self.ranks.sum_gradients(list(self.optimizer.weights.values()))
        with in_words():
            result.grad_norm = self.optimizer.clip(self.config.learner.max_grad_norm)
        return result

    def _backward(self, term: Term, result: StepResult) -> None:
        """Add this rank's part of weight · L to the gradients, and what it measures to `result`."""
        groups, weight, beta, reference_KT = term
        section, model, role = self.config.learner, self.policy.model, groups.role
        lengths = [len(c.tokens) for c in kept_completions(groups)]
        num_completions, total_tokens = len(lengths), sum(lengths)
        if num_completions == 0:
            return
        batches = self._micro_batches(groups)
        references: Iterable[Tensor | None] = self._reference_logprobs(batches, groups, beta)
        penalties = None
        if reference_KT is not None:
            references = (reference_KT[b.index_BK, : b.mask_BKT.shape[-1]] for b in batches)
            penalties = self._kl_penalties(groups, beta, reference_KT)
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
            sampled, played = batch.sampled_BKT.flatten(0, 1), logprobs.detach()
            difference = (played - sampled)[mask].abs().sum().item()
            result.logprob_differences.append((counts * difference, counts * int(mask.sum())))
            terms = policy_gradient(logprobs, advantages_BK.flatten())
            if of_reference is not None:
                reference = of_reference.flatten(0, 1)
                if section.kl != "reward":
                    terms = terms + beta * kl_terms(logprobs, reference, section.kl)
                kl_sum += counts * kl_terms(played, reference, "k3")[mask].sum().item()
            if cap := self.config.importance_cap:
                # Both terms are means over what was sampled.
                weights = importance_weights(logprobs, sampled, cap)
                terms = weights * terms
                result.capped.append(counts * (weights >= cap)[mask].sum().item())
            total = aggregate(terms, mask, section.aggregation, num_completions, total_tokens)
            loss = counts * weight * total
            with in_words():
                (loss * self.gradient_scale).backward()
            result.loss += loss.item()
            entropy_sum -= counts * played[mask].sum().item()
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

    def _reference_of_all(self, term: Term) -> Tensor | None:
        """log π_Ref of all completions' tokens, where none is masked: (completions, T), padded by 0.

        Of other ranks' completions it is 0; None at β = 0.
        """
        groups, _, beta, _ = term
        lengths = [len(c.tokens) for c in groups.completions()]
        if not (beta and lengths):
            return None
        rows_KT = torch.zeros(len(lengths), max(lengths), device=self.policy.device)
        batches = self._micro_batches(groups)
        for batch, logprobs in zip(
            batches, self._reference_logprobs(batches, groups, beta), strict=True
        ):
            assert logprobs is not None, "β is positive"
            if batch.counts:
                rows_KT[batch.index_BK, : logprobs.shape[-1]] = logprobs
        return rows_KT

    def _kl_penalties(self, groups: Groups, beta: float, reference_KT: Tensor) -> Tensor:
        """What the KL folded into the reward takes from each completion's advantage, flat.

        Each completion's own β · Σ_t log(π/π_Ref), detached, is subtracted from its reward before
        centring; centring is linear, so its centred value may be subtracted from the advantage.
        The sampler's log-probs are log π. Completions that are masked from the loss count in the
        centring, as their rewards do.
        """
        of_policy = torch.tensor([sum(c.logprobs) for c in groups.completions()])
        penalties = of_policy - reference_KT.sum(-1).cpu()
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
