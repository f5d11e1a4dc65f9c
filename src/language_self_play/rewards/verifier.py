"""1 for an answer that agrees with the key of its query: as mathematics, as text, by unit tests."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Callable

from language_self_play.config import Config, Verifier, VerifierReward
from language_self_play.errors import RewardError
from language_self_play.extras import require
from language_self_play.rewards import Reward, shown
from language_self_play.rewards.mathematics import MathWorkers, WorkerError
from language_self_play.rewards.sandbox import IsolationError, Sandbox

# A block of Markdown: its language, its text. One that is cut off goes to the end.
FENCED = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.M | re.S)
PYTHON = {"python", "python3", "py"}


class TextVerifier(Reward):
    """1 where `agrees(answer, key)`."""

    def __init__(
        self, setting: str, agrees: Callable[[str, str | None], bool], needs_key: bool = False
    ) -> None:
        self.setting = setting
        self.agrees = agrees
        self.needs_key = needs_key

    def __call__(
        self, queries: list[str], answers: list[list[str]], keys: list[str | None]
    ) -> list[list[float]]:
        if self.needs_key:
            known_keys(self.setting, queries, keys)
        return [
            [float(self.agrees(answer, key)) for answer in group]
            for group, key in zip(answers, keys, strict=True)
        ]


class MathVerifier(Reward):
    """1 where math-verify finds answer and key equal; 0 also where it finds nothing in either."""

    def __init__(self, setting: str, workers: MathWorkers):
        self.setting = setting
        self.workers = workers

    def __call__(
        self, queries: list[str], answers: list[list[str]], keys: list[str | None]
    ) -> list[list[float]]:
        known = known_keys(self.setting, queries, keys)
        pairs = [(k, a) for k, group in zip(known, answers, strict=True) for a in group]
        try:
            verdicts = self.workers.equal(pairs)
        except WorkerError as error:
            raise RewardError(f"{self.setting}: math-verify can't start: {error}") from None
        if pairs and all(verdict is None for verdict in verdicts):
            raise RewardError(
                f'{self.setting}: method = "math" finds no mathematics in any key, such as'
                f' {shown(known[0])}; method = "exact" compares texts'
            )
        rows = iter(verdicts)
        return [[float(bool(next(rows))) for _ in group] for group in answers]

    def close(self) -> None:
        self.workers.close()


class CodeVerifier(Reward):
    """1 where the answer's program, followed by the key's unit tests, runs to its end.

    A query that is the beginning of a program, as HumanEval's are, stands before the answer: the
    answer may go on from it, or define the function again, by its imports and what else it defines.
    """

    def __init__(self, setting: str, sandbox: Sandbox):
        self.setting = setting
        self.sandbox = sandbox

    def __call__(
        self, queries: list[str], answers: list[list[str]], keys: list[str | None]
    ) -> list[list[float]]:
        known = known_keys(self.setting, queries, keys)
        for key in known:
            _refuse_value(self.setting, key)
        programs = [
            [f"{beginning_in(query)}{code_in(answer)}\n\n{key}\n" for answer in group]
            for query, key, group in zip(queries, known, answers, strict=True)
        ]
        once = list(dict.fromkeys(program for group in programs for program in group))
        try:
            passed = dict(zip(once, self.sandbox.run_all(once), strict=True))
        except IsolationError as error:
            raise RewardError(_refusal(self.setting, error)) from None
        return [[float(passed[program]) for program in group] for group in programs]

    def close(self) -> None:
        self.sandbox.close()


def _refuse_value(setting: str, key: str) -> None:
    """Raises RewardError for a key that is a Python value: as a program it tests nothing."""
    try:
        ast.literal_eval(key.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return
    raise RewardError(
        f"{setting}: the key {shown(key)} is a value, not a program that tests; answer_column names"
        " the column with the tests"
    )


def build(name: str, section: VerifierReward, config: Config) -> Reward:
    """The verifier that a reward's table asks for. Raises as build_verifier."""
    return build_verifier(f"reward.{name}", section, section.method)


def build_verifier(setting: str, section: Verifier, method: str) -> Reward:
    """The verifier of `method`, which errors call by `setting`.

    Raises ConfigError without math-verify, RewardError if programs can't be isolated.
    """
    match method:
        case "math":
            require("math_verify", "maths", f'{setting}.method = "math"')
            return MathVerifier(setting, MathWorkers(section.timeout_s, section.workers))
        case "code":
            return CodeVerifier(setting, _checked_sandbox(setting, section))
        case "exact":
            return TextVerifier(setting, lambda a, k: k is not None and same(a, k), needs_key=True)
        case "regex":
            assert section.pattern is not None  # the section checks it
            pattern = re.compile(section.pattern)
            return TextVerifier(setting, lambda a, k: _matches(pattern, a, k))
    raise AssertionError(method)


def same(a: str, b: str) -> bool:
    """Equal but for white space at their ends."""
    return a.strip() == b.strip()


def last_group(pattern: re.Pattern[str], text: str) -> str | None:
    """The first group of the last match; None if there is none."""
    matches = list(pattern.finditer(text))
    return matches[-1][1] if matches else None


def code_in(answer: str) -> str:
    """The last block fenced as Python, else the last fenced block, else the whole answer."""
    blocks = FENCED.findall(answer)
    python = [text for language, text in blocks if language.lower() in PYTHON]
    return (python or [text for _, text in blocks] or [answer])[-1]


def beginning_in(query: str) -> str:
    """`query` with a line end, if it is a Python program that defines something; else nothing."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of what stands in its texts
            body = ast.parse(query).body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return ""
    defines = any(isinstance(part, ast.FunctionDef | ast.ClassDef) for part in body)
    return f"{query}\n" if defines else ""


def known_keys(setting: str, queries: list[str], keys: list[str | None]) -> list[str]:
    """The keys, all of which are known. Raises RewardError that names the first query without."""
    known = [key for key in keys if key is not None]
    if len(known) < len(keys):
        query = queries[keys.index(None)]
        raise RewardError(
            f"{setting}: the query {shown(query)} has no key to compare answers with; give one"
            ' in data.answer_column, or use kind = "majority", which needs none'
        )
    return known


def _matches(pattern: re.Pattern[str], answer: str, key: str | None) -> bool:
    found = last_group(pattern, answer)
    if key is None:
        return pattern.search(answer) is not None
    return found is not None and same(found, key)


def _checked_sandbox(setting: str, section: Verifier) -> Sandbox:
    sandbox = Sandbox(section.timeout_s, section.memory_mib, section.workers)
    try:
        sandbox.check()
    except IsolationError as error:
        sandbox.close()
        raise RewardError(_refusal(setting, error)) from None
    return sandbox


def _refusal(setting: str, error: IsolationError) -> str:
    return (
        f'{setting}.method = "code": runs programs that a model wrote, and can\'t isolate them'
        f" here: {error}; docs/rewards/verifier.md says what it needs"
    )
