"""Accuracy on questions with keys: answers are sampled and verified. GSM8K, MATH, HumanEval and kin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from language_self_play.chat import Chat
from language_self_play.config import GREEDY, QuestionSet
from language_self_play.data import load_keyed_questions, place_of_keyed
from language_self_play.evaluate.outcomes import Record
from language_self_play.players import check_query
from language_self_play.randomness import permutation, stream_key
from language_self_play.rewards.verifier import build_verifier
from language_self_play.sampling import Sampler
from language_self_play.types import Group

# Which questions a limit leaves does not depend on a run's seed: all runs are asked the same.
CHOICE_SEED = 0

T = TypeVar("T")


class Exam:
    """A question set, ready to be asked. Left as a context, it ends the verifier's processes."""

    def __init__(self, name: str, section: QuestionSet):
        """Read the questions and check what checks their answers; no weights are needed.

        Raises InputFileError, ConfigError or RewardError that names eval.accuracy.NAME.
        """
        self.name, self.section = name, section
        self.setting = f"eval.accuracy.{name}"
        everything, are_programs = load_keyed_questions(section, self.setting)
        self.size = len(everything)
        self.questions = chosen(everything, section.limit)
        method = section.method
        if method == "auto":
            method = "code" if are_programs else "math"
        self.method = method
        self.verifier = build_verifier(self.setting, section, method)

    def __enter__(self) -> Exam:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self.verifier.close()

    def prompts(
        self, chat: Chat, context_length: int, system_prompt: str | None = None
    ) -> list[list[int]]:
        """The tokens of every question. Raises ConfigError for one that leaves no room to answer."""
        texts = [self.section.prompt.replace("{query}", q.query) for q in self.questions]

        def named(place: int) -> str:
            return (
                f"{place_of_keyed(self.questions[place], self.section, self.setting)}: the question"
            )

        return fitting_prompts(texts, named, chat, context_length, system_prompt)

    def ask(
        self, sampler: Sampler, prompts: Sequence[list[int]], start: int = 0, end: int | None = None
    ) -> list[Record]:
        """The records of questions `start` to `end`, from the sampler's weights.

        `prompts` are those of all questions. Raises RewardError if answers can't be checked.
        """
        return self.mark(self.draw(sampler, prompts[start:end]), start, end)

    def draw(self, sampler: Sampler, prompts: Sequence[list[int]]) -> list[Group]:
        """The answers to `prompts`, a group each."""
        section = self.section
        sampling = section if section.temperature else GREEDY
        return sampler.sample(
            list(prompts), section.num_answers, "evaluation", sampling, section.max_tokens
        )

    def mark(self, groups: list[Group], start: int = 0, end: int | None = None) -> list[Record]:
        """The records of questions `start` to `end`, of which `groups` are the answers.

        Raises RewardError if they can't be checked.
        """
        some = self.questions[start:end]
        texts = [[c.text for c in group.completions] for group in groups]
        verdicts = self.verifier([q.query for q in some], texts, [q.key for q in some])
        return [
            {
                "set": self.name,
                "id": question.id,
                "query": question.query,
                "key": question.key,
                "answers": [
                    {
                        "text": completion.text,
                        "right": verdict == 1,
                        "tokens": len(completion.tokens),
                        "finish_reason": completion.finish_reason,
                    }
                    for completion, verdict in zip(group.completions, row, strict=True)
                ],
            }
            for question, group, row in zip(some, groups, verdicts, strict=True)
        ]


def fitting_prompts(
    texts: Sequence[str],
    named: Callable[[int], str],
    chat: Chat,
    context_length: int,
    system_prompt: str | None,
) -> list[list[int]]:
    """The tokens of each text. Raises ConfigError for the one at `named`'s place that leaves no room."""
    prompts = [chat.encode(text, system_prompt) for text in texts]
    for place, tokens in enumerate(prompts):
        if len(tokens) >= context_length:
            check_query(named(place), tokens, context_length)
    return prompts


def chosen(questions: list[T], limit: int) -> list[T]:
    """`limit` of the questions in their order, drawn once and for all; all of them for 0."""
    if limit == 0 or limit >= len(questions):
        return questions
    order = permutation(stream_key(CHOICE_SEED, "questions"), len(questions))
    return [questions[place] for place in sorted(order[:limit])]
