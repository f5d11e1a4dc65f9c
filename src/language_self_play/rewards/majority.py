"""Agreement with the majority of a query's own answers, which needs no key.

TTRL (Zuo et al. 2025, arXiv 2504.16084) and R-Zero (Huang et al. 2025, arXiv 2508.05004) take the
most frequent answer for the label.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Sequence

from language_self_play.config import Config, MajorityReward
from language_self_play.errors import RewardError
from language_self_play.extras import require
from language_self_play.rewards import Reward
from language_self_play.rewards.mathematics import MathWorkers, WorkerError
from language_self_play.rewards.verifier import last_group

Question = tuple[str, str]  # are these two equal?


class Majority(Reward):
    """R(q, a_j) = 1 if a_j is in the largest class of equal answers to q, else 0.

    Of classes of one size the one counts whose first answer came first. An answer without anything
    to compare earns 0 and has no vote.
    """

    def __init__(self, name: str, says: Callable[[str], str | None]):
        self.name = name
        self.says = says

    def __call__(
        self, queries: list[str], answers: list[list[str]], keys: list[str | None]
    ) -> list[list[float]]:
        return [agreement([self.says(answer) for answer in group]) for group in answers]


class MathMajority(Reward):
    """The same, with answers equal if math-verify finds their last expressions equal."""

    def __init__(self, name: str, workers: MathWorkers):
        self.name = name
        self.workers = workers

    def __call__(
        self, queries: list[str], answers: list[list[str]], keys: list[str | None]
    ) -> list[list[float]]:
        try:
            read = self.workers.read([answer for group in answers for answer in group])
            rows = iter(read)
            written = [[next(rows) for _ in group] for group in answers]
            return [agreement(classes) for classes in self._classes(answers, written)]
        except WorkerError as error:
            raise RewardError(f"reward.{self.name}: math-verify can't start: {error}") from None

    def _classes(
        self, answers: list[list[str]], written: list[list[str | None]]
    ) -> list[list[int | None]]:
        """The class of each answer; all groups ask their questions side by side."""
        classifying = [
            classify(group, expressions)
            for group, expressions in zip(answers, written, strict=True)
        ]
        classes: list[list[int | None]] = [[] for _ in answers]
        verdicts: dict[int, bool | None] = dict.fromkeys(range(len(answers)))
        while verdicts:
            questions: dict[int, Question] = {}
            for i, verdict in verdicts.items():
                try:
                    questions[i] = classifying[i].send(verdict)
                except StopIteration as done:
                    classes[i] = done.value
            equal = self.workers.equal(list(questions.values()))
            verdicts = {i: bool(e) for i, e in zip(questions, equal, strict=True)}
        return classes

    def close(self) -> None:
        self.workers.close()


def build(name: str, section: MajorityReward, config: Config) -> Reward:
    """The vote of `section.method`. Raises ConfigError without math-verify."""
    match section.method:
        case "math":
            require("math_verify", "maths", f'reward.{name}.method = "math"')
            return MathMajority(name, MathWorkers(section.timeout_s, section.workers))
        case "exact":
            return Majority(name, lambda answer: answer.strip() or None)
        case "regex":
            assert section.pattern is not None  # the section checks it
            pattern = re.compile(section.pattern)
            return Majority(
                name, lambda answer: (last_group(pattern, answer) or "").strip() or None
            )


def agreement(classes: Sequence[object]) -> list[float]:
    """1 for members of the largest class, the first of those; None is no class."""
    sizes: dict[object, int] = {}  # in the order in which they came
    for c in classes:
        if c is not None:
            sizes[c] = sizes.get(c, 0) + 1
    largest = max(sizes, key=sizes.__getitem__, default=None)
    return [float(c is not None and c == largest) for c in classes]


def classify(
    answers: list[str], written: list[str | None]
) -> Generator[Question, bool | None, list[int | None]]:
    """The class of each answer, None for one that says nothing. Asks whether two are equal.

    Each answer is compared with the first of every class, unless it is written like one before.
    """
    firsts: list[str] = []
    class_of: dict[str, int] = {}  # by how the expression is written
    classes: list[int | None] = []
    for answer, expression in zip(answers, written, strict=True):
        if expression is None:
            classes.append(None)
            continue
        if expression not in class_of:
            for number, first in enumerate(firsts):
                if (yield first, answer):
                    class_of[expression] = number
                    break
            else:
                class_of[expression] = len(firsts)
                firsts.append(answer)
        classes.append(class_of[expression])
    return classes
