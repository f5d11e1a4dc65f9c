"""Data sets that lie on a hub: a real HTTP server on localhost, asked by real commands."""

from __future__ import annotations

import errno
import json
import os

import pytest

from servers import python_with_hub, serving

pytest.importorskip("datasets", reason="the extra data is not installed")

QUESTIONS = [{"question": f"{i}+1", "answer": f"thus #### {i + 1}"} for i in range(1, 5)]
CARD = """---
configs:
- config_name: main
  data_files:
  - split: train
    path: main/train.jsonl
  - split: test
    path: main/test.jsonl
---
"""
# The arena writes units first: 27+48 is 75, written 57.
ALPACA = [
    {"instruction": q, "output": "57", "generator": "gpt4_1106_preview", "dataset": d}
    for q, d in (("27+48", "koala"), ("12+5", "vicuna"))
]

ALPACA_IS_ASKED = "tatsu-lab/alpaca_eval: the hub is asked for alpaca_eval_gpt4_baseline.json"
# No server listens at port 1.
NOWHERE = "http://127.0.0.1:1"
NOTHING_ANSWERS = (
    f"{NOWHERE}: nothing answers there ([Errno {errno.ECONNREFUSED}]"
    f" {os.strerror(errno.ECONNREFUSED)}), so what was fetched before is all there is"
)


@pytest.fixture
def hub():
    lines = "".join(json.dumps(row) + "\n" for row in QUESTIONS).encode()
    gsm8k = {
        "README.md": CARD.encode(),
        "main/test.jsonl": lines,
        "main/train.jsonl": lines.splitlines(keepends=True)[0],
    }
    alpaca = {"alpaca_eval_gpt4_baseline.json": json.dumps(ALPACA).encode()}
    with serving({"openai/gsm8k": gsm8k, "tatsu-lab/alpaca_eval": alpaca}) as server:
        yield server


def lsp(tmp_path, url, *arguments):
    return python_with_hub(tmp_path, url, "-m", "language_self_play", *arguments)


def test_a_question_set_comes_from_the_hub_in_its_subset_and_split(hub, tmp_path):
    done = lsp(
        tmp_path, hub.url, "eval", "accuracy", "arena", "openai/gsm8k",
        "--subset", "main", "--split", "test", "--method", "exact", "--max_tokens", "8",
        "--json", "a.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "a.json").read_text())
    assert [q["query"] for q in report["questions"]] == ["1+1", "2+1", "3+1", "4+1"]
    assert report["questions"][3]["key"] == "thus #### 5"


def test_alpacas_instructions_and_baseline_come_from_the_hub(hub, tmp_path):
    command = ["eval", "alpaca", "arena", "--judge.kind", "arena", "--max-tokens", "8"]
    done = lsp(tmp_path, hub.url, *command, "--out", "o")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "o" / "report.json").read_text())
    assert (report["baseline"], report["n_total"]) == ("gpt4_1106_preview", 2)
    assert set(report["subsets"]) == {"koala", "vicuna"}
    # 57 is right for 27+48 alone, and the arena's model knows both sums: a tie and a win.
    assert (report["n_draws"], report["n_wins"]) == (1, 1)
    # From its cache, without the hub.
    again = lsp(tmp_path, NOWHERE, *command, "--out", "o")
    assert again.returncode == 0, again.stderr


def set_is_asked(name):
    return f"{name}: nothing of that name here, so the hub is asked"


def one_sentence(done, *told):
    """What ends the command, after the lines that are told before it."""
    assert done.returncode == 2, done.stderr
    *before, line = done.stderr.splitlines()
    assert before == list(told)
    assert line.startswith("lsp: ")
    return line.removeprefix("lsp: ")


def test_what_the_hub_does_not_have_is_one_sentence(hub, tmp_path):
    command = ["eval", "accuracy", "arena"]
    said = one_sentence(
        lsp(tmp_path, hub.url, *command, "openai/gsm9k"), set_is_asked("openai/gsm9k")
    )
    assert said.startswith("SET = 'openai/gsm9k': can't be read: ")
    said = one_sentence(
        lsp(tmp_path, hub.url, *command, "openai/gsm8k", "--subset", "man"),
        set_is_asked("openai/gsm8k"),
    )
    assert said.startswith("SET = 'openai/gsm8k': can't be read: ")
    assert "'main'" in said
    hub.repos["tatsu-lab/alpaca_eval"].clear()
    command = ["eval", "alpaca", "arena", "--judge.kind", "arena"]
    said = one_sentence(lsp(tmp_path, hub.url, *command), ALPACA_IS_ASKED)
    assert said.startswith("alpaca_eval_gpt4_baseline.json of tatsu-lab/alpaca_eval can't be had")
    assert said.endswith("name files by --instructions and --baseline")


@pytest.mark.parametrize("name", ["openai/gsm8k", "s" * 300])
def test_without_a_network_a_set_that_is_not_here_is_one_sentence(name, tmp_path):
    done = lsp(tmp_path, NOWHERE, "eval", "accuracy", "arena", name)
    said = one_sentence(done, set_is_asked(name), NOTHING_ANSWERS)
    assert said.startswith(f"SET = {name!r}: can't be read: ")


def test_without_a_network_alpacas_baseline_is_one_sentence(tmp_path):
    done = lsp(tmp_path, NOWHERE, "eval", "alpaca", "arena", "--judge.kind", "arena")
    said = one_sentence(done, ALPACA_IS_ASKED, NOTHING_ANSWERS)
    assert said.startswith("alpaca_eval_gpt4_baseline.json of tatsu-lab/alpaca_eval can't be had")
