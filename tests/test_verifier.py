"""Answers against keys: as mathematics, as text, by unit tests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from language_self_play.errors import RewardError
from language_self_play.rewards import build_reward, mathematics
from language_self_play.rewards.mathematics import MathWorkers
from language_self_play.rewards.sandbox import IsolationError
from language_self_play.rewards.verifier import code_in


@pytest.fixture
def build(make_config, tmp_path):
    """build(method="math"): the reward, closed after the test."""
    built = []

    def make(**section):
        reward = build_reward(
            make_config(
                algorithm="grpo",
                data={"path": str(tmp_path / "queries.jsonl"), "answer_column": "answer"},
                reward={"main": {"kind": "verifier", "workers": 2, **section}},
            )
        )
        built.append(reward)
        return lambda *arguments: reward(*arguments).tolist()

    yield make
    for reward in built:
        reward.close()


@pytest.fixture(scope="module")
def workers():
    pytest.importorskip("math_verify")
    made = MathWorkers(timeout_s=20.0, workers=2)
    yield made
    made.close()


@pytest.fixture(scope="module")
def gold(test_data):
    """The worked answers of GSM8K's test set."""
    with open(test_data / "data/gsm8k/test.jsonl", encoding="utf-8") as lines:
        return [json.loads(line)["answer"] for line in lines]


# ---------------------------------------------------------------- texts


def test_exact_compares_all_but_white_space_at_the_ends(build):
    verify = build(method="exact")
    answers = [["Paris", " Paris\n", "paris", "Paris."], ["", "b", "b c", "c"]]
    assert verify(["q", "r"], answers, ["Paris ", "b c"]) == [[1, 1, 0, 0], [0, 0, 1, 0]]


def test_regex_compares_the_first_group_of_the_last_match(build):
    verify = build(method="regex", pattern=r"Answer: (\w+)( indeed)?")
    answers = [["Answer: A", "Answer: B. No. Answer: A indeed", "Answer: A. No. Answer: B", "A"]]
    assert verify(["q"], answers, [" A "]) == [[1, 1, 0, 0]]


def test_regex_without_a_key_looks_for_the_pattern(build):
    verify = build(method="regex", pattern=r"<answer>(.+)</answer>")
    assert verify(["q"], [["<answer>4</answer>", "4"]], [None]) == [[1, 0]]


@pytest.mark.parametrize("method", ["exact", "math", "code"])
def test_a_query_without_a_key_is_named(build, method):
    if method == "math":
        pytest.importorskip("math_verify")
    verify = build_or_skip(build, method)
    with pytest.raises(RewardError, match=r"^reward\.main: the query 'second' has no key"):
        verify(["first", "second"], [["1"], ["2"]], ["1", None])


def build_or_skip(build, method, **section):
    try:
        return build(method=method, **section)
    except RewardError as error:
        pytest.skip(str(error))


# ---------------------------------------------------------------- mathematics


def test_gsm8k_gold_answers_verify_against_themselves(workers, gold):
    assert len(gold) == 1319
    assert workers.equal([(answer, answer) for answer in gold]) == [True] * 1319


def test_gsm8k_gold_answers_verify_against_the_bare_and_the_boxed_number(workers, gold):
    final = [answer.rpartition("####")[2].strip() for answer in gold]
    boxed = [f"Let $x = 7$ be. We get \\boxed{{{f}}} because $8 < 9$." for f in final]
    assert workers.equal(list(zip(gold, final, strict=True))) == [True] * 1319
    assert workers.equal(list(zip(gold, boxed, strict=True))) == [True] * 1319


def test_gsm8k_gold_answers_do_not_verify_against_a_neighbours(workers, gold):
    final = [answer.rpartition("####")[2].strip() for answer in gold]
    pairs = [(gold[i], gold[i + 1]) for i in range(1318) if final[i] != final[i + 1]]
    assert len(pairs) == 1303
    assert workers.equal(pairs) == [False] * 1303


@pytest.mark.parametrize(
    ("key", "answer", "right"),
    [
        ("\\frac{1}{2}", "so it is $0.5$", True),
        ("$\\frac{3}{4}$", "The answer is \\boxed{\\frac{6}{8}}.", True),
        ("x^2 + 1", "$1 + x^2$", True),
        ("x^2 + 1", "x^2 + 1", True),
        ("(1, 2)", "(1,2)", True),
        ("50%", "0.5", True),
        ("#### 1,234", "1234", True),
        ("10 dollars", "\\boxed{10}", True),
        ("7", "3 + 4 = 7", True),
        ("#### 5", "#### Step 2: add\n2 + 3 is \\boxed{5}", True),
        ("2", "-2", False),
        ("5", "5 plus 1 is 6", False),
        ("5", "", False),
        ("5", "five", False),
        ("5", "####", False),
    ],
)
def test_keys_and_answers_compare_as_mathematics(workers, key, answer, right):
    assert workers.equal([(key, answer)]) == [right]


def test_only_the_end_of_a_long_answer_is_read(workers):
    padding = "so and so " * 500  # 5,000 characters
    pairs = [("5", f"{padding} \\boxed{{5}}"), ("5", f"\\boxed{{5}} {padding}")]
    assert workers.equal(pairs) == [True, False]


def test_a_key_without_mathematics_makes_no_answer_right_and_all_such_keys_are_an_error(build):
    verify = build(method="math")
    assert verify(["q", "r"], [["Paris"], ["4"]], ["Paris", "4"]) == [[0], [1]]
    with pytest.raises(RewardError, match=r"finds no mathematics in any key.*'Paris'"):
        verify(["q"], [["Paris"]], ["Paris"])


# Comparing this with a number takes longer than anybody waits.
ENDLESS = "$9^{9^{9^{9}}}$"


def test_a_check_that_hangs_is_killed_at_the_deadline_and_the_next_one_works(build):
    pytest.importorskip("math_verify")
    verify = build(method="math", timeout_s=1.0, workers=1)
    assert verify(["q"], [["3"]], ["3"]) == [[1]]
    start = time.monotonic()
    assert verify(["q"], [[ENDLESS, "4", "3"]], ["3"]) == [[0, 0, 1]]
    assert 1.0 <= time.monotonic() - start < 6.0  # with a new worker's start


def test_equal_checks_are_made_once(build):
    pytest.importorskip("math_verify")
    verify = build(method="math", timeout_s=1.0, workers=1)
    assert verify(["q"], [["3"]], ["3"]) == [[1]]
    start = time.monotonic()
    assert verify(["q", "q"], [[ENDLESS] * 8] * 2, ["3", "3"]) == [[0] * 8] * 2
    assert time.monotonic() - start < 3.0  # 16 of them would take 16 s


def test_a_worker_that_was_killed_is_replaced_without_failing_a_check():
    pytest.importorskip("math_verify")
    workers = MathWorkers(timeout_s=20.0, workers=1)
    try:
        assert workers.equal([("1", "1")]) == [True]
        (first,) = workers._workers
        os.kill(first.process.pid, signal.SIGKILL)
        first.process.wait()
        assert workers.equal([("2", "2"), ("2", "3")]) == [True, False]
        assert [w.process.pid for w in workers._workers] != [first.process.pid]
    finally:
        workers.close()


def test_a_worker_does_not_hear_ctrl_c_and_close_ends_it():
    pytest.importorskip("math_verify")
    workers = MathWorkers(timeout_s=20.0, workers=1)
    try:
        assert workers.equal([("1", "1")]) == [True]
        (worker,) = workers._workers
        assert os.getpgid(worker.process.pid) != os.getpgid(0)
        worker.process.send_signal(signal.SIGINT)
        assert workers.equal([("2", "2")]) == [True]
        assert [w.process.pid for w in workers._workers] == [worker.process.pid]
    finally:
        workers.close()
    assert worker.process.poll() == -signal.SIGKILL
    workers.close()


def test_a_worker_that_hangs_ends_with_the_trainer():
    pytest.importorskip("math_verify")
    folder = str(Path(mathematics.__file__).parent)
    code = f"""
import sys, threading, time
sys.path.append({folder!r})
import mathematics
workers = mathematics.MathWorkers(1000, 1)
workers.equal([("1", "1")])
print(workers._workers[0].process.pid, flush=True)
workers.equal([("3", {ENDLESS!r})])
"""
    trainer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pid = int(trainer.stdout.readline())
    time.sleep(0.5)
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_worker_brings_no_torch():
    code = "import sys, mathematics; mathematics.equal('1', '1'); print('torch' in sys.modules)"
    pytest.importorskip("math_verify")
    run = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            f"import sys; sys.path.append({str(Path(mathematics.__file__).parent)!r}); {code}",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout == "False\n"


def test_a_worker_that_can_not_start_says_why(build, monkeypatch, tmp_path):
    pytest.importorskip("math_verify")
    verify = build(method="math")
    (tmp_path / "math_verify.py").write_text("raise ImportError('a part is missing')")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with pytest.raises(RewardError, match="can't start: ImportError: a part is missing"):
        verify(["q"], [["3"]], ["3"])


def test_mathematics_without_the_library_names_the_extra(build, monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ValueError, match=r"reward\.main\.method = \"math\".*\[maths\]"):
        build(method="math")


# ---------------------------------------------------------------- code

PROGRAM = "def double(x):\n    return 2 * x\n"


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (PROGRAM, PROGRAM),
        (f"Here:\n```python\n{PROGRAM}```\nDone.", PROGRAM),
        (f"```py\nold\n```\nBetter:\n```Python\n{PROGRAM}```\n```text\noutput\n```", PROGRAM),
        (f"```\nold\n```\n```\n{PROGRAM}```", PROGRAM),
        (f"cut off:\n```python\n{PROGRAM}", PROGRAM),
    ],
)
def test_the_program_is_the_last_python_block_else_the_last_block_else_everything(answer, code):
    assert code_in(answer) == code


def test_code_earns_1_where_the_keys_tests_run_to_their_end(build):
    verify = build_or_skip(build, "code", timeout_s=5.0, memory_mib=256)
    answers = [
        [
            f"```python\n{PROGRAM}```",
            "```python\ndef double(x):\n    return x\n```",
            "import sys\nsys.exit(0)",
            "I don't know.",
        ]
    ]
    assert verify(["double a number"], answers, ["assert double(4) == 8"]) == [[1, 0, 0, 0]]
    assert verify(["double a number"], answers, ["assert double(0) == 0"]) == [[1, 1, 0, 0]]


def test_code_is_refused_where_programs_can_not_be_isolated(build, monkeypatch):
    def refuse(sandbox):
        raise IsolationError("unshare: Operation not permitted")

    monkeypatch.setattr("language_self_play.rewards.sandbox.Sandbox.check", refuse)
    with pytest.raises(
        RewardError, match=r'^reward\.main\.method = "code": .* unshare: Operation not permitted; '
    ):
        build(method="code")
