"""Rewards: the reference's quality score in its three modes, and the weighted sum R(q, a)."""

from __future__ import annotations

import asyncio
import math
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from language_self_play import prefill
from language_self_play.chat import Chat
from language_self_play.config import Config, Sampling, SelfReward
from language_self_play.errors import (
    ConfigError,
    MemoryLimitError,
    NonFiniteError,
    RewardError,
)
from language_self_play.policy import Policy
from language_self_play.prompts import CRITERION_QUESTION, RUBRIC
from language_self_play.rewards import RewardSum, build_reward
from language_self_play.rewards.python import PythonFunction
from language_self_play.rewards.self_reward import QualityJudge, build_judge
from language_self_play.sampling.transformers import TransformersSampler
from language_self_play.signals import Abandoned
from out_of_memory import OUT_OF_MEMORY, limit_rows

QUERIES = ["1+2", "reverse kite"]
ANSWERS = [["3", "12"], ["etik", "a rather long answer"]]
# 3 is right, then what the arena expects of "reverse kite".
ARENA_REWARDS = [[1.0, 0.0], [1.0, 0.0]]


def make_judge(
    model: Any, chat: Chat, mode: str, tokens_at_once: int = 100_000, **settings: Any
) -> QualityJudge:
    sampler = TransformersSampler(model, chat, seed=0, batch_size=64)
    section = SelfReward(mode=mode, **{"rubric": "arena"} | settings)
    return QualityJudge(sampler, section, tokens_at_once, Policy(model, chat, model).as_reference)


def next_token_logits(model: Any, tokenizer: Any, text: str) -> Tensor:
    ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
    with torch.no_grad():
        return model(ids, attention_mask=torch.ones_like(ids)).logits[0, -1]


# ---------------------------------------------------------------- mode expected


@pytest.fixture
def digit_scores(tiny_llama: Any, tokenizer: Any) -> list[list[float]]:
    """Σ_s s · p(s) over the eight digits, from one plain forward pass a pair."""
    digits = tokenizer.convert_tokens_to_ids(list("01234567"))

    def score(query: str, answer: str) -> float:
        text = f"<|user|>Judge {query} => {answer}<|assistant|><score>"
        p = next_token_logits(tiny_llama, tokenizer, text)[digits].softmax(-1).tolist()
        return sum(s * p[s] for s in range(8))

    return [[score(q, a) for a in group] for q, group in zip(QUERIES, ANSWERS, strict=True)]


# 1 asks one pair at a time; 100,000 pads the shorter prompts.
@pytest.mark.parametrize("tokens_at_once", [1, 100_000])
def test_expected_is_the_mean_digit_after_an_opening_score_tag(
    tiny_llama, chat, digit_scores, tokens_at_once
):
    judge = make_judge(tiny_llama, chat, "expected", tokens_at_once)
    assert_close(judge(QUERIES, ANSWERS), torch.tensor(digit_scores), rtol=1e-5, atol=0)
    assert torch.tensor(digit_scores).std() > 0.1


def test_the_weight_multiplies_the_score(tiny_llama, chat, digit_scores):
    judge = make_judge(tiny_llama, chat, "expected", weight=0.25)
    assert_close(judge(QUERIES, ANSWERS), 0.25 * torch.tensor(digit_scores), rtol=1e-5, atol=0)


@pytest.mark.parametrize("tokens_at_once", [1, 100_000])
def test_the_rubrics_shared_beginning_is_computed_once(
    tiny_llama, chat, tmp_path, monkeypatch, tokens_at_once
):
    rubric = tmp_path / "rubric.txt"
    instructions = "abcdefgh" * 20
    rubric.write_text(f"{instructions} {{query}} {{answer}}")
    settings = {"rubric": str(rubric), "tokens_at_once": tokens_at_once}
    monkeypatch.setattr(prefill, "SHORTEST_BEGINNING", 10_000)
    apart = make_judge(tiny_llama, chat, "expected", **settings)(QUERIES, ANSWERS)
    monkeypatch.undo()
    judge, tokens = make_judge(tiny_llama, chat, "expected", **settings), []
    tiny_llama.register_forward_pre_hook(
        lambda module, args, kwargs: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    together = judge(QUERIES, ANSWERS)
    assert_close(together, apart, rtol=1e-5, atol=0)
    assert together.std() > 0.01
    # Four pairs, each with a query and an answer of at most 12 and 22 characters.
    assert len(instructions) < sum(tokens) < len(instructions) + 4 * 60


@pytest.mark.parametrize("shared", [False, True], ids=["whole", "behind a beginning"])
@pytest.mark.parametrize("kind", OUT_OF_MEMORY)
def test_expected_without_memory_halves_its_batches_and_scores_the_same(
    tiny_llama, chat, tmp_path, kind, shared
):
    rubric = tmp_path / "rubric.txt"
    rubric.write_text(f"{'abcdefgh' * 20 if shared else ''} {{query}} {{answer}}")
    judge = make_judge(tiny_llama, chat, "expected", rubric=str(rubric))
    whole = judge(QUERIES, ANSWERS)
    rows = limit_rows(tiny_llama, 2, OUT_OF_MEMORY[kind])
    assert_close(judge(QUERIES, ANSWERS), whole, rtol=0, atol=1e-5)
    assert whole.std() > 0.01
    # The beginning is one row. All four pairs are refused; half of their tokens is two of the longest.
    assert rows == [1, 4, 2, 2] if shared else [4, 2, 2]
    del rows[:]
    judge(QUERIES, ANSWERS)
    assert max(rows) == 2  # at once: the size is kept
    assert judge.batches.tokens < judge.batches.configured


def test_one_prompt_that_memory_does_not_hold_says_what_to_lower(tiny_llama, chat):
    judge = make_judge(tiny_llama, chat, "expected")
    limit_rows(tiny_llama, 0, OUT_OF_MEMORY["torch"])
    # <|user|>, `Judge `, `reverse `, four letters, ` => `, 20 characters, <|assistant|>, <score>.
    expected = r"^self_reward: no memory left for a pass over \d+ tokens; use a shorter self_reward"
    with pytest.raises(MemoryLimitError, match=expected):
        judge(QUERIES, ANSWERS)


def test_prompts_that_are_read_once_leave_no_keys_and_values(tiny_llama, chat, tmp_path):
    rubric = tmp_path / "rubric.txt"
    rubric.write_text(f"{'abcdefgh' * 20} {{query}} {{answer}}")
    caches: list[Any] = []
    short = make_judge(tiny_llama, chat, "expected")
    long = make_judge(tiny_llama, chat, "expected", rubric=str(rubric))
    tiny_llama.register_forward_hook(
        lambda module, args, output: caches.append(output.past_key_values)
    )
    short(QUERIES, ANSWERS)
    assert caches == [None]
    del caches[:]
    long(QUERIES, ANSWERS)
    # The beginning's are kept, which the pairs go on from; their own are not.
    [beginning, rests] = caches
    assert beginning.get_seq_length() > len("abcdefgh" * 20)
    assert [x.own_keys.numel() + x.own_values.numel() for x in rests.of_layer] == [0, 0]


def test_equal_pairs_are_asked_about_once(tiny_llama, chat, digit_scores):
    judge = make_judge(tiny_llama, chat, "expected")
    rows = []
    tiny_llama.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    queries = [QUERIES[0], QUERIES[1], QUERIES[0]]
    answers = [["3", "12", "3"], ["etik", "etik", "etik"], ["12", "12", "3"]]
    scores = judge(queries, answers)
    assert sum(rows) == 3
    (three, twelve), (etik, _) = digit_scores
    expected = [[three, twelve, three], [etik] * 3, [twelve, twelve, three]]
    assert_close(scores, torch.tensor(expected), rtol=1e-5, atol=0)


def test_the_digits_of_a_real_tokenizer_are_told_apart(test_data: Path):
    import transformers

    folder = test_data / "models" / "stories260K"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}\n"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    chat = Chat(tokenizer, [1, 2], {})
    try:
        judge = make_judge(model, chat, "expected")
    except ConfigError:
        return  # Refusing the tokenizer would be right too.
    assert len(set(judge.questions.choices)) == 8


# ---------------------------------------------------------------- mode criteria


@pytest.fixture
def long_llama(make_model: Callable[..., Any]) -> Any:
    """Its context holds the default rubric, which takes about 1,000 of the arena's tokens."""
    return make_model("llama", context=2048)


def test_criteria_sums_the_probability_of_yes_over_the_seven_criteria(long_llama, chat, tokenizer):
    query, answer = QUERIES[0], ANSWERS[0][1]
    criteria = re.findall(r"^\d\. (.*)$", RUBRIC, re.MULTILINE)
    assert len(criteria) == 7
    # The arena's tokens are characters: y and n, Y and N stand for yes and no.
    choices = tokenizer.convert_tokens_to_ids(["y", "Y", "n", "N"])
    expected = 0.0
    for criterion in criteria:
        question = CRITERION_QUESTION.replace("{query}", query).replace("{answer}", answer)
        text = f"<|user|>{question.replace('{criterion}', criterion)}<|assistant|>"
        p = next_token_logits(long_llama, tokenizer, text)[choices].softmax(-1)
        expected += (p[0] + p[1]).item()
    judge = make_judge(long_llama, chat, "criteria", rubric="default")
    scores = judge([query], [[answer, answer]])
    assert_close(scores, torch.full((1, 2), expected), rtol=1e-5, atol=0)
    assert abs(expected - 3.5) > 0.1


def test_criteria_without_memory_halve_their_batches_and_score_the_same(long_llama, chat):
    judge = make_judge(long_llama, chat, "criteria", rubric="default")
    whole = judge(QUERIES, ANSWERS)
    rows = limit_rows(long_llama, 5, OUT_OF_MEMORY["torch"])
    assert_close(judge(QUERIES, ANSWERS), whole, rtol=0, atol=1e-5)
    # Four pairs with seven questions each; what has been computed when memory runs out again is kept.
    computed = [n for n in rows if n <= 5]
    assert rows[0] == 28 or rows[:2] == [1, 28]
    assert sum(computed) in (28, 29)


def test_criteria_of_each_pair_stay_together(long_llama, chat):
    judge = make_judge(long_llama, chat, "criteria", rubric="default")
    apart = torch.tensor([[judge([q], [[a]]).item() for a in ANSWERS[0]] for q in QUERIES])
    together = judge(QUERIES, [ANSWERS[0]] * 2)
    assert_close(together, apart, rtol=1e-5, atol=0)
    assert together.unique().numel() == 4


def test_criteria_need_only_one_criterion_at_a_time_in_the_context(long_llama, tiny_llama, chat):
    # No question about one criterion takes more than 300 tokens; tiny_llama has room for 512.
    expected = make_judge(long_llama, chat, "criteria", rubric="default")(QUERIES, ANSWERS)
    scores = make_judge(tiny_llama, chat, "criteria", rubric="default")(QUERIES, ANSWERS)
    assert_close(scores, expected, rtol=1e-5, atol=0)


def test_criteria_need_a_rubric_that_numbers_seven(tiny_llama, chat):
    with pytest.raises(ConfigError, match="0 criteria, not 7"):
        make_judge(tiny_llama, chat, "criteria", rubric="arena")


# ---------------------------------------------------------------- mode generate


def scoring_model(make_markov_model: Callable[..., Any], scores: dict[str, float]) -> Any:
    """A model that replies `<score>s</score>`, with these probabilities of s."""
    transitions = {score: {"</score>": 1.0} for score in scores}
    return make_markov_model({"<|assistant|>": {"<score>": 1.0}, "<score>": scores} | transitions)


def test_generate_reads_the_score_that_is_written(make_markov_model, chat):
    judge = make_judge(scoring_model(make_markov_model, {"6": 1.0}), chat, "generate")
    assert judge(QUERIES, ANSWERS).tolist() == [[6.0, 6.0], [6.0, 6.0]]
    assert judge.unparsable_fraction == 0.0


def test_a_reply_without_a_score_takes_the_mean_of_the_others_and_is_counted(
    make_markov_model, chat
):
    # Neither x nor 8 is a score from 0 to 7.
    model = scoring_model(make_markov_model, {"0": 0.2, "7": 0.3, "x": 0.25, "8": 0.25})
    queries, answers = [f"{i}+1" for i in range(5)], [[f"{j}" for j in range(4)]] * 5
    judge = make_judge(model, chat, "generate")
    scores = judge(queries, answers)
    # What it wrote: the same prompts again, from the judge's stream.
    prompts = [chat.encode(f"Judge {i}+1 => {j}") for i in range(5) for j in range(4)]
    groups = judge.sampler.sample(prompts, 1, "judge", Sampling(), 300)
    replies = [g.completions[0].text for g in groups]
    found = [{"<score>0</score>": 0.0, "<score>7</score>": 7.0}.get(reply) for reply in replies]
    known = [score for score in found if score is not None]
    assert 0 < sum(known) < 7 * len(known)
    assert 5 < len(known) < 15
    mean = sum(known) / len(known)
    expected = torch.tensor([mean if score is None else score for score in found]).view(5, 4)
    assert_close(scores, expected, rtol=1e-6, atol=0)
    assert judge.unparsable_fraction == pytest.approx(1 - len(known) / 20)


def test_equal_pairs_get_the_same_written_score(make_markov_model, chat):
    model = scoring_model(make_markov_model, {str(s): 1 / 8 for s in range(8)})
    scores = make_judge(model, chat, "generate")(["1+2", "3+4"], [["3"] * 8, ["7"] * 8])
    assert scores.unique(dim=1).shape == (2, 1)


def test_without_any_score_quality_is_zero_and_all_are_counted(make_markov_model, chat):
    judge = make_judge(scoring_model(make_markov_model, {"x": 1.0}), chat, "generate")
    assert judge(QUERIES, ANSWERS).tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert judge.unparsable_fraction == 1.0


@pytest.mark.parametrize("shared", [False, True], ids=["whole", "behind a beginning"])
def test_the_judges_prompts_are_prefilled_within_its_tokens(
    tiny_llama, endless_chat, make_config, tmp_path, shared
):
    rubric = tmp_path / "rubric.txt"
    rubric.write_text(f"{'abcdefgh' * 20 if shared else ''} {{query}} {{answer}}")
    settings = {"rubric": str(rubric), "mode": "generate", "max_tokens": 5}
    queries, answers = ["1"], [["2" * 25, *(f"{i}" * 8 for i in range(7))]]

    def judged(tokens: int) -> tuple[list[tuple[int, int]], list[str]]:
        learner = {"tokens_per_micro_batch": tokens}
        config = make_config(algorithm="lsp", self_reward=settings, learner=learner)
        judge = build_judge(config, Policy(tiny_llama, endless_chat, tiny_llama))
        shapes: list[tuple[int, int]] = []
        replies: list[str] = []
        sample = judge.sampler.sample

        def watched(*args: Any) -> Any:
            groups = sample(*args)
            replies.extend(g.completions[0].text for g in groups)
            return groups

        judge.sampler.sample = watched
        count = tiny_llama.get_input_embeddings().register_forward_hook(
            lambda module, args, output: shapes.append(tuple(args[0].shape))
        )
        judge(queries, answers)
        count.remove()
        return [s for s in shapes if len(s) == 2 and s[1] > 1], replies

    prefilled, replies = judged(40)
    rests = prefilled[1:] if shared else prefilled
    assert max(rows * length for rows, length in rests) <= 40
    assert sum(rows for rows, _ in rests) == 8
    assert len(rests) > 2
    together, expected = judged(100_000)
    assert [rows for rows, _ in together] == ([1, 8] if shared else [8])
    assert replies == expected  # what is drawn depends on no batch


def test_a_reply_that_is_cut_off_before_its_score_is_counted(make_markov_model, chat):
    model = scoring_model(make_markov_model, {"6": 1.0})
    judge = make_judge(model, chat, "generate", max_tokens=2)
    judge(QUERIES, ANSWERS)
    assert judge.unparsable_fraction == 1.0


def test_the_judges_temperature_is_its_own(make_markov_model, chat):
    # At τ = 0.1 the odds 0.6 : 0.4 become 1.5¹⁰ = 58 : 1.
    model = scoring_model(make_markov_model, {"2": 0.6, "5": 0.4})
    queries, answers = [f"{i}+1" for i in range(50)], [["1"]] * 50
    warm = make_judge(model, chat, "generate")(queries, answers)
    cold = make_judge(model, chat, "generate", temperature=0.1)(queries, answers)
    assert (warm == 5).sum() > 10
    assert (cold == 5).sum() < 5


@pytest.mark.parametrize("mode", ["generate", "expected"])
def test_a_pair_that_exceeds_the_context_takes_the_mean_of_the_others_and_is_counted(
    make_model, make_markov_model, chat, mode
):
    if mode == "expected":
        model = make_model("gpt2", context=40)
    else:
        model = scoring_model(make_markov_model, {"1": 0.5, "6": 0.5})
        model.config.max_position_embeddings = 40
    # <|user|>, `Judge `, `1+2`, ` => `, the answer's 40 digits and <|assistant|> exceed 40 tokens.
    judge = make_judge(model, chat, mode)
    scores = judge(["1+2"], [["3", "5", "4" * 40, "7"]])[0]
    assert_close(scores[2], scores[[0, 1, 3]].mean(), rtol=1e-5, atol=0)
    assert scores[[0, 1, 3]].unique().numel() > 1
    assert judge.unparsable_fraction == 0.25


def test_a_rubric_that_fills_the_context_is_refused(make_model, chat):
    # <|user|>, `Judge `, ` => ` and <|assistant|> are 4 tokens; mode expected adds <score>.
    make_judge(make_model("llama", context=6), chat, "expected")
    with pytest.raises(ConfigError, match=r"self_reward\.rubric = 'arena': takes . tokens"):
        make_judge(make_model("llama", context=4), chat, "expected")


@pytest.mark.parametrize("mode", ["generate", "expected"])
def test_no_queries_have_no_quality(tiny_llama, chat, mode):
    judge = make_judge(tiny_llama, chat, mode)
    assert judge([], []).shape == (0, 0)


def test_a_call_without_queries_counts_no_unparsable_replies(make_markov_model, chat):
    judge = make_judge(scoring_model(make_markov_model, {"x": 1.0}), chat, "generate")
    judge(QUERIES, ANSWERS)
    judge([], [])
    assert judge.unparsable_fraction == 0.0


def test_the_judge_is_the_reference(tiny_llama, make_markov_model, chat, make_config):
    policy = Policy(tiny_llama, chat, scoring_model(make_markov_model, {"4": 1.0}))
    config = make_config(algorithm="lsp", self_reward={"rubric": "arena"})
    assert build_judge(config, policy)(["1+2"], [["3"]]).tolist() == [[4.0]]


# ---------------------------------------------------------------- the sum of rewards


def lengths(queries: list[str], answers: list[str]) -> list[int]:
    return [len(a) for a in answers]


def mine(function: Callable[..., Any]) -> RewardSum:
    return RewardSum({"mine": (1.0, PythonFunction("reward.mine", function))})


def test_rewards_are_summed_by_weight_in_the_order_of_the_answers():
    by_query = PythonFunction(
        "reward.query", lambda queries, answers: [float(len(q)) for q in queries]
    )
    terms = {"length": (0.5, PythonFunction("reward.length", lengths)), "query": (-1.0, by_query)}
    # Half the answers' lengths 1, 2 and 4, 20, minus the queries' lengths 3 and 12.
    expected = [[0.5 - 3, 1.0 - 3], [2.0 - 12, 10.0 - 12]]
    reward = RewardSum(terms)
    assert reward(QUERIES, ANSWERS).tolist() == expected
    parts = {name: part.tolist() for name, part in reward.parts.items()}
    assert parts == {"length": [[1, 2], [4, 20]], "query": [[3, 3], [12, 12]]}


def test_a_reward_may_return_tensors_and_booleans():
    tensor = mine(lambda queries, answers: torch.arange(len(queries)))
    assert tensor(["a", "b"], [["x"], ["y"]]).tolist() == [[0.0], [1.0]]
    flags = mine(lambda queries, answers: [a == "3" for a in answers])
    assert flags(QUERIES, ANSWERS).tolist() == [[1.0, 0.0], [0.0, 0.0]]


def test_a_function_with_a_parameter_keys_gets_each_querys_key():
    reward = mine(
        lambda queries, answers, keys: [a == k for a, k in zip(answers, keys, strict=True)]
    )
    assert reward(QUERIES, ANSWERS, ["12", "etik"]).tolist() == [[0.0, 1.0], [1.0, 0.0]]
    assert reward(QUERIES, ANSWERS).tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_no_queries_have_no_reward_and_call_none():
    def fail(queries: list[str], answers: list[str]) -> list[float]:
        raise AssertionError("called without pairs")

    assert mine(fail)([], []).shape == (0, 0)


def test_the_arenas_reward_is_built_from_the_configuration(make_config: Callable[..., Config]):
    reward = build_reward(make_config(reward={"main": {"kind": "arena", "weight": 3.0}}))
    assert_close(reward(QUERIES, ANSWERS), 3.0 * torch.tensor(ARENA_REWARDS))
    assert reward(["1-2"], [["1", "-1"]]).tolist() == [[0.0, 0.0]]  # unsolvable


def raises(queries: list[str], answers: list[str]) -> list[float]:
    raise KeyError("lost")


def raises_late(queries: list[str], answers: list[str]) -> Iterator[float]:
    yield 1.0
    raise ZeroDivisionError("late")


class Leaves(SystemExit):
    """What a program of the user's own may end by."""


class Interrupts(KeyboardInterrupt):
    """What a debugger or a console may turn Ctrl-C into."""


@pytest.mark.parametrize(
    ("leave", "message"),
    [
        (lambda: sys.exit(3), r"raised SystemExit: 3 \(.*test_self_reward\.py:\d+\)$"),
        (lambda: sys.exit(), r"raised SystemExit:"),  # which would be a success
        (lambda: throw(Leaves("done")), r"raised Leaves: done"),
        (lambda: throw(asyncio.CancelledError("gave up")), r"raised CancelledError: gave up"),
    ],
    ids=["exit code", "no exit code", "its own exit", "cancelled"],
)
def test_a_reward_that_leaves_the_program_is_reported_by_name(leave, message):
    with pytest.raises(RewardError, match=rf"^reward\.mine: {message}"):
        mine(lambda queries, answers: leave())(QUERIES, ANSWERS)


@pytest.mark.parametrize("error", [KeyboardInterrupt, Interrupts, Abandoned])
def test_an_interruption_of_a_reward_is_the_runs_own(error):
    with pytest.raises(error):
        mine(lambda queries, answers: throw(error()))(QUERIES, ANSWERS)


def throw(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize("leave", ["sys.exit(0)", "raise asyncio.CancelledError", "raise Exit"])
def test_a_module_that_leaves_the_program_is_reported_by_its_reward(
    make_config, tmp_path, monkeypatch, leave
):
    before = "import asyncio, sys\nclass Exit(SystemExit): pass\n"
    (tmp_path / "leaves.py").write_text(f"{before}{leave}\n")
    monkeypatch.syspath_prepend(tmp_path)
    section = {"kind": "python", "function": "leaves:reward"}
    with pytest.raises(RewardError, match=r"^reward\.main\.function = .* importing leaves raised"):
        build_reward(make_config(reward={"main": section}))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (raises, "raised KeyError: 'lost'"),
        (raises_late, "raised ZeroDivisionError: late"),
        (lambda q, a: [1.0], "1 number for 4 answers; it must return one for each"),
        (lambda q, a: [1.0] * 5, "5 numbers for 4 answers; "),
        (lambda q, a: ["good", "bad", "bad", "good"], "must return a list of numbers"),
        (lambda q, a: ["1", "0", "0", "1"], "must return a list of numbers"),
        (lambda q, a: "1001", "must return a list of numbers"),
        (lambda q, a: [1.0, None, 0.0, 1.0], "must return one number for each answer"),
        (lambda q, a: None, "None; it must return a list of numbers"),
        (lambda q, a: 1.0, "must return a list of numbers"),
        (lambda q, a: [[1.0, 2.0]] * 4, "must return one number for each answer"),
    ],
    ids=[
        "raises",
        "raises while iterated",
        "too few",
        "too many",
        "words",
        "numbers as strings",
        "a string",
        "None inside",
        "None",
        "a number",
        "lists inside",
    ],
)
def test_a_reward_that_is_not_a_number_a_pair_is_reported_by_name(function, message):
    with pytest.raises(RewardError, match=rf"^reward\.mine: .*{re.escape(message)}"):
        mine(function)(QUERIES, ANSWERS)


# 1e39 is finite, but not in float32, the type of rewards.
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e39])
def test_a_reward_that_is_not_finite_names_its_query_and_answer(value):
    def reward(queries: list[str], answers: list[str]) -> list[float]:
        return [value if a == "etik" else 0.0 for a in answers]

    with pytest.raises(NonFiniteError, match=r"reward\.mine: .*'reverse kite'.*'etik'"):
        mine(reward)(QUERIES, ANSWERS)
