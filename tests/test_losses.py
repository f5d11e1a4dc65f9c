"""Losses: each gradient against its target, by enumeration of a tiny language in float64.

The language has sequences of two tokens over V = 3; the second token's logits depend on the first.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from language_self_play.losses import (
    aggregate,
    importance_weights,
    kl_terms,
    policy_gradient,
)

V = 3
SEQUENCES = list(product(range(V), repeat=2))
RTOL, ATOL = 1e-9, 1e-12


def random_logits(seed: int) -> Tensor:
    """Logits of a language: row 0 for the first token, row 1 + v for the one after v."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1 + V, V, dtype=torch.float64, generator=generator)


@pytest.fixture
def policy() -> Tensor:
    return random_logits(0).requires_grad_()


@pytest.fixture
def reference() -> Tensor:
    return random_logits(1)


def sequence_logprobs(logits: Tensor) -> Tensor:
    """Log-probs of all sequences' tokens, (V², 2)."""
    table = logits.log_softmax(-1)
    return torch.stack([torch.stack([table[0, a], table[1 + a, b]]) for a, b in SEQUENCES])


def expected_gradient(policy: Tensor, terms_KT: Tensor, logprobs_KT: Tensor) -> Tensor:
    """∇ of the terms' sum over a sequence, averaged over sequences from the (detached) policy."""
    weights = logprobs_KT.sum(-1).exp().detach()
    return torch.autograd.grad((weights * terms_KT.sum(-1)).sum(), policy)[0]


def kl_of_states(p: Tensor, q: Tensor) -> Tensor:
    """KL(p‖q) in each of the four states, from their logits."""
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def visits(policy: Tensor) -> Tensor:
    """How often the policy visits each state in a sequence: the first one always."""
    first = policy[0].softmax(-1).detach()
    return torch.cat([torch.ones(1, dtype=first.dtype), first])


def test_policy_gradient_has_gradient_minus_advantage_times_gradient_of_logprob(policy):
    logprobs = sequence_logprobs(policy)
    advantages = torch.linspace(-2.0, 3.0, len(SEQUENCES), dtype=torch.float64)
    for k in range(len(SEQUENCES)):
        loss = policy_gradient(logprobs[k : k + 1], advantages[k : k + 1]).sum()
        (gradient,) = torch.autograd.grad(loss, policy, retain_graph=True)
        (of_logprob,) = torch.autograd.grad(logprobs[k].sum(), policy, retain_graph=True)
        assert of_logprob.abs().max() > 0.01
        assert_close(gradient, -advantages[k] * of_logprob, rtol=RTOL, atol=ATOL)


def test_policy_gradient_on_average_climbs_the_expected_reward(policy):
    logprobs = sequence_logprobs(policy)
    rewards = torch.linspace(-2.0, 3.0, len(SEQUENCES), dtype=torch.float64)
    expected_reward = (logprobs.sum(-1).exp() * rewards).sum()
    (climb,) = torch.autograd.grad(expected_reward, policy, retain_graph=True)
    terms = policy_gradient(logprobs, rewards)
    assert_close(expected_gradient(policy, terms, logprobs), -climb, rtol=RTOL, atol=ATOL)


def test_policy_gradient_is_zero_in_value():
    logprobs = torch.tensor([[-1.0, -2.0]])
    assert policy_gradient(logprobs, torch.tensor([5.0])).tolist() == [[0.0, 0.0]]


def test_kl_terms_by_hand():
    # r = log 2, log 1, log 1/4; k3 = exp(r) - r - 1.
    policy_logprobs = torch.tensor([[0.25, 0.5, 0.8]]).log()
    reference_logprobs = torch.tensor([[0.5, 0.5, 0.2]]).log()
    k1 = torch.tensor([[-0.693147, 0.0, 1.386294]])
    k2 = torch.tensor([[0.240227, 0.0, 0.960906]])  # 0.693147² / 2, 1.386294² / 2
    k3 = torch.tensor([[0.306853, 0.0, 0.636294]])  # 2 - 0.693147 - 1, 0.25 + 1.386294 - 1
    for estimator, expected in (("k1", k1), ("k2", k2), ("k3", k3)):
        terms = kl_terms(policy_logprobs, reference_logprobs, estimator)
        assert_close(terms, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_have_the_kl_from_the_policy_as_mean(policy, reference, estimator):
    logprobs = sequence_logprobs(policy)
    terms = kl_terms(logprobs, sequence_logprobs(reference), estimator)
    mean = (logprobs.sum(-1).exp() * terms.sum(-1)).sum()
    expected = (visits(policy) * kl_of_states(policy, reference)).sum()
    assert expected > 0.1
    assert_close(mean, expected, rtol=RTOL, atol=ATOL)


def test_k1_has_no_gradient_on_average_but_noise_on_each_sample(policy, reference):
    logprobs = sequence_logprobs(policy)
    terms = kl_terms(logprobs, sequence_logprobs(reference), "k1")
    (on_one_sample,) = torch.autograd.grad(terms[0].sum(), policy, retain_graph=True)
    assert on_one_sample.abs().max() > 0.1
    gradient = expected_gradient(policy, terms, logprobs)
    assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=ATOL)


def test_k2_descends_the_kl_from_the_policy_in_each_visited_state(policy, reference):
    logprobs = sequence_logprobs(policy)
    terms = kl_terms(logprobs, sequence_logprobs(reference), "k2")
    target = (visits(policy) * kl_of_states(policy, reference)).sum()
    (expected,) = torch.autograd.grad(target, policy, retain_graph=True)
    assert expected.abs().max() > 0.1
    assert_close(expected_gradient(policy, terms, logprobs), expected, rtol=RTOL, atol=ATOL)


def test_k2_of_whole_sequences_descends_the_kl_of_whole_sequences(policy, reference):
    logprobs = sequence_logprobs(policy).sum(-1, keepdim=True)
    reference_logprobs = sequence_logprobs(reference).sum(-1, keepdim=True)
    terms = kl_terms(logprobs, reference_logprobs, "k2")
    kl = (logprobs.exp() * (logprobs - reference_logprobs)).sum()
    (expected,) = torch.autograd.grad(kl, policy, retain_graph=True)
    assert_close(expected_gradient(policy, terms, logprobs), expected, rtol=RTOL, atol=ATOL)


def test_k3_descends_the_kl_from_the_reference_in_each_visited_state(policy, reference):
    logprobs = sequence_logprobs(policy)
    terms = kl_terms(logprobs, sequence_logprobs(reference), "k3")
    target = (visits(policy) * kl_of_states(reference, policy)).sum()
    (expected,) = torch.autograd.grad(target, policy, retain_graph=True)
    assert expected.abs().max() > 0.1
    assert_close(expected_gradient(policy, terms, logprobs), expected, rtol=RTOL, atol=ATOL)


def test_policy_gradient_and_kl_add_up_to_reward_and_beta_times_kl(policy, reference):
    beta = 0.3
    logprobs = sequence_logprobs(policy)
    rewards = torch.linspace(-2.0, 3.0, len(SEQUENCES), dtype=torch.float64)
    terms = policy_gradient(logprobs, rewards)
    terms = terms + beta * kl_terms(logprobs, sequence_logprobs(reference), "k3")
    target = -(logprobs.sum(-1).exp() * rewards).sum()
    target = target + beta * (visits(policy) * kl_of_states(reference, policy)).sum()
    (expected,) = torch.autograd.grad(target, policy, retain_graph=True)
    assert_close(expected_gradient(policy, terms, logprobs), expected, rtol=RTOL, atol=ATOL)


def test_importance_weights_by_hand():
    # π = 0.5, 0.3, 0.9 and μ = 0.4, 0.6, 0.1: 1.25, 0.5, and 9 cut to 2.
    weights = importance_weights(
        torch.tensor([[0.5, 0.3, 0.9]]).log(), torch.tensor([[0.4, 0.6, 0.1]]).log(), 2.0
    )
    assert_close(weights, torch.tensor([[1.25, 0.5, 2.0]]))


def test_importance_weights_make_the_gradient_on_another_samplers_draws_the_policys(
    policy, reference
):
    # Completions of one token: drawn from the reference, learned by the policy.
    rewards = torch.tensor([-2.0, 1.0, 3.0], dtype=torch.float64)
    logprobs_KT = policy.log_softmax(-1)[0][:, None]
    sampled_KT = reference.log_softmax(-1)[0][:, None]
    weights = importance_weights(logprobs_KT, sampled_KT, 1e9)
    assert not weights.requires_grad
    terms = weights * policy_gradient(logprobs_KT, rewards)
    (target,) = torch.autograd.grad(
        -(logprobs_KT.exp().squeeze(-1) * rewards).sum(), policy, retain_graph=True
    )
    assert target.abs().max() > 0.1
    assert_close(expected_gradient(policy, terms, sampled_KT), target, rtol=RTOL, atol=ATOL)


def test_unknown_kl_estimator_is_refused():
    with pytest.raises(ValueError, match=r"'k4'.*k1, k2, k3"):
        kl_terms(torch.zeros(1, 1), torch.zeros(1, 1), "k4")


TERMS = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 99.0], [32.0, 99.0, 99.0]])
MASK = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("sequence", 21.0),  # (7 + 24 + 32) / 3
        ("sequence_mean", 15.4444444),  # (7/3 + 24/2 + 32/1) / 3
        ("token_mean", 10.5),  # 63 / 6
    ],
)
def test_aggregation_by_hand(mode, expected):
    assert_close(aggregate(TERMS, MASK, mode, 3, 6), torch.tensor(expected))


@pytest.mark.parametrize("mode", ["sequence", "sequence_mean", "token_mean"])
def test_micro_batches_add_up_to_the_whole(mode):
    whole = aggregate(TERMS, MASK, mode, 3, 6)
    parts = [aggregate(TERMS[k : k + 1], MASK[k : k + 1], mode, 3, 6) for k in range(3)]
    assert_close(sum(parts), whole)


def test_unknown_aggregation_is_refused():
    with pytest.raises(ValueError, match="'mean'"):
        aggregate(TERMS, MASK, "mean", 3, 6)
