"""Text in, text out: the challenger prompt, the query read back from its template, the rubric.

The structures follow the paper's Box 1 (challenger prompt) and Box 3 (quality self-reward); the
sentences are ours. `default` is for real models, `arena` for the built-in tiny one; a file of
one's own may stand in for either.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from language_self_play.arena.tiny_model import JUDGE_PROMPT, POSE_PROMPT
from language_self_play.errors import ConfigError
from language_self_play.recipe_files import read_text

START_TAG, END_TAG = "<template>", "</template>"

CHALLENGER_PROMPT = """\
# Background
A language task is a pair of an input and an output. In "translate into French", the input is an \
English sentence and the output is its French translation. In "write a function", the input is a \
description of what the function should do and the output is its source code.

# Request
Write one valid input for the task "{task}". It will be handed to another language agent, which \
has to produce the output. The input may be of any difficulty, easy or very hard, and it may be \
noisy, as real inputs are. Choose it so that it puts the other agent to the test or makes it \
think in an unusual way. Write exactly one input.

# Details
Copy the template that stands between the tags below, without the tags, and replace each \
placeholder in braces with your own text.
<template>
{template}
</template>

# Rules
- Do not write the answer, a hint to it, or anything that gives it away.
- Do not ask for what a language agent cannot do, such as opening a link or drawing a picture.
- Stop as soon as the template is filled in.
- Do not write the tags.
- Where the task or the template is empty, use your own judgement.\
"""

RUBRIC = """\
Below are a user's instruction and a response to it. Grade them with an additive score from 0 to \
7: start at 0 and add one point for each of the following that is true.

1. It is possible to tell from the instruction what task the user wants done.
2. The instruction is clear, specific and well structured.
3. The user who wrote the instruction will be able to understand the response.
4. The response deals with a significant part of what the instruction asks.
5. The response answers the core of the instruction usefully and comprehensively.
6. The response is clear, concise, well organised and helpful.
7. The user will probably like the form and the style of the response.

<instruction>
{query}
</instruction>

<response>
{answer}
</response>

First justify the score in at most 100 words. Then write the sum out between calculation tags, \
such as <calculation>1 + 1 + 0 + 1 + 0 + 0 + 0 = 3</calculation>, and last the total as one \
integer between score tags, such as <score>3</score>.\
"""

CRITERION_QUESTION = """\
Below are a user's instruction and a response to it.

<instruction>
{query}
</instruction>

<response>
{answer}
</response>

Is the following true? {criterion}
Answer with one word, yes or no.\
"""

MAX_SCORE = 7
SCORE_PREFIX = "<score>"

_CHALLENGER_PROMPTS = {"default": CHALLENGER_PROMPT, "arena": POSE_PROMPT}
_RUBRICS = {"default": RUBRIC, "arena": JUDGE_PROMPT}
_PLACEHOLDER = re.compile(r"\{(\w+)\}")


# ---------------------------------------------------------------- Challenger


def challenger_prompt(source: str, task: str, template: str) -> str:
    """The challenger prompt with its task and template filled in.

    `source` is `default`, `arena` or a file. Raises InputFileError for a file that can't be read.
    """
    text = _CHALLENGER_PROMPTS.get(source) or read_text(Path(source), "challenger.prompt")
    return fill(text, task=task, template=template)


class Parsed(NamedTuple):
    """A query read from a completion, or the reason why there is none."""

    query: str
    reason: str | None


def parse_query(completion: str, template: str, truncated: bool) -> Parsed:
    """The query in the Challenger's completion. Malformed ones keep their text and get a reason.

    truncated   cut off by the length limit
    empty       nothing but white space
    tags        the prompt's tags are echoed
    template    the text around the template's placeholders is not there,
                or a placeholder is still unfilled
    """
    query = completion.strip()
    if truncated:
        return Parsed(query, "truncated")
    if not query:
        return Parsed(query, "empty")
    if START_TAG in query or END_TAG in query:
        return Parsed(query, "tags")
    if template.strip() and not _template_pattern(template.strip()).fullmatch(query):
        return Parsed(query, "template")
    return Parsed(query, None)


@lru_cache
def _template_pattern(template: str) -> re.Pattern[str]:
    """Matches `template` with each {placeholder} filled with text other than itself.

    A placeholder ends where the literal text after it first appears (an atomic group), so that
    matching takes linear time on whatever a model writes.
    """
    placeholders = list(_PLACEHOLDER.finditer(template))
    if not placeholders:
        return re.compile(_literal(template))
    pattern = _literal(template[: placeholders[0].start()])
    ends = [p.start() for p in placeholders[1:]] + [len(template)]
    for placeholder, end in zip(placeholders, ends, strict=True):
        unfilled = rf"(?!\s*{re.escape(placeholder.group())}\s*)"
        literal = _literal(template[placeholder.end() : end])
        last = r"\Z" if end == len(template) else ""
        pattern += rf"(?>{unfilled}\s*\S[\s\S]*?{literal}{last})"
    return re.compile(pattern)


def _literal(text: str) -> str:
    # White space of the template matches any white space, so that line ends don't matter.
    return r"\s+".join(map(re.escape, re.split(r"\s+", text)))


# ---------------------------------------------------------------- judge


def rubric_text(source: str) -> str:
    """The judge's instructions with {query} and {answer}: `default`, `arena` or a file.

    Raises ConfigError if a placeholder is missing, InputFileError for an unreadable file.
    """
    text = _RUBRICS.get(source) or read_text(Path(source), "self_reward.rubric")
    for needed in ("{query}", "{answer}"):
        if needed not in text:
            raise ConfigError(
                f"self_reward.rubric = {source!r}: the text has no {needed} to replace"
            )
    return text


def rubric_criteria(rubric: str) -> list[str]:
    """The rubric's numbered yes/no criteria, for mode `criteria`. Raises ConfigError if not seven."""
    criteria = re.findall(r"^\s*\d+\.\s+(.+)$", rubric, re.MULTILINE)
    if len(criteria) != MAX_SCORE:
        raise ConfigError(
            f'self_reward.mode = "criteria": the rubric numbers {len(criteria)} criteria, not'
            f" {MAX_SCORE}; number them 1. to {MAX_SCORE}., one a line, or use another mode"
        )
    return criteria


def judge_prompt(rubric: str, query: str, answer: str) -> str:
    """The question that is put to the judge about one (query, answer) pair."""
    return fill(rubric, query=query, answer=answer)


def criterion_prompt(criterion: str, query: str, answer: str) -> str:
    """The yes/no question about one criterion."""
    return fill(CRITERION_QUESTION, query=query, answer=answer, criterion=criterion)


def parse_score(reply: str) -> int | None:
    """The integer 0 to 7 between the last pair of score tags, or None if there is none."""
    found = re.findall(r"<score>\s*0*(\d+)\s*</score>", reply)
    if found and len(found[-1]) == 1 and int(found[-1]) <= MAX_SCORE:
        return int(found[-1])
    return None


def fill(text: str, /, **values: str) -> str:
    """`text` with each {name} replaced in one pass, so that values are never read as templates."""
    return _PLACEHOLDER.sub(lambda m: values.get(m.group(1), m.group()), text)
