"""One learning step against Equations 4 and 5, computed naively from whole sequences."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from language_self_play.config import Config, Rollout
from language_self_play.errors import MemoryLimitError, NonFiniteError, SamplerError
from language_self_play.learner import Learner, StepResult
from language_self_play.policy import Policy
from language_self_play.types import Completion, Group, Groups, Posed, Solved
from out_of_memory import OUT_OF_MEMORY

ALPHA = 0.6
SOLVER_BETA, CHALLENGER_BETA = 0.3, 0.7
SOLVER_TEMPERATURE, CHALLENGER_TEMPERATURE = 0.8, 1.3
GRADIENT_TOLERANCE = 1e-5
ZERO_TOLERANCE = 1e-8

KLS = ("k1", "k2", "k3", "reward")
AGGREGATIONS = ("sequence", "sequence_mean", "token_mean")

ANSWERS = {(2, 9, 30, 31, 2): (3, 1, 8), (1, 40, 2): (5, 2, 2)}
QUERIES = (4, 6, 2, 9)


class Match:
    """A policy that has moved away from its reference, and what was played in one step."""

    def __init__(self, make_model: Callable[..., Any], chat: Any, plain_logprobs: Any):
        self.model = make_model("llama", seed=0)
        self.reference = make_model("llama", seed=0).requires_grad_(False)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for weight in self.model.parameters():
                weight += 0.03 * torch.randn(weight.shape, generator=generator)
        self.policy = Policy(self.model, chat, self.reference)
        self.plain_logprobs = plain_logprobs

        def completion(prompt: list[int], length: int, temperature: float) -> Completion:
            tokens = torch.randint(4, len(chat.tokenizer), (length,), generator=generator).tolist()
            with torch.no_grad():
                logprobs = plain_logprobs(self.model, prompt, tokens, temperature).tolist()
            return Completion(tokens, "", logprobs, "stop")

        self.solved = Solved(
            "solver",
            [
                Group(list(p), [completion(list(p), n, SOLVER_TEMPERATURE) for n in lengths])
                for p, lengths in ANSWERS.items()
            ],
            SOLVER_TEMPERATURE,
            # Centred rewards of (1, 0, 0) and (2, 3, 7).
            torch.tensor([[2 / 3, -1 / 3, -1 / 3], [-2.0, -1.0, 3.0]]),
        )
        prompt = [1, 50, 51, 52, 53, 2]
        self.posed = Posed(
            "challenger",
            [Group(prompt, [completion(prompt, n, CHALLENGER_TEMPERATURE) for n in QUERIES])],
            CHALLENGER_TEMPERATURE,
            torch.tensor([0.5, -1.5, 2.0, -1.0]),
        )

    def naive_loss(
        self, groups: Groups, beta: float, kl: str = "k3", aggregation: str = "sequence"
    ) -> Tensor:
        """Eq. 4 and 5: -mean[(π / sg π)(completion) · A - β · KL], one sequence at a time."""
        advantages = groups.advantages.view(len(groups.groups), -1)
        rows = []
        for i, group in enumerate(groups.groups):
            played, references, penalties = [], [], []
            for c in group.completions:
                of_policy, of_reference = (
                    self.plain_logprobs(model, group.prompt, c.tokens, groups.temperature)
                    for model in (self.model, self.reference)
                )
                played.append(of_policy)
                references.append(of_reference)
                penalties.append(beta * (of_policy - of_reference).sum().item())
            for j, (p, ref) in enumerate(zip(played, references, strict=True)):
                if groups.keep is None or groups.keep[i][j]:
                    advantage = advantages[i, j]
                    if kl == "reward":
                        advantage = advantage - (penalties[j] - sum(penalties) / len(penalties))
                    rows.append((p, ref, advantage))
        num_tokens = sum(len(p) for p, _, _ in rows)
        total = torch.zeros(())
        for p, ref, advantage in rows:
            ratio = (p.sum() - p.sum().detach()).exp()
            divergence = {
                "k1": p - ref,
                "k2": (p - ref) ** 2 / 2,
                "k3": (ref - p).exp() - (ref - p) - 1,
                "reward": torch.zeros_like(p),
            }[kl].sum()
            weight = {
                "sequence": 1 / len(rows),
                "sequence_mean": 1 / (len(rows) * len(p)),
                "token_mean": 1 / num_tokens,
            }[aggregation]
            total = total - weight * (ratio * advantage - beta * divergence)
        return total

    def gradient_of(self, loss: Tensor) -> Tensor:
        return flat(torch.autograd.grad(loss, list(self.model.parameters())))


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def weights_of(model: Any) -> Tensor:
    return flat(model.parameters()).clone()


def assert_same_gradient(found: Tensor, expected: Tensor) -> None:
    assert expected.norm() > 0.01
    assert (found - expected).norm() <= GRADIENT_TOLERANCE * expected.norm()


@pytest.fixture
def match(make_model: Callable[..., Any], chat: Any, plain_logprobs: Any) -> Match:
    return Match(make_model, chat, plain_logprobs)


@pytest.fixture
def settings(make_config: Callable[..., Config]) -> Callable[..., Config]:
    """settings(kl="k2", solver_beta=0.0): gradients are not clipped, so that .grad is ∇ loss."""

    def make(
        solver_beta: float = SOLVER_BETA, challenger_beta: float = CHALLENGER_BETA, **learner: Any
    ) -> Config:
        return make_config(
            solver={"beta": solver_beta},
            challenger={"beta": challenger_beta},
            learner={"max_grad_norm": 1e9, "lr": 1e-3} | learner,
        )

    return make


def step(match: Match, config: Config, alpha: float = ALPHA) -> tuple[StepResult, Tensor]:
    """(what the step measured, its gradient). It is taken on a copy of the policy."""
    learner = WatchedLearner(
        Policy(copy.deepcopy(match.model), match.policy.chat, match.reference), config
    )
    return learner.step(match.solved, match.posed, alpha), learner.gradient


class WatchedLearner(Learner):
    """Keeps the gradient that its last step took, in one vector."""

    def __init__(self, policy: Policy, config: Config):
        super().__init__(policy, config)
        self.gradient = torch.empty(0)
        self.optimizer.adamw.register_step_pre_hook(self.keep)

    def keep(self, *_: Any) -> None:
        parameters = self.optimizer.weights.values()
        self.gradient = flat(
            torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters
        )


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("kl", KLS)
def test_the_gradient_is_that_of_the_papers_two_losses(match, settings, kl, aggregation):
    solver_loss = match.naive_loss(match.solved, SOLVER_BETA, kl, aggregation)
    challenger_loss = match.naive_loss(match.posed, CHALLENGER_BETA, kl, aggregation)
    expected = match.gradient_of(solver_loss + ALPHA * challenger_loss)
    result, found = step(match, settings(kl=kl, aggregation=aggregation))
    assert_same_gradient(found, expected)
    assert result.grad_norm == pytest.approx(expected.norm().item(), rel=1e-5)


@pytest.mark.parametrize("kl", KLS)
def test_the_loss_is_the_value_of_the_papers_two_losses(match, settings, kl):
    # With a group's advantages centred, the ratio's own term adds nothing.
    expected = match.naive_loss(match.solved, SOLVER_BETA, kl)
    expected = expected + ALPHA * match.naive_loss(match.posed, CHALLENGER_BETA, kl)
    result, _ = step(match, settings(kl=kl))
    assert result.loss == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("budget", [1, 12, 30])
def test_the_size_of_micro_batches_changes_nothing(match, settings, kl, budget):
    whole, expected = step(match, settings(kl=kl, aggregation="sequence_mean"))
    config = settings(kl=kl, aggregation="sequence_mean", tokens_per_micro_batch=budget)
    parts, found = step(match, config)
    assert_same_gradient(found, expected)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-5, abs=1e-7)
    for role in ("solver", "challenger"):
        assert parts.kl[role] == pytest.approx(whole.kl[role], rel=1e-5)
        assert parts.entropy[role] == pytest.approx(whole.entropy[role], rel=1e-5)


def test_grpo_is_the_solvers_half(match, settings):
    expected = match.gradient_of(match.naive_loss(match.solved, SOLVER_BETA))
    match.posed = None
    result, found = step(match, settings())
    assert_same_gradient(found, expected)
    assert set(result.kl) == set(result.entropy) == {"solver"}


def test_alpha_zero_is_the_solvers_half_too(match, settings):
    expected = match.gradient_of(match.naive_loss(match.solved, SOLVER_BETA))
    _, found = step(match, settings(), alpha=0.0)
    assert_same_gradient(found, expected)


def test_without_valid_queries_the_challenger_learns_alone(match, settings):
    expected = match.gradient_of(ALPHA * match.naive_loss(match.posed, CHALLENGER_BETA))
    match.solved = Solved("solver", [], SOLVER_TEMPERATURE, torch.zeros(0, 0))
    result, found = step(match, settings())
    assert_same_gradient(found, expected)
    assert set(result.kl) == {"challenger"}


@pytest.mark.parametrize("kl", ["k3", "reward"])
def test_a_step_in_which_nothing_was_played_moves_nothing(match, settings, kl):
    match.solved = Solved("solver", [], SOLVER_TEMPERATURE, torch.zeros(0, 0))
    prompt = match.posed.groups[0].prompt
    match.posed = Posed("challenger", [Group(prompt, [])], 1.0, torch.zeros(0))
    before = weights_of(match.model)
    result = Learner(match.policy, settings(kl=kl)).step(match.solved, match.posed, ALPHA)
    assert torch.equal(weights_of(match.model), before)
    assert (result.loss, result.grad_norm) == (0.0, 0.0)


KEEP = [[True, False, True], [False, True, True]]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_masked_answers_leave_the_loss_and_its_counts(match, settings, aggregation):
    match.posed = None
    match.solved.keep = KEEP
    expected = match.gradient_of(match.naive_loss(match.solved, SOLVER_BETA, "k3", aggregation))
    _, found = step(match, settings(aggregation=aggregation))
    assert_same_gradient(found, expected)


def test_masked_answers_have_no_gradient(match, settings):
    match.posed = None
    match.solved.keep = KEEP
    _, expected = step(match, settings())
    for i, j in ((0, 1), (1, 0)):
        match.solved.advantages[i, j] = 100.0
        replaced = match.solved.groups[i].completions[j]._replace(tokens=[70, 71, 72])
        match.solved.groups[i].completions[j] = replaced
    _, found = step(match, settings())
    assert_same_gradient(found, expected)


@pytest.mark.parametrize("kl", KLS)
def test_padding_however_far_from_the_reference_has_no_gradient(
    make_markov_model, chat, settings, plain_logprobs, kl
):
    # What would follow the stop token was never trained: here the reference is sure of padding and
    # the policy of "b", so that the padding's r is 138 and exp(r) exceeds float32.
    a, end = chat.tokenizer.convert_tokens_to_ids(["a", "<|end|>"])
    stops = {"a": {"<|end|>": 0.5, "a": 0.5}, "<|end|>": {"b": 1.0}}
    pads = {"a": {"<|end|>": 0.8, "a": 0.2}, "<|end|>": {"<|pad|>": 1.0}}
    match = Match.__new__(Match)
    match.plain_logprobs = plain_logprobs
    match.model, match.reference = make_markov_model(stops), make_markov_model(pads)
    match.policy = Policy(match.model, chat, match.reference.requires_grad_(False))
    with torch.no_grad():
        played = [
            Completion(tokens, "", plain_logprobs(match.model, [a], tokens, 0.5).tolist(), "stop")
            for tokens in ([end], [a, a, end])
        ]
    match.posed, advantages = None, torch.tensor([[1.0, -1.0]])
    match.solved = Solved("solver", [Group([a], played)], 0.5, advantages)
    expected = match.gradient_of(match.naive_loss(match.solved, SOLVER_BETA, kl))
    _, found = step(match, settings(kl=kl))
    assert_same_gradient(found, expected)


def test_kl_in_the_reward_is_centred_over_masked_answers_too(match, settings):
    # As their rewards are: what is masked stays part of the group's baseline.
    match.posed = None
    match.solved.keep = KEEP
    expected = match.gradient_of(match.naive_loss(match.solved, SOLVER_BETA, "reward"))
    _, found = step(match, settings(kl="reward"))
    assert_same_gradient(found, expected)


@pytest.mark.parametrize("budget", [12, 10_000])
def test_kl_in_the_reward_takes_each_completion_through_the_reference_once(match, settings, budget):
    match.posed = None
    result, _ = step(match, settings(kl="reward", tokens_per_micro_batch=budget))
    expected = watched_passes(match, settings(kl="reward", tokens_per_micro_batch=budget))
    # Those that are masked from the loss count in the centring, so they are computed as well; the others
    # are not computed again.
    match.solved.keep = KEEP
    found = watched_passes(match, settings(kl="reward", tokens_per_micro_batch=budget))
    assert found == expected
    assert (len(found) == 1) == (budget == 10_000)
    # What is recorded is of the completions that are kept, with this mask and without.
    masked, _ = step(match, settings(kl="reward", tokens_per_micro_batch=budget))
    assert masked.kl["solver"] == pytest.approx(step(match, settings())[0].kl["solver"], rel=1e-4)
    assert masked.kl["solver"] != pytest.approx(result.kl["solver"], rel=1e-2)


def watched_passes(match: Match, config: Config) -> list[int]:
    """Tokens of each pass of the reference in one step."""
    passes: list[int] = []
    count = match.reference.get_input_embeddings().register_forward_hook(
        lambda module, args, output: passes.append(args[0].numel())
    )
    step(match, config)
    count.remove()
    return passes


@pytest.mark.parametrize("kl", KLS)
def test_zero_advantages_and_no_kl_have_no_gradient(match, settings, kl):
    match.solved.advantages.zero_()
    match.posed.advantages.zero_()
    _, found = step(match, settings(0.0, 0.0, kl=kl))
    assert found.abs().max() <= ZERO_TOLERANCE


@pytest.mark.parametrize("kl", KLS)
def test_without_beta_no_estimator_matters(match, settings, kl):
    expected = match.gradient_of(
        match.naive_loss(match.solved, 0.0) + ALPHA * match.naive_loss(match.posed, 0.0)
    )
    _, found = step(match, settings(0.0, 0.0, kl=kl))
    assert_same_gradient(found, expected)


def test_a_role_without_a_kl_term_has_no_pass_of_the_reference(match, settings):
    passes = []
    match.reference.register_forward_pre_hook(lambda *_: passes.append(1))
    result, _ = step(match, settings(solver_beta=0.0))
    assert list(result.kl) == ["challenger"]
    of_challenger = len(passes)
    step(match, settings(challenger_beta=0.0))
    of_solver = len(passes) - of_challenger
    assert (of_challenger, of_solver) == (1, 1)
    step(match, settings(0.0, 0.0))
    assert len(passes) == of_challenger + of_solver


def test_without_a_reference_there_is_a_policy_gradient_and_no_kl(match, settings):
    expected = match.gradient_of(match.naive_loss(match.solved, 0.0))
    match.reference = match.posed = None
    result, found = step(match, settings(0.0, 0.0))
    assert_same_gradient(found, expected)
    assert result.kl == {}


@pytest.mark.parametrize("kl", KLS)
def test_the_recorded_kl_is_k3_a_token_whichever_estimator_trains(match, settings, kl):
    result, _ = step(match, settings(kl=kl))
    for groups in (match.solved, match.posed):
        # With A = 0, β = 1 and token_mean the naive loss is the mean of k3 over tokens.
        silent = copy.copy(groups)
        silent.advantages = torch.zeros_like(groups.advantages)
        expected = match.naive_loss(silent, 1.0, "k3", "token_mean").item()
        assert expected > 0.001
        assert result.kl[groups.role] == pytest.approx(expected, rel=1e-4)


def test_the_recorded_entropy_is_the_mean_surprise_of_a_token(match, settings):
    result, _ = step(match, settings())
    for groups in (match.solved, match.posed):
        logprobs = [p for c in groups.completions() for p in c.logprobs]
        assert result.entropy[groups.role] == pytest.approx(-sum(logprobs) / len(logprobs), 1e-5)


def shift_sampled(groups: Groups, shift: float, group: int, completion: int) -> None:
    """The sampler says that a completion's tokens were likelier by `shift` nats each."""
    completions = groups.groups[group].completions
    old = completions[completion]
    completions[completion] = old._replace(logprobs=[p + shift for p in old.logprobs])


def test_the_recorded_difference_is_the_mean_distance_of_the_log_probs(match, settings):
    shift_sampled(match.solved, 0.5, 0, 1)  # 1 token
    shift_sampled(match.posed, -0.25, 0, 3)  # 9 tokens
    result, _ = step(match, settings())
    # (1 · 0.5 + 9 · 0.25) / (12 + 9 + 21 tokens) = 2.75 / 42
    assert result.logprob_difference == pytest.approx(0.0654762, abs=1e-5)
    assert result.capped_fraction is None


# A completion that the sampler found half as likely, token by token, counts twice; capped, 1.5 times.
@pytest.mark.parametrize(("cap", "weight", "capped"), [(4.0, 2.0, 0.0), (1.5, 1.5, 8 / 42)])
def test_importance_weights_multiply_what_a_completion_teaches(
    match, settings, cap, weight, capped
):
    no_kl = {"solver_beta": 0.0, "challenger_beta": 0.0}
    scaled = match.solved.advantages.clone()
    scaled[0, 2] *= weight
    unscaled, match.solved.advantages = match.solved.advantages, scaled
    _, expected = step(match, settings(**no_kl))
    match.solved.advantages = unscaled
    shift_sampled(match.solved, -math.log(2), 0, 2)  # 8 tokens
    result, gradient = step(match, settings(**no_kl, importance_cap=cap))
    assert_same_gradient(gradient, expected)
    assert result.capped_fraction == pytest.approx(capped)


def test_importance_weights_weigh_the_kl_too(match, settings):
    for g, group in enumerate(match.solved.groups):
        for k in range(len(group.completions)):
            shift_sampled(match.solved, -math.log(2), g, k)
    match.posed = None
    _, once = step(match, settings())
    _, twice = step(match, settings(importance_cap=4.0))
    assert_same_gradient(twice, 2 * once)


def test_by_default_vllms_terms_are_weighted_and_the_policys_own_are_not(make_config):
    assert make_config().importance_cap == 0
    assert make_config(rollout={"engine": "vllm"}).importance_cap == 2
    config = make_config(rollout={"engine": "vllm"}, learner={"importance_cap": 0})
    assert config.importance_cap == 0


def test_a_sampler_too_far_from_the_trainer_teaches_nothing(match, settings):
    for k in range(len(QUERIES)):
        shift_sampled(match.posed, 0.3, 0, k)  # 21 of 42 tokens: 0.15 a token
    before = weights_of(match.model)
    rollout = {"engine": "vllm", "vllm": {"max_logprob_difference": 0.1}}
    config = settings().model_copy(update={"rollout": Rollout.model_validate(rollout)})
    learner = Learner(match.policy, config)
    with pytest.raises(
        SamplerError, match=r"by 0\.15 nats a token .*max_logprob_difference = 0\.1;"
    ):
        learner.step(match.solved, match.posed, ALPHA)
    assert torch.equal(weights_of(match.model), before)
    assert not any(state.any() for state in learner.optimizer.state().values())  # moments, steps
    assert all(p.grad is None for p in match.model.parameters())
    rollout["vllm"] = {"max_logprob_difference": 0.16}
    config = settings().model_copy(update={"rollout": Rollout.model_validate(rollout)})
    Learner(match.policy, config).step(match.solved, match.posed, ALPHA)
    assert not torch.equal(weights_of(match.model), before)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_changes_no_weight(match, settings, bad):
    match.solved.advantages[0, 0] = bad
    learner = Learner(match.policy, settings())
    before = weights_of(match.model)
    with pytest.raises(NonFiniteError, match="update was not made"):
        learner.step(match.solved, match.posed, ALPHA)
    assert torch.equal(weights_of(match.model), before)
    assert not any(state.any() for state in learner.optimizer.state().values())  # moments, steps


def test_a_step_after_a_failed_one_starts_from_clean_gradients(match, settings):
    expected = match.gradient_of(match.naive_loss(match.solved, SOLVER_BETA))
    learner = WatchedLearner(match.policy, settings())
    good = match.solved.advantages.clone()
    match.solved.advantages[0, 0] = math.nan
    with pytest.raises(NonFiniteError):
        learner.step(match.solved, None, ALPHA)
    match.solved.advantages = good
    learner.step(match.solved, None, ALPHA)
    assert_same_gradient(learner.gradient, expected)


def test_adamw_moves_each_weight_against_its_gradient(match, settings):
    before = weights_of(match.model)
    learner = WatchedLearner(match.policy, settings(lr=1e-3))
    learner.step(match.solved, match.posed, ALPHA)
    slope, moved = learner.gradient, weights_of(match.model) - before
    # AdamW's first step is -lr · g / (|g| + 1e-8).
    clear = slope.abs() > 1e-4
    assert clear.sum() > 1_000
    assert_close(moved[clear], -1e-3 * slope[clear].sign(), rtol=2e-3, atol=1e-7)
    assert torch.equal(moved[slope == 0], torch.zeros_like(moved[slope == 0]))


def test_a_step_makes_good_answers_likelier_and_bad_ones_less_likely(match, settings):
    def logprob(j: int) -> float:
        tokens = group.completions[j].tokens
        with torch.no_grad():
            return match.plain_logprobs(match.model, group.prompt, tokens, 0.8).sum().item()

    group = match.solved.groups[1]
    match.solved.advantages = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, -1.0]])
    good, bad = logprob(0), logprob(2)
    Learner(match.policy, settings(0.0, lr=1e-3)).step(match.solved, None, 0.0)
    assert logprob(0) > good + 0.01
    assert logprob(2) < bad - 0.01


def test_kl_steps_bring_the_policy_back_to_its_reference(match, settings):
    match.solved.advantages.zero_()
    learner = Learner(match.policy, settings(lr=1e-3))
    kls = [learner.step(match.solved, None, 0.0).kl["solver"] for _ in range(10)]
    assert kls[-1] < 0.7 * kls[0]


def test_gradients_are_clipped_to_their_norm(match, settings):
    result, unclipped = step(match, settings())
    clipped_result, clipped = step(match, settings(max_grad_norm=0.01))
    assert clipped.norm().item() == pytest.approx(0.01, rel=1e-3)
    assert_close(clipped / clipped.norm(), unclipped / unclipped.norm(), rtol=1e-4, atol=1e-7)
    # The record is of the gradient before clipping.
    assert clipped_result.grad_norm == pytest.approx(result.grad_norm, rel=1e-5)


def test_gradients_take_no_memory_after_the_step(match, settings):
    Learner(match.policy, settings()).step(match.solved, match.posed, ALPHA)
    assert [p for p in match.model.parameters() if p.grad is not None] == []


def test_the_reference_is_never_trained(match, settings):
    before = weights_of(match.reference)
    Learner(match.policy, settings()).step(match.solved, match.posed, ALPHA)
    assert torch.equal(weights_of(match.reference), before)


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("again", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("kind", OUT_OF_MEMORY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_backward_pass_without_memory_is_taken_anew_and_nothing_counts_twice(
    match, settings, dtype, kind, again
):
    def learner(budget: int) -> WatchedLearner:
        model, reference = copy.deepcopy(match.model), copy.deepcopy(match.reference)
        policy = Policy(model.to(dtype), match.policy.chat, reference.to(dtype))
        config = settings(tokens_per_micro_batch=budget, gradient_checkpointing=again)
        return WatchedLearner(policy, config)

    disturbed, calls, added = learner(30), iter(range(100)), []

    def limited(gradient: Tensor) -> None:
        # The second micro-batch gets as far as the first layer: the gradients of the first one, and of
        # the layers behind this one, have been added up.
        if next(calls) == 1:
            added.append(disturbed.optimizer.weights["lm_head.weight"].grad.norm())
            raise OUT_OF_MEMORY[kind]

    first_layer = disturbed.policy.model.model.layers[0]
    first_layer.self_attn.q_proj.weight.register_hook(limited)
    retried = disturbed.step(match.solved, match.posed, ALPHA)
    assert added[0] > 0.01
    halved = disturbed.tokens_per_micro_batch
    assert halved < 30
    # Bit for bit what these smaller micro-batches give by themselves,
    alone = learner(halved)
    assert vars(alone.step(match.solved, match.posed, ALPHA)) == vars(retried)
    assert torch.equal(disturbed.gradient, alone.gradient)
    # and but for rounding what the larger ones give: in bfloat16 to 2^-9 in each of many steps.
    whole = learner(30)
    result = whole.step(match.solved, match.posed, ALPHA)
    tolerance = GRADIENT_TOLERANCE if dtype == torch.float32 else 0.05
    assert whole.gradient.norm() > 0.01
    difference = (disturbed.gradient - whole.gradient).norm()
    assert difference <= tolerance * whole.gradient.norm()
    for name in ("loss", "grad_norm", "kl", "entropy"):
        expected = pytest.approx(getattr(result, name), rel=tolerance, abs=1e-6)
        assert getattr(retried, name) == expected, name


def test_an_update_without_room_is_not_begun(match, settings, monkeypatch):
    learner = Learner(match.policy, settings())
    before, begun, refused = weights_of(match.model), [], []
    learner.before_update = lambda: begun.append(True)

    def full(*_: Any, **__: Any) -> Tensor:
        refused.append(True)
        raise OUT_OF_MEMORY["torch"]

    with monkeypatch.context() as patch:
        patch.setattr("language_self_play.optimizer.torch.empty_like", full)
        with pytest.raises(MemoryLimitError, match=r"^cpu has no memory left to compute an update"):
            learner.step(match.solved, match.posed, ALPHA)
    assert (len(refused), begun) == (2, [])
    assert torch.equal(weights_of(match.model), before)
    learner.step(match.solved, match.posed, ALPHA)
    assert not torch.equal(weights_of(match.model), before)
    assert begun == [True]


def test_an_update_that_finds_room_once_the_allocator_has_tidied_up_is_made(
    match, settings, monkeypatch
):
    learner, calls = Learner(match.policy, settings()), []
    before, empty_like = weights_of(match.model), torch.empty_like

    def full_once(*args: Any, **options: Any) -> Tensor:
        calls.append(True)
        if len(calls) == 1:
            raise OUT_OF_MEMORY["cpu"]
        return empty_like(*args, **options)

    monkeypatch.setattr("language_self_play.optimizer.torch.empty_like", full_once)
    learner.step(match.solved, match.posed, ALPHA)
    assert len(calls) > 1
    assert not torch.equal(weights_of(match.model), before)
