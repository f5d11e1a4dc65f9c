"""Text in, text out: the challenger prompt, the query read back, the rubric and the score."""

from __future__ import annotations

import time

import pytest

from language_self_play import prompts
from language_self_play.errors import ConfigError, InputFileError
from language_self_play.prompts import (
    challenger_prompt,
    criterion_prompt,
    fill,
    judge_prompt,
    parse_query,
    parse_score,
    rubric_criteria,
    rubric_text,
)

# ---------------------------------------------------------------- challenger prompt


def test_the_challenger_prompt_names_the_task_and_shows_the_template_between_the_tags():
    text = challenger_prompt("default", "riddles", "Riddle: {riddle}\nHint wanted: {yes_or_no}")
    assert 'Write one valid input for the task "riddles".' in text
    assert "<template>\nRiddle: {riddle}\nHint wanted: {yes_or_no}\n</template>" in text
    assert "{task}" not in text
    assert "{template}" not in text


def test_the_challenger_prompt_has_the_four_parts_of_box_1_in_order():
    text = challenger_prompt("default", "", "")
    parts = ("# Background", "# Request", "# Details", "# Rules")
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    assert "Where the task or the template is empty, use your own judgement." in text


def test_the_arenas_challenger_prompt_is_the_one_that_its_model_knows():
    assert challenger_prompt("arena", "", "{query}") == "Pose one task."


def test_values_with_braces_are_never_read_as_templates():
    text = challenger_prompt("default", "the {template} task", "{task}: {answer}")
    assert 'for the task "the {template} task"' in text
    assert "<template>\n{task}: {answer}\n</template>" in text
    assert fill("{a}{b}", a="{b}", b="{a}") == "{b}{a}"
    assert judge_prompt("{query} | {answer}", "{answer}", "{query}") == "{answer} | {query}"


def test_unknown_placeholders_and_single_braces_are_left_alone():
    assert fill("{a} {c} { } {} {a b} {", a="1") == "1 {c} { } {} {a b} {"


def test_backslashes_in_values_stay_backslashes():
    assert fill("{a}", a=r"\1 \g<0> \n") == r"\1 \g<0> \n"


def test_a_challenger_prompt_of_ones_own_is_read_from_its_file(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("Schreibe eine Aufgabe: {task} ({template}).", "utf-8")
    assert challenger_prompt(str(file), "Rätsel", "{x}") == "Schreibe eine Aufgabe: Rätsel ({x})."


def test_a_missing_prompt_file_is_named(tmp_path):
    with pytest.raises(
        InputFileError, match=r"challenger\.prompt = '.*nothere\.txt': no such file"
    ):
        challenger_prompt(str(tmp_path / "nothere.txt"), "", "")


# ---------------------------------------------------------------- the query read back


@pytest.mark.parametrize(
    ("completion", "template", "truncated", "query", "reason"),
    [
        ("What is love?", "", False, "What is love?", None),
        ("  What is love?\n", "", False, "What is love?", None),
        ("", "", False, "", "empty"),
        (" \n\t ", "", False, "", "empty"),
        ("What is lo", "", True, "What is lo", "truncated"),
        ("", "", True, "", "truncated"),  # cut off says more than empty
        ("<template>x</template>", "", False, "<template>x</template>", "tags"),
        ("x\n</template>", "", False, "x\n</template>", "tags"),
        ("<template> x", "{query}", False, "<template> x", "tags"),
        ("a < b and b > c", "", False, "a < b and b > c", None),
        ("27+48", "{query}", False, "27+48", None),
        ("{query}", "{query}", False, "{query}", "template"),
    ],
)
def test_a_malformed_query_keeps_its_text_and_gets_the_reason(
    completion, template, truncated, query, reason
):
    assert parse_query(completion, template, truncated) == (query, reason)


@pytest.mark.parametrize(
    ("template", "completion", "fits"),
    [
        ("Q: {q}", "Q: why?", True),
        ("Q: {q}", "Q:   why?", True),
        ("Q: {q}", "Q:\nwhy?", True),
        ("Q: {q}", "Q: why?\nAnd how?", True),
        ("Q: {q}", "why?", False),
        ("Q: {q}", "q: why?", False),
        ("Q: {q}", "Q:", False),
        ("Q: {q}", "Q: {q}", False),
        ("Q: {q}", "Q:  {q} ", False),
        ("Q: {q}", "Well. Q: why?", False),
        ("Q: {q}?", "Q: why?", True),
        ("Q: {q}?", "Q: why", False),
        ("Q: {q}?", "Q: why? Tell me", False),
        ("Story: {story}\nQuestion: {q}", "Story: a cat\nQuestion: who?", True),
        ("Story: {story}\nQuestion: {q}", "Story: a cat\r\n\r\nQuestion: who?", True),
        ("Story: {story}\nQuestion: {q}", "Story: a cat Question: who?", True),
        ("Story: {story}\nQuestion: {q}", "Story: a\nb\n\nc\nQuestion: who?", True),
        ("Story: {story}\nQuestion: {q}", "Story: a cat", False),
        ("Story: {story}\nQuestion: {q}", "Question: who?\nStory: a cat", False),
        ("Story: {story}\nQuestion: {q}", "Story: {story}\nQuestion: who?", False),
        ("Story: {story}\nQuestion: {q}", "Story: a cat\nQuestion: {q}", False),
        ("Story: {story}\nQuestion: {q}", "Story: \nQuestion: who?", False),
        ("  \n{q}\n ", "why?", True),
        ("{a}{b}", "xy", True),
        ("{a}{b}", "x", False),
        ("Is (a+b)* = {x}? [yes|no]", "Is (a+b)* = b? [yes|no]", True),
        ("Is (a+b)* = {x}? [yes|no]", "Is aab = b? yes", False),
        ("No placeholder at all.", "No placeholder at all.", True),
        ("No placeholder at all.", "Something else.", False),
    ],
)
def test_the_text_around_the_placeholders_must_be_there_and_every_placeholder_filled(
    template, completion, fits
):
    assert parse_query(completion, template, False).reason == (None if fits else "template")


def test_a_long_query_that_misses_a_template_of_five_placeholders_is_refused_in_no_time():
    # A model's 100 words must not cost the training loop seconds of backtracking.
    template = "{setting}\n{people}\n{story}\n{question}\n{choices}\nAnswer with one letter."
    start = time.process_time()
    assert parse_query("word " * 100, template, False).reason == "template"
    assert time.process_time() - start < 1.0


# ---------------------------------------------------------------- judge


def test_the_default_rubric_has_seven_criteria_and_numbers_them():
    criteria = rubric_criteria(rubric_text("default"))
    assert len(criteria) == prompts.MAX_SCORE == 7
    assert criteria[0] == (
        "It is possible to tell from the instruction what task the user wants done."
    )
    assert criteria[6] == "The user will probably like the form and the style of the response."


def test_the_default_rubric_asks_for_what_parse_score_reads():
    rubric = rubric_text("default")
    assert "<calculation>1 + 1 + 0 + 1 + 0 + 0 + 0 = 3</calculation>" in rubric
    assert "at most 100 words" in rubric
    assert parse_score(rubric) == 3


def test_the_judge_sees_query_and_answer_in_their_own_tags():
    text = judge_prompt(rubric_text("default"), "Why?", "Because.")
    assert "<instruction>\nWhy?\n</instruction>" in text
    assert "<response>\nBecause.\n</response>" in text


def test_the_arenas_judge_is_asked_in_the_words_that_its_model_knows():
    assert judge_prompt(rubric_text("arena"), "27+48", "57") == "Judge 27+48 => 57"


def test_a_criterion_is_asked_as_a_yes_or_no_question():
    text = criterion_prompt("The response is short.", "Why?", "{criterion}")
    assert "Is the following true? The response is short.\nAnswer with one word, yes or no." in text
    assert "<response>\n{criterion}\n</response>" in text


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("Grade {query}.", "{answer}"),
        ("Grade {answer}.", "{query}"),
        ("Grade { query }", "{query}"),
    ],
)
def test_a_rubric_file_without_a_placeholder_is_refused_by_field_and_placeholder(
    tmp_path, text, missing
):
    file = tmp_path / "rubric.txt"
    file.write_text(text, "utf-8")
    with pytest.raises(ConfigError) as refused:
        rubric_text(str(file))
    assert str(refused.value) == (
        f"self_reward.rubric = {str(file)!r}: the text has no {missing} to replace"
    )


@pytest.mark.parametrize("number", [0, 1, 6, 8])
def test_criteria_that_are_not_seven_are_refused(number):
    rubric = "\n".join(f"{i}. A criterion." for i in range(1, number + 1))
    with pytest.raises(ConfigError, match=rf"the rubric numbers {number} criteria, not 7"):
        rubric_criteria(rubric)


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("<score>0</score>", 0),
        ("<score>7</score>", 7),
        ("Good. <calculation>1 + 1 = 2</calculation> <score> 5 </score>", 5),
        ("<score>\n4\n</score>", 4),
        ("<score>2</score> no, rather <score>6</score>", 6),
        ("<score>07</score>", 7),
        ("<score>8</score>", None),
        ("<score>3</score> <score>9</score>", None),  # the last pair counts
        ("<score>-1</score>", None),
        ("<score>3.5</score>", None),
        ("<score>3/7</score>", None),
        ("<score></score>", None),
        ("<score>seven</score>", None),
        ("<score>3", None),
        ("3</score>", None),
        ("<SCORE>3</SCORE>", None),
        ("7", None),
        ("", None),
        pytest.param("<score>" + "9" * 5000 + "</score>", None, id="5000 digits"),
    ],
)
def test_the_score_is_the_integer_between_the_last_pair_of_score_tags(reply, score):
    assert parse_score(reply) == score
