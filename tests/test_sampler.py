"""The in-process sampler: what it draws, where it stops, and that its log-probs are the trainer's."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from language_self_play import prefill
from language_self_play.chat import Chat
from language_self_play.config import Sampling
from language_self_play.forward import completion_logprobs
from language_self_play.packing import micro_batches
from language_self_play.sampling import transformers
from language_self_play.sampling.transformers import TransformersSampler
from language_self_play.types import Group, Groups

LOGPROB_TOLERANCE = 1e-5
PROMPTS = [[1, 20, 21, 2], [1, 30, 31, 32, 33, 34, 35, 36, 2], [1, 2], [1, 40, 41, 42, 43, 2]]


def sample(
    model: Any,
    chat: Chat,
    prompts: list[list[int]] = PROMPTS,
    n: int = 3,
    max_tokens: int = 12,
    *,
    batch_size: int = 64,
    seed: int = 0,
    step: int = 0,
    role: str = "solver",
    **settings: float,
) -> list[Group]:
    sampler = TransformersSampler(model, chat, seed, batch_size)
    sampler.sync(model, step)
    return sampler.sample(prompts, n, role, Sampling(**settings), max_tokens)


def tokens_of(groups: list[Group]) -> list[list[list[int]]]:
    return [[c.tokens for c in g.completions] for g in groups]


def logprobs_of(groups: list[Group]) -> Tensor:
    return torch.tensor([p for g in groups for c in g.completions for p in c.logprobs])


def trainer_logprobs(model: Any, groups: list[Group], temperature: float) -> Tensor:
    """The trainer's log-probs of the same tokens, in the same order."""
    size = len(groups), len(groups[0].completions)
    solved = Groups("solver", groups, temperature, torch.zeros(size))
    [batch] = micro_batches(solved, 1_000_000, 0, model.device)
    with torch.no_grad():
        logprobs = completion_logprobs(model, batch, temperature).flatten(0, 1)
    mask, order = batch.mask_BKT.flatten(0, 1), batch.index_BK.flatten().argsort()
    return torch.cat([logprobs[row][mask[row]] for row in order])


def test_the_samplers_logprobs_are_the_trainers(any_model: Any, chat: Chat):
    groups = sample(any_model, chat, temperature=0.8)
    logprobs = logprobs_of(groups)
    assert logprobs.std() > 0.3
    assert_close(logprobs, trainer_logprobs(any_model, groups, 0.8), rtol=0, atol=LOGPROB_TOLERANCE)


def test_the_samplers_logprobs_are_the_trainers_though_top_p_and_top_k_cut(
    tiny_llama: Any, chat: Chat
):
    groups = sample(tiny_llama, chat, top_p=0.5, top_k=5)
    expected = trainer_logprobs(tiny_llama, groups, 1.0)
    assert_close(logprobs_of(groups), expected, rtol=0, atol=LOGPROB_TOLERANCE)


@pytest.mark.parametrize("name", ["stories260K", "tinychat-626k"])
def test_the_samplers_logprobs_are_the_trainers_with_pretrained_weights(test_data: Path, name: str):
    import transformers

    folder = test_data / "models" / name
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    # Logits near 30 leave float32 with rounding of about 1e-5, in the sampler and in the trainer
    # alike; in float64 what is left to differ is what they compute.
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    eos = transformers.GenerationConfig.from_pretrained(folder).eos_token_id
    chat = Chat(tokenizer, eos if isinstance(eos, list) else [eos], {})
    prompts = [tokenizer.encode(text) for text in ("Once upon a time, there was", "Lily and Tom")]
    groups = sample(model, chat, prompts, max_tokens=40, temperature=0.8)
    expected = trainer_logprobs(model, groups, 0.8)
    assert_close(logprobs_of(groups), expected, rtol=0, atol=LOGPROB_TOLERANCE)


# n = 3: batches of part of a group, of one group, of several.
@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 6])
def test_the_batch_size_changes_nothing_that_is_sampled(
    any_model: Any, chat: Chat, batch_size: int
):
    together = sample(any_model, chat)
    apart = sample(any_model, chat, batch_size=batch_size)
    assert [g.prompt for g in apart] == PROMPTS
    assert tokens_of(apart) == tokens_of(together)
    assert_close(logprobs_of(apart), logprobs_of(together), rtol=0, atol=LOGPROB_TOLERANCE)


def test_a_groups_completions_do_not_depend_on_the_other_prompts(tiny_llama: Any, chat: Chat):
    before = tokens_of(sample(tiny_llama, chat, [[1, 20, 2], [1, 30, 2], [1, 40, 2]]))
    # Now the second prompt is first, or last, in a batch sorted by length.
    for others in ([1, 50, 51, 52, 53, 54, 2], [2]):
        after = tokens_of(sample(tiny_llama, chat, [others, [1, 30, 2], others]))
        assert after[1] == before[1]
        assert after[0] != before[0]


def test_the_first_completions_do_not_depend_on_how_many_there_are(tiny_llama: Any, chat: Chat):
    few, many = tokens_of(sample(tiny_llama, chat, n=2)), tokens_of(sample(tiny_llama, chat, n=5))
    assert [group[:2] for group in many] == few


def test_completions_differ_by_prompt_place_completion_step_role_and_seed(
    tiny_llama: Any, endless_chat: Chat
):
    prompts = [[1, 20, 2]] * 2
    drawn = [
        tuple(tokens)
        for seed in (0, 1)
        for step in (0, 1)
        for role in ("challenger", "solver")
        for group in tokens_of(
            sample(tiny_llama, endless_chat, prompts, seed=seed, step=step, role=role)
        )
        for tokens in group
    ]
    assert len(set(drawn)) == len(drawn) == 2 * 2 * 2 * 2 * 3


def test_a_step_draws_the_same_again(tiny_llama: Any, chat: Chat):
    sampler = TransformersSampler(tiny_llama, chat, 0, 64)
    drawn = []
    for step in (3, 4, 3):
        sampler.sync(tiny_llama, step)
        drawn.append(sampler.sample(PROMPTS, 2, "solver", Sampling(), 8))
    assert drawn[0] == drawn[2] != drawn[1]


def test_any_stop_token_ends_a_completion_and_stays_out_of_its_text(
    make_markov_model: Callable[..., Any], tokenizer: Any
):
    following = {"a": 0.5, "<|end|>": 0.2, "!": 0.2, "b": 0.1}
    model = make_markov_model({"<|assistant|>": following, "a": following, "b": following})
    end, mark = tokenizer.convert_tokens_to_ids(["<|end|>", "!"])
    [group] = sample(model, Chat(tokenizer, [end, mark], {}), [[1, 2]], n=50, max_tokens=60)
    for completion in group.completions:
        assert completion.tokens[-1] in (end, mark)
        assert not {end, mark} & set(completion.tokens[:-1])
        assert completion.finish_reason == "stop"
        assert len(completion.text) == len(completion.tokens) - 1
        assert set(completion.text) <= {"a", "b"}
        assert len(completion.logprobs) == len(completion.tokens)
    assert {c.tokens[-1] for c in group.completions} == {end, mark}


def test_a_token_that_is_no_stop_token_of_the_chat_does_not_end_a_completion(
    make_markov_model: Callable[..., Any], tokenizer: Any
):
    model = make_markov_model({"<|assistant|>": {"!": 1.0}, "!": {"?": 1.0}})
    chat = Chat(tokenizer, [tokenizer.eos_token_id], {})
    [group] = sample(model, chat, [[1, 2]], n=1)
    assert group.completions[0].text == "!?"


def test_logprobs_are_of_the_sampled_tokens(
    make_markov_model: Callable[..., Any], chat: Chat, tokenizer: Any
):
    model = make_markov_model(
        {"<|assistant|>": {"a": 0.8, "b": 0.2}, "a": {"<|end|>": 0.5, "c": 0.5}}
    )
    [group] = sample(model, chat, [[1, 2]], n=40)
    # log 0.8, log 0.5, log 0.2; the other transitions are certain.
    expected = {
        "a": [-0.223144, -0.693147],
        "ac": [-0.223144, -0.693147, 0.0],
        "b": [-1.609438, 0.0],
    }
    for completion in group.completions:
        wanted = torch.tensor(expected[completion.text])
        assert_close(torch.tensor(completion.logprobs), wanted, rtol=1e-4, atol=1e-5)
    assert {c.text for c in group.completions} == set(expected)


def test_prompts_are_computed_once_and_completions_that_ended_leave_the_batch(
    make_markov_model: Callable[..., Any], chat: Chat
):
    following = {"a": 0.9, "<|end|>": 0.1}
    # A row that has ended and stays goes on with something else: it has ended all the same.
    model = make_markov_model({"<|assistant|>": following, "a": following, "<|end|>": {"a": 1.0}})
    shapes = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    sampler = TransformersSampler(model, chat, 0, 64)
    shapes.clear()  # those of the trial that chooses how to decode
    groups = sampler.sample([[1, 2], [1, 9, 9, 2]], 20, "solver", Sampling(), 50)
    lengths = torch.tensor([len(c.tokens) for g in groups for c in g.completions])
    # The prefill of two prompts; then the token at place t goes in for those that are longer, and
    # for less than one in eight that has ended.
    assert shapes[0] == (2, 4)
    assert len(shapes) == lengths.max()
    for t, (rows, width) in enumerate(shapes[1:], 1):
        ended = rows - int((lengths > t).sum())
        assert width == 1
        assert 0 <= 8 * ended < rows
    assert shapes[1][0] > shapes[-1][0]


def test_max_tokens_cuts_completions_off(tiny_llama: Any, endless_chat: Chat):
    for limit in (1, 7):
        for group in sample(tiny_llama, endless_chat, max_tokens=limit):
            for completion in group.completions:
                assert len(completion.tokens) == len(completion.logprobs) == limit
                assert completion.finish_reason == "length"


def test_a_shorter_limit_gives_the_beginning_of_the_same_completion(
    tiny_llama: Any, endless_chat: Chat
):
    short = tokens_of(sample(tiny_llama, endless_chat, max_tokens=4))
    long = tokens_of(sample(tiny_llama, endless_chat, max_tokens=9))
    assert [[tokens[:4] for tokens in group] for group in long] == short


def test_a_stop_token_in_the_last_place_counts_as_a_stop(
    make_markov_model: Callable[..., Any], chat: Chat
):
    model = make_markov_model({"<|assistant|>": {"a": 1.0}, "a": {"b": 1.0}})
    limits = {
        2: ("ab", "length"),
        3: ("ab", "stop"),  # the stop token is the third
    }
    for limit, expected in limits.items():
        [group] = sample(model, chat, [[1, 2]], n=1, max_tokens=limit)
        [completion] = group.completions
        assert (completion.text, completion.finish_reason) == expected


def test_a_completion_ends_where_the_context_ends(
    make_model: Callable[..., Any], endless_chat: Chat
):
    model = make_model("gpt2", context=12)
    [group] = sample(model, endless_chat, [[1, 20, 21, 22, 2]], max_tokens=50)
    # 12 - 5 places are left.
    assert [len(c.tokens) for c in group.completions] == [7, 7, 7]
    assert all(c.finish_reason == "length" for c in group.completions)


def test_where_the_context_ends_for_a_completion_depends_on_its_own_prompt_only(
    make_model: Callable[..., Any], endless_chat: Chat
):
    model = make_model("gpt2", context=12)
    prompts = [[1, 20, 21, 22, 2], [1, 30, 31, 32, 33, 34, 35, 36, 2]]
    # 12 - 5 and 12 - 9 places are left, in whatever batch.
    for batch_size in (1, 64):
        groups = sample(model, endless_chat, prompts, n=2, max_tokens=50, batch_size=batch_size)
        assert [[len(t) for t in group] for group in tokens_of(groups)] == [[7, 7], [3, 3]]


def test_a_low_temperature_is_greedy_decoding(any_model: Any, endless_chat: Chat):
    groups = sample(any_model, endless_chat, max_tokens=8, temperature=1e-4)
    for prompt, group in zip(PROMPTS, groups, strict=True):
        sequence = list(prompt)
        for _ in range(8):
            with torch.no_grad():
                ids = torch.tensor([sequence])
                logits = any_model(ids, attention_mask=torch.ones_like(ids)).logits[0, -1]
            sequence.append(int(logits.argmax()))
        assert [c.tokens for c in group.completions] == [sequence[len(prompt) :]] * 3


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_first_tokens_are_distributed_as_the_models_softmax(
    tiny_llama: Any, chat: Chat, temperature: float
):
    count = 20_000
    [group] = sample(
        tiny_llama,
        chat,
        [PROMPTS[0]],
        n=count,
        max_tokens=1,
        batch_size=count,
        temperature=temperature,
    )
    drawn = torch.tensor([c.tokens[0] for c in group.completions])
    with torch.no_grad():
        logits = tiny_llama(torch.tensor([PROMPTS[0]])).logits[0, -1]
    expected = count * (logits / temperature).softmax(-1)
    counts = torch.bincount(drawn, minlength=len(expected))
    often = expected >= 5
    assert often.sum() > 20
    chi_square = ((counts - expected).square() / expected)[often].sum()
    # Mean d, standard deviation √(2d), for d tokens.
    degrees = int(often.sum())
    assert chi_square < degrees + 4 * (2 * degrees) ** 0.5
    rare = ~often
    assert abs(counts[rare].sum() - expected[rare].sum()) < 5 * expected[rare].sum().sqrt() + 5


def test_completions_of_a_group_are_drawn_independently(
    make_markov_model: Callable[..., Any], chat: Chat
):
    half = {"a": 0.5, "b": 0.5}
    model = make_markov_model({"<|assistant|>": half, "a": half, "b": half})
    [group] = sample(model, chat, [[1, 2]], n=4_000, max_tokens=2, batch_size=4_000)
    counts = torch.tensor(
        [[c.text for c in group.completions].count(text) for text in ("aa", "ab", "ba", "bb")]
    )
    # χ² with 3 degrees of freedom: above 16.3 once in a thousand.
    assert ((counts - 1_000.0).square() / 1_000).sum() < 16.3


def test_no_prompts_give_no_groups(tiny_llama: Any, chat: Chat):
    assert sample(tiny_llama, chat, []) == []


def test_log_probs_of_damaged_weights_are_given_as_they_are(tiny_llama: Any, chat: Chat):
    # Of those a step learns nothing (guard.py); a sampler that failed would lose what it drew.
    with torch.no_grad():
        tiny_llama.lm_head.weight[7] = torch.nan
    groups = sample(tiny_llama, chat, step=5)
    assert groups
    assert all(math.isnan(p) for g in groups for c in g.completions for p in c.logprobs)


def test_the_context_is_the_models_or_one_that_no_completion_reaches(tiny_llama: Any, chat: Chat):
    import transformers

    assert TransformersSampler(tiny_llama, chat, 0, 1).context_length == 512
    # Bloom's positions are relative: its configuration states no limit.
    config = transformers.BloomConfig(vocab_size=107, hidden_size=8, n_layer=1, n_head=2)
    bloom = transformers.BloomForCausalLM(config)
    with pytest.warns(UserWarning, match="BloomForCausalLM .* its own copy of its prompt"):
        sampler = TransformersSampler(bloom, chat, 0, 1)  # alibi needs to know all positions
    assert sampler.context_length > 10**6


def count_passes(model: Any) -> list[tuple[int, ...]]:
    """A list that grows by the shape of the tokens of every pass of the model."""
    shapes: list[tuple[int, ...]] = []
    model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: shapes.append(tuple(args[0].shape))
    )
    return shapes


# 70 tokens in common, and rests of unequal length, one of which begins as another does.
COMMON = torch.randint(5, 80, (70,), generator=torch.Generator().manual_seed(0)).tolist()
ALIKE = [COMMON + rest for rest in ([5], [6, 7, 8, 9, 10], [11, 12], [6, 7], [5])]


@pytest.mark.parametrize("batch_size", [2, 64])
def test_a_shared_beginning_changes_nothing_that_is_sampled(
    any_model: Any, chat: Chat, monkeypatch: pytest.MonkeyPatch, batch_size: int
):
    shared = sample(any_model, chat, ALIKE, n=1, batch_size=batch_size)
    monkeypatch.setattr(prefill, "SHORTEST_BEGINNING", 10**9)
    apart = sample(any_model, chat, ALIKE, n=1, batch_size=batch_size)
    assert tokens_of(shared) == tokens_of(apart)
    assert_close(logprobs_of(shared), logprobs_of(apart), rtol=0, atol=LOGPROB_TOLERANCE)
    expected = trainer_logprobs(any_model, shared, 1.0)
    assert_close(logprobs_of(shared), expected, rtol=0, atol=LOGPROB_TOLERANCE)


def test_a_long_common_beginning_goes_through_the_model_once(tiny_llama: Any, chat: Chat):
    sampler = TransformersSampler(tiny_llama, chat, 0, 3)
    shapes = count_passes(tiny_llama)
    sampler.sample(ALIKE, 1, "solver", Sampling(), 1)
    # Then what is left of three prompts of 5, 2 and 2 tokens, and of two of 1.
    assert shapes == [(1, 70), (3, 5), (2, 1)]


@pytest.mark.parametrize("window", [76, 80, 200])
def test_completions_that_outgrow_a_window_behind_a_beginning_are_the_trainers(
    make_model: Callable[..., Any], endless_chat: Chat, window: int
):
    # Prompts of 71 to 75 tokens fit; with 20 more tokens only the widest window sees all.
    model = make_model("mistral")
    model.config.sliding_window = window
    groups = sample(model, endless_chat, ALIKE, n=1, max_tokens=20)
    expected = trainer_logprobs(model, groups, 1.0)
    assert_close(logprobs_of(groups), expected, rtol=0, atol=LOGPROB_TOLERANCE)


def test_rows_with_a_copy_of_their_prompt_draw_the_same(any_model: Any, chat: Chat):
    sampler = TransformersSampler(any_model, chat, 0, 6)
    assert sampler.shares_prompts
    shared = sampler.sample(PROMPTS, 4, "solver", Sampling(), 30)
    sampler.shares_prompts = False
    copied = sampler.sample(PROMPTS, 4, "solver", Sampling(), 30)
    assert tokens_of(shared) == tokens_of(copied)
    assert_close(logprobs_of(shared), logprobs_of(copied), rtol=0, atol=LOGPROB_TOLERANCE)
    assert {c.finish_reason for g in shared for c in g.completions} == {"stop", "length"}


def test_a_group_larger_than_a_batch_is_prefilled_once(tiny_llama: Any, endless_chat: Chat):
    sampler = TransformersSampler(tiny_llama, endless_chat, 0, 4)
    shapes = count_passes(tiny_llama)
    sampler.sample([[1, 20, 21, 2]], 10, "challenger", Sampling(), 2)
    # Ten rows in slices of four, behind one prompt.
    assert shapes == [(1, 4), (4, 1), (4, 1), (2, 1)]


def test_equal_prompts_are_prefilled_once(tiny_llama: Any, endless_chat: Chat):
    sampler = TransformersSampler(tiny_llama, endless_chat, 0, 64)
    prompts = [[1, 20, 2], [1, 30, 31, 2], [1, 20, 2]]
    alone = tokens_of(sampler.sample(prompts[:2], 3, "solver", Sampling(), 8))
    shapes = count_passes(tiny_llama)
    groups = tokens_of(sampler.sample(prompts, 3, "solver", Sampling(), 8))
    assert shapes[:2] == [(2, 4), (9, 1)]
    assert groups[:2] == alone
    assert groups[2] != groups[0]


# Rows that have ended leave one by one, or stay until the last has ended.
@pytest.mark.parametrize(
    ("leave_at", "shares_prompts"), [(10**9, True), (1, True), (10**9, False), (1, False)]
)
def test_when_ended_rows_leave_changes_nothing_that_is_sampled(
    any_model: Any,
    chat: Chat,
    monkeypatch: pytest.MonkeyPatch,
    leave_at: int,
    shares_prompts: bool,
):
    # Stop tokens are likely, so that most rows end on the way.
    stops = Chat(chat.tokenizer, list(range(3, 20)), {})
    sampler = TransformersSampler(any_model, stops, 0, 64)
    [[alone]] = tokens_of(sampler.sample(PROMPTS[:1], 1, "solver", Sampling(), 15))
    sampler.shares_prompts = shares_prompts
    monkeypatch.setattr(transformers, "LEAVE_AT", leave_at)
    groups = sampler.sample(PROMPTS, 4, "solver", Sampling(), 15)
    assert groups[0].completions[0].tokens == alone
    lengths = []
    for completion in (c for g in groups for c in g.completions):
        *body, last = completion.tokens
        assert not set(body) & set(stops.eos_ids)
        assert (last in stops.eos_ids) == (completion.finish_reason == "stop")
        assert completion.finish_reason == "stop" or len(completion.tokens) == 15
        assert len(completion.logprobs) == len(completion.tokens)
        lengths.append(len(completion.tokens))
    assert len(set(lengths)) > 3
    expected = trainer_logprobs(any_model, groups, 1.0)
    assert_close(logprobs_of(groups), expected, rtol=0, atol=LOGPROB_TOLERANCE)


def test_nothing_is_copied_as_long_as_no_row_ends(
    tiny_llama: Any, endless_chat: Chat, monkeypatch: pytest.MonkeyPatch
):
    calls = []
    monkeypatch.setattr(transformers.SharedDecoding, "keep", lambda *call: calls.append(call))
    sample(tiny_llama, endless_chat, max_tokens=10)
    assert calls == []


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama"])
@pytest.mark.parametrize("shares_prompts", [True, False])
def test_rows_beyond_the_end_of_the_context_wait_for_the_others(
    make_model: Callable[..., Any],
    endless_chat: Chat,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    shares_prompts: bool,
):
    monkeypatch.setattr(transformers, "LEAVE_AT", 1)
    # 12 places: 8, 3, 10 and 6 are left, and the shortest prompts decide how long all stay.
    model = make_model(name, context=12)
    sampler = TransformersSampler(model, endless_chat, 0, 64)
    sampler.shares_prompts = shares_prompts
    groups = sampler.sample(PROMPTS, 2, "solver", Sampling(), 50)
    assert [[len(t) for t in g] for g in tokens_of(groups)] == [[8, 8], [3, 3], [10, 10], [6, 6]]
    expected = trainer_logprobs(model, groups, 1.0)
    assert_close(logprobs_of(groups), expected, rtol=0, atol=LOGPROB_TOLERANCE)


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_rows_behind_a_beginning_end_where_the_context_ends(
    make_model: Callable[..., Any], endless_chat: Chat, name: str
):
    model = make_model(name, context=78)
    groups = sample(model, endless_chat, ALIKE, n=1, max_tokens=50)
    # 78 - 71, - 75, - 72, - 72, - 71.
    assert [len(t) for [t] in tokens_of(groups)] == [7, 3, 6, 6, 7]
    expected = trainer_logprobs(model, groups, 1.0)
    assert_close(logprobs_of(groups), expected, rtol=0, atol=LOGPROB_TOLERANCE)


@pytest.mark.parametrize("shares_prompts", [True, False])
def test_the_same_call_gives_the_same_tokens_and_log_probs_bit_for_bit(
    any_model: Any, chat: Chat, shares_prompts: bool
):
    sampler = TransformersSampler(any_model, chat, 0, 5)
    sampler.shares_prompts = shares_prompts
    for prompts, n in ((PROMPTS, 3), (ALIKE, 1)):
        first, second = (sampler.sample(prompts, n, "solver", Sampling(), 10) for _ in range(2))
        assert first == second


def test_in_bfloat16_the_samplers_logprobs_are_the_trainers_but_for_rounding(
    any_model: Any, chat: Chat
):
    model = any_model.bfloat16()
    for prompts, n in ((PROMPTS, 3), (ALIKE, 1)):
        groups = sample(model, chat, prompts, n=n)
        difference = (logprobs_of(groups) - trainer_logprobs(model, groups, 1.0)).abs()
        # Weights of ten times their usual size, whose log-probs spread by about 1 nat.
        assert difference.mean() < 0.05
        assert difference.max() < 0.3
