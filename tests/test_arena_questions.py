"""Where arena queries come from: the human distribution and the held-out set."""

from __future__ import annotations

import inspect
import json
import random
from collections import Counter
from importlib import resources

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from language_self_play.arena import questions
from language_self_play.arena.tasks import (
    TASKS,
    TIERS,
    Unsolvable,
    describe,
    is_held_out_query,
    parse,
    space_size,
)

FUZZ = settings(max_examples=300, deadline=None, database=None, derandomize=True)
seeds = st.integers(0, 2**32)

HUMAN_QUERIES = resources.files("language_self_play") / "arena" / "human_queries.jsonl"

GOLDEN_QUESTIONS = {
    "easy": ["21+15", "3-3", "reverse wk", "sort zn", "82+70", "75-61"],
    "medium": ["1+895", "899-74", "14+4+19", "reverse dcpy", "sort ziksr", "307+838"],
    "hard": ["10+7240", "3286-51", "5+259+5", "250*1", "reverse hoovdfq", "sort gjvyeeu"],
}


@FUZZ
@given(seeds, st.sampled_from(TIERS), st.sampled_from(TASKS))
def test_draw_query_is_solvable_and_of_the_tier_and_task_that_were_asked_for(seed, tier, task):
    problem = parse(questions.draw_query(random.Random(seed), tier, task))
    assert (problem.tier, problem.task) == (tier, task)


def test_draw_query_draws_all_six_tasks_when_none_is_asked_for():
    rng = random.Random(0)
    drawn = Counter(parse(questions.draw_query(rng, "hard")).task for _ in range(1200))
    # 200 each; 5 standard deviations of a binomial (1200, 1/6) are 64.5.
    assert set(drawn) == {"add", "subtract", "sum", "multiply", "reverse", "sort"}
    assert all(135 < count < 265 for count in drawn.values())


@pytest.mark.parametrize(
    ("tier", "task", "sizes"),
    [("medium", "reverse", {4, 5}), ("hard", "sort", {6, 7}), ("easy", "add", {1, 2})],
)
def test_draw_query_draws_every_size_of_the_tier_equally_often(tier, task, sizes):
    rng = random.Random(0)
    drawn = Counter()
    for _ in range(2000):
        operands = parse(questions.draw_query(rng, tier, task)).operands
        drawn[max(len(str(operand)) for operand in operands)] += 1
    assert set(drawn) == sizes
    # 1000 each; 5 standard deviations of a binomial (2000, 1/2) are 112.
    assert all(888 < count < 1112 for count in drawn.values())


@FUZZ
@given(seeds, st.sampled_from(TIERS))
def test_draw_learnable_query_is_never_held_out(seed, tier):
    query = questions.draw_learnable_query(random.Random(seed), tier)
    assert parse(query).tier == tier
    assert not is_held_out_query(query)


@FUZZ
@given(seeds)
def test_a_flawed_query_is_always_rejected(seed):
    query = questions.draw_flawed_query(random.Random(seed))
    with pytest.raises(Unsolvable):
        parse(query)


def test_flawed_queries_show_every_reason():
    rng = random.Random(0)
    reasons = {describe(questions.draw_flawed_query(rng))["unsolvable"] for _ in range(500)}
    assert reasons == {
        "negative difference",
        "leading zero",
        "too big",
        "too short",
        "unknown form",
    }


def test_human_queries_are_never_held_out_and_mostly_easy():
    rng = random.Random(0)
    drawn = [questions.draw_human_query(rng) for _ in range(4000)]
    assert not any(map(is_held_out_query, drawn))
    tiers = Counter(describe(query)["tier"] for query in drawn)
    # Shares 0.94 · (0.6, 0.3, 0.1) and 0.06, of 4000; within 5 standard deviations.
    assert 2100 < tiers["easy"] < 2413  # 2256 ± 157
    assert 986 < tiers["medium"] < 1270  # 1128 ± 142
    assert 284 < tiers["hard"] < 468  # 376 ± 92
    assert 165 < tiers[None] < 315  # 240 ± 75


# ---------------------------------------------------------------- the held-out set


@pytest.fixture(scope="module")
def held_out():
    return questions.held_out_problems()


def test_there_are_300_held_out_questions_a_tier(held_out):
    assert Counter(problem.tier for _, problem in held_out) == {
        "easy": 300,
        "medium": 300,
        "hard": 300,
    }


def test_every_evaluation_question_is_held_out_and_stands_with_its_problem(held_out):
    assert all(is_held_out_query(query) for query, _ in held_out)
    assert all(parse(query) == problem for query, problem in held_out)


def test_every_evaluation_question_comes_from_a_space_of_at_least_5000(held_out):
    assert min(space_size(problem.task, problem.tier) for _, problem in held_out) >= 5_000


def test_no_evaluation_question_is_asked_twice(held_out):
    assert len({query for query, _ in held_out}) == 900


def test_tasks_take_turns_within_a_tier(held_out):
    counts = Counter((problem.tier, problem.task) for _, problem in held_out)
    # 300 among the large spaces: 4 of the easy tier, 5 of the medium one, 6 of the hard one.
    assert {tier: n for (tier, _), n in counts.items()} == {"easy": 75, "medium": 60, "hard": 50}
    assert Counter(tier for tier, _ in counts) == {"easy": 4, "medium": 5, "hard": 6}


def test_the_evaluation_set_is_the_same_every_time_whatever_the_global_random_state(held_out):
    random.seed(3)
    draw_again = inspect.unwrap(questions.held_out_problems)  # what is behind its cache
    assert list(draw_again()) == list(held_out)


def test_the_evaluation_set_is_the_one_that_numbers_were_reported_on(held_out):
    by_tier = {t: [q for q, p in held_out if p.tier == t][:6] for t in TIERS}
    assert by_tier == GOLDEN_QUESTIONS


# ---------------------------------------------------------------- the 1,000 human queries


@pytest.fixture(scope="module")
def shipped():
    if not HUMAN_QUERIES.is_file():
        pytest.skip("arena/human_queries.jsonl is not there yet")
    return [json.loads(line)["prompt"] for line in HUMAN_QUERIES.read_text("utf-8").splitlines()]


def test_there_are_a_thousand_different_human_queries_all_solvable_and_none_held_out(shipped):
    assert len(shipped) == len(set(shipped)) == 1000
    assert all(describe(query)["unsolvable"] is None for query in shipped)
    assert not any(map(is_held_out_query, shipped))


def test_the_shipped_human_queries_are_what_the_module_draws(shipped):
    assert shipped == questions.human_queries()


def test_the_shipped_human_queries_are_mostly_easy(shipped):
    tiers = Counter(parse(query).tier for query in shipped)
    assert tiers["easy"] > tiers["medium"] > tiers["hard"] > 50
