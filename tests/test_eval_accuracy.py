"""`lsp eval accuracy` on question sets: names, files of results, what is kept, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from language_self_play.cli import eval_accuracy, main
from language_self_play.errors import InputFileError
from language_self_play.evaluate.kept import KeptRecords


@pytest.fixture
def sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Ten sums below 10, with their keys."""
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"{i % 5}+{i % 4}", "answer": str(i % 5 + i % 4)} for i in range(10)]
    Path("sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "sums.jsonl"


FLAGS = ["--method", "exact", "--max_tokens", "6"]


def evaluate(*arguments: str) -> int:
    return main(["eval", "accuracy", "arena", *arguments])


def test_a_file_is_asked_and_every_question_is_written(sums: str, capsys: Any):
    assert evaluate(sums, *FLAGS, "--json", "a.json") == 0
    assert "accuracy (pass@1)" in capsys.readouterr().out
    report = json.loads(Path("a.json").read_text())
    right = [q["answers"][0]["right"] for q in report["questions"]]
    assert len(right) == 10
    assert report["eval/sums/accuracy"] == sum(right) / 10 >= 0.8
    assert (report["model"], report["set"], report["settings"]["limit"]) == ("arena", "sums", 0)
    assert not Path("a.json.part").exists()


def test_a_name_can_be_given_and_all_settings_are_flags(sums: str, capsys: Any):
    flags = ["--num_answers", "4", "--temperature", "1.0", "--pass_at", "[1, 4]", "--limit", "3"]
    assert evaluate(f"mine={sums}", *FLAGS, *flags, "--json", "a.json") == 0
    report = json.loads(Path("a.json").read_text())
    assert [len(q["answers"]) for q in report["questions"]] == [4] * 3
    assert "eval/mine/pass_at_4" in report
    assert "3 of 10 questions" in capsys.readouterr().out.replace("\n", " ")


class Interrupting:
    """Stops like Ctrl-C before its second batch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        from language_self_play.evaluate.exam import Exam

        self.asked: list[int] = []
        ask = Exam.ask

        def counting(exam: Any, sampler: Any, prompts: Any, start: int, end: int) -> Any:
            self.asked.append(start)
            if self.asked == [0, 4]:
                raise KeyboardInterrupt
            return ask(exam, sampler, prompts, start, end)

        monkeypatch.setattr(Exam, "ask", counting)


def test_after_ctrl_c_the_same_command_goes_on_and_gives_the_uninterrupted_result(
    sums: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    monkeypatch.setattr(eval_accuracy, "BATCH", 4)
    sampled = [*FLAGS, "--num_answers", "2", "--temperature", "1.0"]
    assert evaluate(sums, *sampled, "--json", "whole.json") == 0
    interrupting = Interrupting(monkeypatch)
    assert evaluate(sums, *sampled, "--json", "b.json") == 130
    kept = Path("b.json.part").read_text().splitlines()
    assert len(kept) == 1 + 4
    # Half a line and half a batch, as a kill may leave them.
    Path("b.json.part").write_text("\n".join([*kept, kept[1]]) + '\n{"set": "su')
    assert evaluate(sums, *sampled, "--json", "b.json") == 0
    assert interrupting.asked == [0, 4, 4, 8]
    assert "4 of 10 questions were answered before" in capsys.readouterr().err
    assert Path("b.json").read_bytes() == Path("whole.json").read_bytes()
    assert not Path("b.json.part").exists()


def test_answers_to_other_questions_are_not_taken_over(
    sums: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    monkeypatch.setattr(eval_accuracy, "BATCH", 4)
    Interrupting(monkeypatch)
    assert evaluate(sums, *FLAGS, "--json", "b.json") == 130
    capsys.readouterr()
    for changed in (["--seed", "1"], ["--temperature", "0.5"], ["--prompt", "{query}?"]):
        assert evaluate(sums, *FLAGS, *changed, "--json", "b.json") == 2
        assert capsys.readouterr().err == (
            "lsp: b.json.part: holds answers to other questions, of another model or with other"
            " settings; remove it, or write to another file\n"
        )


@pytest.mark.parametrize(
    ("content", "reason"), [(b"\xff\xfe\n", "can't be read"), (b"[1,\n{\n", "can't be read")]
)
def test_a_damaged_file_of_kept_answers_is_one_sentence(content, reason, tmp_path):
    file = tmp_path / "a.part"
    file.write_bytes(content)
    with pytest.raises(InputFileError, match=rf"{file}: {reason}.*remove it"):
        KeptRecords(file, {}, 4)


def test_a_model_written_anew_is_another_model(tmp_path: Path):
    from language_self_play.evaluate.kept import written_when

    (tmp_path / "model.safetensors").write_bytes(b"1")
    before = written_when(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"22")
    assert before != written_when(tmp_path)


def test_a_runs_own_set_is_asked_as_the_run_asks_it(sums: str, capsys: Any):
    flags = [
        *["--steps", "1", "--threads", "1", "--log.progress", "none", "--eval.tasks", "[]"],
        *["--eval.accuracy.mine.path", sums, "--eval.accuracy.mine.method", "exact"],
        *["--eval.accuracy.mine.max_tokens", "6", "--eval.accuracy.mine.limit", "5"],
    ]
    assert main(["train", "arena-grpo", "--run", "r", *flags]) == 0
    assert main(["eval", "accuracy", "r", "mine", "--json", "a.json"]) == 0
    report = json.loads(Path("a.json").read_text())
    assert (report["set"], len(report["questions"])) == ("mine", 10)
    assert report["settings"]["max_tokens"] == 6


BAD = {
    "no file": (["no.jsonl"], "eval.accuracy.no.path = 'no.jsonl': no such file"),
    "no number": (["sums.jsonl", "--limit", "x"], "eval.accuracy.sums.limit = 'x': must be"),
    "a typing error": (
        ["sums.jsonl", "--limitt", "3"],
        "eval.accuracy.sums.limitt: no such setting; did you mean eval.accuracy.sums.limit?",
    ),
    "no value": (["sums.jsonl", "--limit"], "--limit: needs a value"),
    "a seed for the arena": (["--seed", "3"], "--seed: has no effect on the arena's"),
    "a batch for the arena": (["--batch-size=3"], "--batch-size: has no effect on the arena's"),
    "a setting of sets for the arena": (["--limit", "3"], "--limit: has no effect on the arena's"),
    "an empty name": (["=sums.jsonl"], "eval.accuracy: '' can't be a name"),
    "an empty path": (["x="], "eval.accuracy.x.path = ''"),
    "a negative seed": (["sums.jsonl", "--seed", "-1"], "--seed = -1: must be at least 0"),
    "no batch": (["sums.jsonl", "--batch-size", "0"], "--batch-size = 0: must be at least 1"),
    "no folder": (["sums.jsonl", "--json", "no/a.json"], "--json no/a.json: there is no folder no"),
    "an empty file": (["empty.jsonl"], "empty.jsonl: holds no questions"),
    "a long question": (
        ["long.jsonl"],
        "eval.accuracy.long: question '1' takes ",
    ),
    "several answers, all alike": (
        ["sums.jsonl", "--num_answers", "3"],
        "eval.accuracy.sums: num_answers = 3: at temperature",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_sentence_and_exit_code_2(what: str, sums: str, capsys: Any):
    arguments, sentence = BAD[what]
    Path("empty.jsonl").write_text("")
    Path("long.jsonl").write_text(json.dumps({"question": "1+" * 5000, "answer": "1"}) + "\n")
    assert evaluate(*arguments) == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if "[transformers]" not in x]
    assert [line for line in lines if line.startswith(f"lsp: {sentence}")] == lines
