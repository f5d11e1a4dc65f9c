"""Shared prompts, padding and micro-batches change neither log-probs nor gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from language_self_play import forward
from language_self_play.forward import (
    PLAIN,
    ForwardPath,
    checkpointed_layers,
    choose_path,
    completion_logprobs,
)
from language_self_play.packing import MicroBatch, micro_batches
from language_self_play.types import Completion, Group, Groups

CPU = torch.device("cpu")
TEMPERATURE = 0.7
LOGPROB_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-5
PROMPT_LENGTHS = (2, 9, 6)
# With windows of 5 tokens: completions that end inside, at and beyond a window.
COMPLETION_LENGTHS = ((1, 4, 11), (3, 3, 3), (7, 2, 1))


LEAN = ForwardPath()
PATHS = [ForwardPath(p, h) for p in (True, False) for h in (True, False)]


@pytest.fixture
def groups(tokenizer: Any) -> Groups:
    """Random tokens, pad tokens among them; every completion weighs differently in the loss."""
    generator = torch.Generator().manual_seed(0)

    def random_tokens(length: int) -> list[int]:
        return torch.randint(len(tokenizer), (length,), generator=generator).tolist()

    played = [
        Group(
            random_tokens(prompt),
            [Completion(random_tokens(n), "", [0.0] * n, "stop") for n in lengths],
        )
        for prompt, lengths in zip(PROMPT_LENGTHS, COMPLETION_LENGTHS, strict=True)
    ]
    advantages = torch.randn(3, 3, generator=generator)
    return Groups("solver", played, TEMPERATURE, advantages)


def unpacked(batch: MicroBatch, logprobs_BKT: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(index, log-probs of its tokens) of each completion in the batch."""
    for b, k in torch.cartesian_prod(*map(torch.arange, batch.index_BK.shape)).tolist():
        yield batch.index_BK[b, k].item(), logprobs_BKT[b, k][batch.mask_BKT[b, k]]


def packed_logprobs(
    model: Any, groups: Groups, budget: int, pad_id: int = 0, path: ForwardPath = LEAN
) -> list[Tensor]:
    found = {}
    for batch in micro_batches(groups, budget, pad_id, CPU, path.shared_prompt):
        found.update(unpacked(batch, completion_logprobs(model, batch, groups.temperature, path)))
    return [found[i] for i in range(len(found))]


def gradient(model: Any, groups: Groups, logprobs: list[Tensor]) -> Tensor:
    """Gradient of Σ_k w_k Σ_t (log p_kt)², all weights in one vector."""
    weights = groups.advantages.flatten()
    loss = sum(w * p.square().sum() for w, p in zip(weights, logprobs, strict=True))
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat(
        [
            (torch.zeros_like(p) if g is None else g).flatten()
            for p, g in zip(parameters, found, strict=True)
        ]
    )


def assert_same(model: Any, groups: Groups, found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, rtol=0, atol=LOGPROB_TOLERANCE)
    assert torch.cat(expected).std() > 0.3  # otherwise any model would do
    wanted = gradient(model, groups, expected)
    difference = gradient(model, groups, found) - wanted
    assert difference.norm() <= GRADIENT_TOLERANCE * wanted.norm()


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_every_path_gives_what_one_sequence_at_a_time_gives(
    any_model: Any, groups: Groups, plain_logprobs: Callable[..., Tensor], path: ForwardPath
):
    expected = [
        plain_logprobs(any_model, group.prompt, completion.tokens, TEMPERATURE)
        for group in groups.groups
        for completion in group.completions
    ]
    found = packed_logprobs(any_model, groups, 10_000, path=path)
    assert_same(any_model, groups, found, expected)


def test_every_architecture_takes_the_leanest_path_without_a_warning(any_model: Any):
    assert choose_path(any_model) == ForwardPath(shared_prompt=True, separate_head=True)


def test_a_model_whose_logits_need_more_than_hidden_states_keeps_its_own(tiny_llama: Any):
    # Its logits depend on the tokens, too: a head alone can't know them.
    plain = type(tiny_llama).forward

    def forward(self, input_ids=None, **inputs):
        output = plain(self, input_ids=input_ids, **inputs)
        keep = output.logits.shape[1]
        output.logits = output.logits * (1 + 0.1 * input_ids[:, -keep:, None])
        return output

    tiny_llama.forward = forward.__get__(tiny_llama)
    with pytest.warns(UserWarning, match="gives no logits for hidden states alone"):
        path = choose_path(tiny_llama)
    assert path == ForwardPath(shared_prompt=True, separate_head=False)


def test_a_model_of_another_kind_of_attention_gets_whole_sequences():
    import transformers

    # Bloom biases scores by distance in the sequence, of which a packed group knows nothing.
    torch.manual_seed(0)
    config = transformers.BloomConfig(
        vocab_size=107, hidden_size=16, n_layer=2, n_head=2, initializer_range=0.2
    )
    with pytest.warns(UserWarning, match="knows no shared prompts, so in learning"):
        path = choose_path(transformers.BloomForCausalLM(config).eval())
    assert path == ForwardPath(shared_prompt=False, separate_head=True)


@pytest.mark.parametrize("logits_at_once", [1, 5 * 86, 10**9])
def test_logits_in_pieces_are_the_logits(
    any_model: Any, groups: Groups, monkeypatch: pytest.MonkeyPatch, logits_at_once: int
):
    whole = packed_logprobs(any_model, groups, 10_000, path=PLAIN)
    monkeypatch.setattr(forward, "LOGITS_AT_ONCE", logits_at_once)
    assert_same(any_model, groups, packed_logprobs(any_model, groups, 10_000), whole)


def test_no_more_logits_exist_at_once_than_allowed(
    tiny_llama: Any, groups: Groups, monkeypatch: pytest.MonkeyPatch
):
    vocabulary = tiny_llama.config.vocab_size
    monkeypatch.setattr(forward, "LOGITS_AT_ONCE", 4 * vocabulary)
    rows = []
    tiny_llama.lm_head.register_forward_hook(lambda *call: rows.append(call[2].shape[-2]))
    packed_logprobs(tiny_llama, groups, 10_000)
    # 35 completion tokens, none of the 17 prompt tokens and none of the padding.
    assert (max(rows), sum(rows)) == (4, 35)


def test_checkpointed_layers_change_neither_log_probs_nor_gradients(any_model: Any, groups: Groups):
    whole = ForwardPath(shared_prompt=False)
    expected = packed_logprobs(any_model, groups, 10_000, path=whole)
    with checkpointed_layers(any_model, True):
        found = packed_logprobs(any_model, groups, 10_000, path=whole)
    assert not any(module.training for module in any_model.modules())
    assert_same(any_model, groups, found, expected)


def test_checkpointed_layers_are_computed_again_for_the_gradient(tiny_llama: Any, groups: Groups):
    calls = []
    norm = tiny_llama.model.layers[0].input_layernorm
    norm.register_forward_hook(lambda *call: calls.append(1))
    for active, expected in ((False, 1), (True, 2)):
        calls.clear()
        with checkpointed_layers(tiny_llama, active):
            found = packed_logprobs(tiny_llama, groups, 10_000, path=ForwardPath(False))
        torch.cat(found).sum().backward()
        assert len(calls) == expected


# 1 is a completion at a time; 30 cuts groups; 80 joins some.
@pytest.mark.parametrize("budget", [1, 30, 80])
def test_the_size_of_micro_batches_changes_nothing(any_model: Any, groups: Groups, budget: int):
    whole = packed_logprobs(any_model, groups, 10_000)
    assert_same(any_model, groups, packed_logprobs(any_model, groups, budget), whole)


def test_what_stands_in_the_padding_changes_nothing(any_model: Any, groups: Groups):
    zeros = packed_logprobs(any_model, groups, 10_000, pad_id=0)
    sevens = packed_logprobs(any_model, groups, 10_000, pad_id=7)
    assert_same(any_model, groups, sevens, zeros)


def test_completions_of_one_token_need_no_second_pass(
    tiny_llama: Any, plain_logprobs: Callable[..., Tensor]
):
    prompt = [5, 6, 7]
    group = Group(prompt, [Completion([t], "", [0.0], "stop") for t in (10, 11)])
    groups = Groups("solver", [group], TEMPERATURE, torch.tensor([[1.0, -1.0]]))
    expected = [plain_logprobs(tiny_llama, prompt, [t], TEMPERATURE) for t in (10, 11)]
    assert_same(tiny_llama, groups, packed_logprobs(tiny_llama, groups, 100), expected)


def test_completions_of_a_group_do_not_see_each_other(tiny_llama: Any, groups: Groups):
    before = packed_logprobs(tiny_llama, groups, 10_000)
    first, second, *others = groups.groups[0].completions
    changed = second._replace(tokens=[t + 1 for t in second.tokens])
    groups.groups[0] = groups.groups[0]._replace(completions=[first, changed, *others])
    after = packed_logprobs(tiny_llama, groups, 10_000)
    differences = [(a - b).abs().max().item() for a, b in zip(after, before, strict=True)]
    assert differences[1] > 0.1
    assert max(differences[:1] + differences[2:]) <= LOGPROB_TOLERANCE
