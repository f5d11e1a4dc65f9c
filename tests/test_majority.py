"""Agreement with a group's majority."""

from __future__ import annotations

import time

import pytest

from language_self_play.rewards import build_reward
from language_self_play.rewards.majority import agreement, classify


@pytest.fixture
def build(make_config):
    built = []

    def make(**section):
        reward = build_reward(make_config(reward={"main": {"kind": "majority", **section}}))
        built.append(reward)
        return lambda answers: reward([f"query {i}" for i in range(len(answers))], answers).tolist()

    yield make
    for reward in built:
        reward.close()


def test_members_of_the_largest_class_earn_1():
    assert agreement([3, 5, 5, 3, 5]) == [0, 1, 1, 0, 1]


def test_a_tie_goes_to_the_class_whose_answer_came_first():
    assert agreement(["b", "a", "a", "b", "c"]) == [1, 0, 0, 1, 0]


def test_answers_without_anything_to_compare_have_no_vote_and_earn_0():
    assert agreement([None, None, None, 7]) == [0, 0, 0, 1]
    assert agreement([None, None]) == [0, 0]
    assert agreement([]) == []


def test_each_answer_is_compared_with_the_first_of_each_class_only():
    asked, classes = [], []
    values = {"a": 1, "A": 1, "b": 2, "B": 2, "á": 1}

    def run():
        written = ["a", "b", "A", "B", "á", "a", None]
        classes.extend((yield from classify(["a", "b", "A", "B", "á", "a", ""], written)))

    running = run()
    question = next(running)
    while question:
        asked.append(question)
        try:
            question = running.send(values[question[0]] == values[question[1]])
        except StopIteration:
            question = None
    assert classes == [0, 1, 0, 1, 0, 0, None]
    # The second "a" is written like the first and needs no question.
    assert asked == [("a", "b"), ("a", "A"), ("a", "B"), ("b", "B"), ("a", "á")]


def test_exact_votes_on_whole_answers(build):
    vote = build(method="exact")
    assert vote([["x", " y", "y\n"], ["", "", "z"]]) == [[0, 1, 1], [0, 0, 1]]


def test_regex_votes_on_the_first_group_of_the_last_match(build):
    vote = build(method="regex", pattern=r"answer: (\w*)")
    answers = [["answer: B", "no. answer: A", "answer: B. answer: A", "A", "answer: "]]
    assert vote(answers) == [[0, 1, 1, 0, 0]]


def test_mathematics_votes_on_the_value_of_the_last_expression(build):
    pytest.importorskip("math_verify")
    vote = build(method="math", workers=2)
    answers = [
        ["It is $\\frac{1}{2}$", "3", "so 0.5", "\\boxed{2/4}", "I don't know"],
        ["#### 7", "8", "3 + 4 = 7", "8.0", "x = 8"],
        ["none", "nothing", "at", "all", "here"],
    ]
    assert vote(answers) == [[1, 0, 1, 1, 0], [0, 1, 0, 1, 1], [0, 0, 0, 0, 0]]


def test_a_comparison_that_hangs_counts_as_unequal(build):
    pytest.importorskip("math_verify")
    vote = build(method="math", workers=1, timeout_s=1.0)
    assert vote([["5", "5", "6"]]) == [[1, 1, 0]]
    start = time.monotonic()
    assert vote([["5", "$9^{9^{9^{9}}}$", "\\boxed{5}"]]) == [[1, 0, 1]]
    assert time.monotonic() - start < 6.0
