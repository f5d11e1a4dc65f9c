"""Accuracy on question sets: published data through the whole path, and what is refused."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from language_self_play.config import QuestionSet
from language_self_play.errors import ConfigError, InputFileError, RewardError
from language_self_play.evaluate.exam import Exam
from language_self_play.evaluate.outcomes import set_metrics
from language_self_play.types import Completion, Group

CONTEXT = 4096


class Scripted:
    """A sampler whose answers are those of a function of the prompt's text and the answer's number."""

    context_length = CONTEXT
    batch_size = 8
    step = 0

    def __init__(self, answer: Callable[[str, int], str]):
        self.answer = answer
        self.chat = self
        self.asked: list[tuple[str, int, Any, int]] = []

    def sync(self, model: Any, step: int) -> None:
        self.step = step

    def encode(self, user: str, system: str | None = None) -> list[int]:
        return [ord(c) for c in f"{system}|{user}" if system] or [ord(c) for c in user]

    def sample(self, prompts, n, role, settings, max_tokens) -> list[Group]:
        groups = []
        for prompt in prompts:
            self.asked.append((role, n, settings, max_tokens))
            texts = [self.answer("".join(map(chr, prompt)), j) for j in range(n)]
            groups.append(
                Group(prompt, [Completion([7] * 3, text, [0.0] * 3, "stop") for text in texts])
            )
        return groups


def take(exam: Exam, answer: Callable[[str, int], str], system: str | None = None) -> list[dict]:
    sampler = Scripted(answer)
    return exam.ask(sampler, exam.prompts(sampler, CONTEXT, system))


def accuracy_of(exam: Exam, answer: Callable[[str, int], str]) -> dict[str, float]:
    return set_metrics(exam.name, take(exam, answer), exam.section.pass_at)


def write(file: Path, *rows: Any) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture
def sums(tmp_path: Path) -> str:
    rows = [{"question": f"{i}+{i}=", "answer": str(2 * i)} for i in range(1, 11)]
    return write(tmp_path / "sums.jsonl", *rows)


def double(question: str, j: int = 0) -> str:
    return str(2 * int(question.split("+")[0]))


# ---------------------------------------------------------------- published data


@pytest.mark.slow
def test_gsm8ks_own_answers_are_all_right_and_others_all_wrong(test_data: Path):
    path = test_data / "data" / "gsm8k" / "test.jsonl"
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    gold = {row["question"]: row["answer"] for row in rows}
    with Exam("gsm8k", QuestionSet(path=str(path), limit=0)) as exam:
        assert (exam.method, len(exam.questions), exam.size) == ("math", 1319, 1319)
        assert exam.questions[0].id == "1"
        right = accuracy_of(exam, lambda question, j: gold[question])
        # One more than the key is never the key.
        wrong = accuracy_of(exam, lambda q, j: f"The answer is {number_of(gold[q]) + 1}.")
    assert right["eval/gsm8k/accuracy"] == 1.0
    assert wrong["eval/gsm8k/accuracy"] == 0.0


def number_of(answer: str) -> int:
    return int(answer.rsplit("#### ", 1)[1].replace(",", ""))


@pytest.fixture(scope="module")
def humaneval(test_data: Path) -> tuple[str, dict[str, dict[str, str]]]:
    path = test_data / "data" / "humaneval" / "HumanEval.jsonl.gz"
    with gzip.open(path, "rt") as lines:
        rows = [json.loads(line) for line in lines]
    return str(path), {row["prompt"]: row for row in rows}


@pytest.mark.slow
def test_humanevals_own_solutions_are_all_right_as_continuations_and_as_whole_functions(humaneval):
    path, rows = humaneval

    def solution(prompt: str, j: int) -> str:
        body = rows[prompt]["canonical_solution"]
        if j == 0:
            return body
        # As chat models answer: the function alone, without the imports that stand before it.
        signature = prompt[prompt.rindex(f"def {rows[prompt]['entry_point']}(") :]
        return f"Here it is:\n```python\n{signature}{body}```\nIt works."

    section = QuestionSet(path=path, limit=0, num_answers=2, temperature=1.0, pass_at=[1, 2])
    with Exam("humaneval", section) as exam:
        assert (exam.method, len(exam.questions)) == ("code", 164)
        assert exam.questions[3].id == "HumanEval/3"
        answered = take(exam, solution)
    wrong = [q["id"] for q in answered if not all(a["right"] for a in q["answers"])]
    assert wrong == []
    metrics = set_metrics("humaneval", answered, [1, 2])
    assert (metrics["eval/humaneval/accuracy"], metrics["eval/humaneval/pass_at_2"]) == (1.0, 1.0)


def test_humanevals_functions_that_return_nothing_are_all_wrong(humaneval):
    path, _ = humaneval
    with Exam("humaneval", QuestionSet(path=path, limit=12)) as exam:
        assert accuracy_of(exam, lambda prompt, j: "    pass\n")["eval/humaneval/accuracy"] == 0.0


# ---------------------------------------------------------------- what is measured


def test_pass_at_k_counts_right_answers_question_by_question(sums: str):
    section = QuestionSet(path=sums, num_answers=4, temperature=1.0, pass_at=[1, 2, 4])

    def answer(question: str, j: int) -> str:
        # 1+1 is answered right 4 times of 4, 2+2 once, the others never.
        first = int(question.split("+")[0])
        return double(question) if first == 1 or (first == 2 and j == 3) else "0.5"

    with Exam("sums", section) as exam:
        metrics = accuracy_of(exam, answer)
    # pass@1: (1 + 1/4) / 10; pass@2: (1 + 1 − C(3,2)/C(4,2)) / 10 = 1.5 / 10; pass@4: 2 / 10.
    assert metrics["eval/sums/accuracy"] == pytest.approx(0.125)
    assert metrics["eval/sums/pass_at_2"] == pytest.approx(0.15)
    assert metrics["eval/sums/pass_at_4"] == pytest.approx(0.2)
    # pass@4 is a share, 2 of 10, with Wilson's interval: 1.96 √(0.016 + 0.0096036) / 1.3841459;
    # pass@1 a mean of 1, ¼ and eight 0: squares 1.0625 − 10 · 0.125² = 0.90625, √(0.90625 / 9 / 10).
    assert metrics["eval/sums/pass_at_4_ci95"] == pytest.approx(0.22657769, rel=1e-6)
    assert metrics["eval/sums/accuracy_ci95"] == pytest.approx(0.19667576, rel=1e-6)
    assert (metrics["eval/sums/truncated"], metrics["eval/sums/length"]) == (0.0, 3.0)


def test_accuracy_is_there_whichever_k_are_asked_for(sums: str):
    section = QuestionSet(path=sums, num_answers=2, temperature=1.0, pass_at=[2])
    with Exam("sums", section) as exam:
        metrics = accuracy_of(exam, lambda question, j: double(question) if j else "0.5")
    assert (metrics["eval/sums/accuracy"], metrics["eval/sums/pass_at_2"]) == (0.5, 1.0)


def test_a_record_holds_question_key_and_every_answer_with_its_verdict(sums: str):
    with Exam("sums", QuestionSet(path=sums, limit=0)) as exam:
        answered = take(exam, lambda question, j: double(question) if question[0] < "3" else "7")
    assert answered[2] == {
        "set": "sums",
        "id": "3",
        "query": "3+3=",
        "key": "6",
        "answers": [{"text": "7", "right": False, "tokens": 3, "finish_reason": "stop"}],
    }
    # 1, 2 and 10, which begins with 1.
    assert [q["answers"][0]["right"] for q in answered] == [True] * 2 + [False] * 7 + [True]


def test_the_question_is_asked_within_the_prompt_and_checked_without_it(sums: str):
    section = QuestionSet(path=sums, prompt="Say {query} briefly.", max_tokens=17, method="exact")
    sampler = Scripted(lambda prompt, j: double(prompt.removeprefix("Be kind.|Say ")))
    with Exam("sums", section) as exam:
        answered = exam.ask(sampler, exam.prompts(sampler, CONTEXT, "Be kind."))
    assert all(q["answers"][0]["right"] for q in answered)
    assert answered[0]["query"] == "1+1="
    assert sampler.asked[0] == ("evaluation", 1, section, 17)


def test_a_limit_leaves_the_same_questions_in_every_run_spread_over_the_file(sums: str):
    ids = []
    for _ in range(2):
        with Exam("sums", QuestionSet(path=sums, limit=4)) as exam:
            ids.append([int(q.id) for q in exam.questions])
            assert exam.size == 10
    assert ids[0] == ids[1] == sorted(ids[0])
    assert len(set(ids[0])) == 4
    assert ids[0] != [1, 2, 3, 4]


def test_some_of_the_questions_can_be_asked_alone(sums: str):
    sampler = Scripted(double)
    with Exam("sums", QuestionSet(path=sums)) as exam:
        prompts = exam.prompts(sampler, CONTEXT)
        whole = exam.ask(sampler, prompts)
        assert exam.ask(sampler, prompts, 0, 3) + exam.ask(sampler, prompts, 3) == whole


def test_mbpps_lists_of_tests_are_programs_and_maths_problems_have_solutions(tmp_path: Path):
    mbpp = write(
        tmp_path / "mbpp.jsonl",
        {
            "task_id": 11,
            "prompt": "Write f.",
            "test_list": ["assert f(1) == 2", "assert f(2) == 3"],
        },
    )
    with Exam("mbpp", QuestionSet(path=mbpp)) as exam:
        assert (exam.method, exam.questions[0].id) == ("code", "11")
        assert take(exam, lambda p, j: "def f(x): return x + 1")[0]["answers"][0]["right"]
        assert not take(exam, lambda p, j: "def f(x): return 2")[0]["answers"][0]["right"]
    maths = write(
        tmp_path / "math.jsonl",
        {
            "problem": "Half of one?",
            "level": "Level 1",
            "solution": r"It is $\boxed{\frac{1}{2}}$.",
        },
    )
    with Exam("math", QuestionSet(path=maths)) as exam:
        assert take(exam, lambda p, j: r"\boxed{0.5}")[0]["answers"][0]["right"]


# ---------------------------------------------------------------- what is refused

BAD_ROWS: dict[str, tuple[list[Any], dict[str, Any], str]] = {
    "no question": ([{"text": "a", "answer": "b"}], {}, r"s.jsonl:1: has none of prompt, query"),
    "no key column": (
        [{"question": "a", "key": "b"}],
        {},
        r"s.jsonl:1: has none of answer, test, .*columns are question, key; .*"
        r"eval.accuracy.s.answer_column names",
    ),
    "a missing key": (
        [{"question": "a", "answer": "1"}, {"question": "b"}],
        {},
        r"s.jsonl:2: has no key in column 'answer'.*eval.accuracy.s.answer_column",
    ),
    "a column that is not there": (
        [{"question": "a", "answer": "1"}],
        {"column": "query"},
        r"s.jsonl:1: has no column 'query'.*eval.accuracy.s.column names",
    ),
    "an id twice": (
        [{"id": "x", "question": q, "answer": "1"} for q in "ab"],
        {},
        r"s.jsonl:2: has the id 'x', and so has .*s.jsonl:1; every question needs one of its own",
    ),
    "no questions": ([], {}, r"s.jsonl: holds no questions"),
    "a split": (
        [{"question": "a", "answer": "1"}],
        {"split": "train"},
        r"eval.accuracy.s.split = 'train': .*which has no splits",
    ),
}


@pytest.mark.parametrize("what", BAD_ROWS)
def test_bad_rows_are_named_by_their_line_and_setting(what: str, tmp_path: Path):
    rows, settings, sentence = BAD_ROWS[what]
    path = write(tmp_path / "s.jsonl", *rows)
    with pytest.raises(InputFileError, match=sentence):
        Exam("s", QuestionSet(path=path, **settings))


@pytest.mark.parametrize(
    ("path", "reason"),
    [("no.jsonl", "no such file"), ("folder.jsonl", "can't be read|no such file")],
)
def test_a_file_that_is_none_is_named_by_its_setting(path, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("folder.jsonl").mkdir()
    with pytest.raises(InputFileError, match=rf"^eval.accuracy.s.path = '{path}'.*({reason})"):
        Exam("s", QuestionSet(path=path))


def test_a_question_that_fills_the_context_is_named_before_anything_is_sampled(sums: str):
    sampler = Scripted(double)
    with (
        Exam("sums", QuestionSet(path=sums)) as exam,
        pytest.raises(ConfigError, match=r"sums.jsonl:10: the question takes 6 tokens .* 6;"),
    ):
        exam.prompts(sampler, 6)


def test_keys_that_the_method_can_not_read_are_an_error_that_names_the_set(tmp_path: Path):
    path = write(tmp_path / "s.jsonl", {"question": "Capital of France?", "answer": "Paris"})
    with (
        Exam("s", QuestionSet(path=path)) as exam,
        pytest.raises(RewardError, match=r'eval.accuracy.s: method = "math" finds no mathematics'),
    ):
        take(exam, lambda question, j: "4")
    code = QuestionSet(path=path, method="code")
    with Exam("s", code) as exam:
        exam.questions[0] = exam.questions[0]._replace(key="5")
        with pytest.raises(RewardError, match=r"^eval.accuracy.s: the key '5' is a value"):
            take(exam, lambda question, j: "4")


def test_without_the_library_the_extra_is_named(sums: str, monkeypatch: pytest.MonkeyPatch):
    import sys

    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ConfigError, match=re.escape("eval.accuracy.sums.method")):
        Exam("sums", QuestionSet(path=sums))
