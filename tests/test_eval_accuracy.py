"""`lsp eval accuracy` on question sets: names, files of results, what is kept, what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from language_self_play.cli import eval_accuracy, main
from language_self_play.errors import InputFileError
from language_self_play.evaluate.intervals import wilson_interval
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
    said = capsys.readouterr()
    assert said.err.endswith("a.json: written\n")
    report = json.loads(Path("a.json").read_text())
    right = [q["answers"][0]["right"] for q in report["questions"]]
    assert len(right) == 10
    assert report["eval/sums/accuracy"] == sum(right) / 10 >= 0.8
    # Wilson's interval, which lies nearer to ½ than the share, and its half.
    low, high = report["ci95"]["eval/sums/accuracy"]
    share = report["eval/sums/accuracy"]
    assert (share, low, high) == wilson_interval(right)
    assert report["eval/sums/accuracy_ci95"] == (high - low) / 2
    assert f"{100 * share:.1f} │ [{100 * low:.1f}, {100 * high:.1f}]" in said.out
    assert (report["model"], report["set"], report["settings"]["limit"]) == ("arena", "sums", 0)
    assert not Path("a.json.part").exists()


def test_a_name_can_be_given_and_all_settings_are_flags(sums: str, capsys: Any):
    flags = ["--num_answers", "4", "--temperature", "1.0", "--pass_at", "[1, 4]", "--limit", "3"]
    assert evaluate(f"mine={sums}", *FLAGS, *flags, "--json", "a.json") == 0
    report = json.loads(Path("a.json").read_text())
    assert [len(q["answers"]) for q in report["questions"]] == [4] * 3
    assert "eval/mine/pass_at_4" in report
    assert "3 of 10 questions" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize("questions", [[], ["sums.jsonl", *FLAGS]])
def test_the_model_answers_in_the_dtype_that_is_named(
    questions: list[str], sums: str, monkeypatch: pytest.MonkeyPatch
):
    from language_self_play import policy

    loaded, load = [], policy.load_model

    def noting(path: str, dtype: Any, *rest: Any) -> Any:
        loaded.append(str(dtype))
        return load(path, dtype, *rest)

    monkeypatch.setattr(policy, "load_model", noting)
    told = []
    for dtype in ([], ["--dtype", "bfloat16"]):
        assert evaluate(*questions, *dtype, "--json", "a.json") == 0
        told.append(json.loads(Path("a.json").read_text())["dtype"])
    assert loaded == ["torch.float32", "torch.bfloat16"]
    # The arena is asked in float32 everywhere, a set in what the device has.
    assert told == ["auto" if questions else "float32", "bfloat16"]


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


def test_each_batch_has_draws_of_its_own(sums: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(eval_accuracy, "BATCH", 1)
    Path(sums).write_text(Path(sums).read_text().splitlines(keepends=True)[0] * 2)
    sampled = ["--num_answers", "8", "--temperature", "2.0"]
    assert evaluate(sums, *FLAGS, *sampled, "--json", "a.json") == 0
    first, second = json.loads(Path("a.json").read_text())["questions"]
    assert first["query"] == second["query"]
    assert first["answers"] != second["answers"]


def test_answers_to_other_questions_are_not_taken_over(
    sums: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    monkeypatch.setattr(eval_accuracy, "BATCH", 4)
    Interrupting(monkeypatch)
    assert evaluate(sums, *FLAGS, "--json", "b.json") == 130
    capsys.readouterr()
    others = (["--seed", "1"], ["--temperature", "0.5"], ["--prompt", "{query}?"])
    for changed in (*others, ["--dtype", "bfloat16"]):
        assert evaluate(sums, *FLAGS, *changed, "--json", "b.json") == 2
        assert capsys.readouterr().err == (
            "lsp: b.json.part: holds answers to other questions, of another model or with other"
            " settings; remove it, or write to another file\n"
        )


def test_answers_kept_before_there_was_a_dtype_to_choose_are_gone_on_from(
    sums: str, monkeypatch: pytest.MonkeyPatch
):
    known_by: list[dict[str, Any]] = []
    monkeypatch.setattr(eval_accuracy, "_digest", lambda value: str(known_by.append(value)))
    for dtype in ("auto", "bfloat16"):
        assert evaluate(sums, *FLAGS, "--dtype", dtype) == 0
    assert [known.get("dtype") for known in known_by] == [None, "bfloat16"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\xff\xfe\n", "can't be read"),
        (b"[1,\n{\n", "can't be read"),
        (b"{}\n3\n", "can't be read .a line is no record"),
    ],
)
def test_a_damaged_file_of_kept_answers_is_one_sentence(content, reason, tmp_path):
    file = tmp_path / "a.part"
    file.write_bytes(content)
    with pytest.raises(InputFileError, match=rf"{file}: {reason}.*remove it"):
        KeptRecords(file, {}, 4, 10)


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
    "a mistyped file": (["sum.jsonl"], "SET sum.jsonl: no such file; did you mean sums.jsonl?"),
    "no device": (["--device", "abacus"], "--device = 'abacus': can't be used here"),
    "no file": (["no.jsonl"], "SET no.jsonl: no such file"),
    "no number": (["sums.jsonl", "--limit", "x"], "--limit = 'x': must be"),
    "a typing error": (
        ["sums.jsonl", "--limitt", "3"],
        "--limitt: no such flag; did you mean --limit?",
    ),
    "a typing error in the command's own": (
        ["sums.jsonl", "--devise", "cpu"],
        "--devise: no such flag; did you mean --device?",
    ),
    "a typing error in an engine's": (
        ["sums.jsonl", "--vlm.python=x"],
        "--vlm.python: no such flag; did you mean --vllm.python?",
    ),
    "a section that is near, without that field": (
        ["sums.jsonl", "--vlm.acuracy", "x"],
        "--vlm.acuracy: no such flag; --help lists",
    ),
    "a section that is not near": (
        ["sums.jsonl", "--eval.accuracy", "x"],
        "--eval.accuracy: no such flag; --help lists",
    ),
    "a flag that is not near": (
        ["sums.jsonl", "--policy", "x"],
        "--policy: no such flag; --help lists",
    ),
    "a table": (
        ["sums.jsonl", "--vllm", "x"],
        "--vllm: no such flag; its settings are, such as --vllm.server",
    ),
    "what is no flag": (
        ["sums.jsonl", "--wherever", "x"],
        "--wherever: no such flag; --help lists",
    ),
    "a flag of training": (["sums.jsonl", "--learner.lr", "1"], "--learner.lr: no such flag; "),
    "no type": (["sums.jsonl", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
    "no value": (["sums.jsonl", "--limit"], "--limit: needs a value"),
    "a seed for the arena": (["--seed", "3"], "--seed: has no effect on the arena's"),
    "a batch for the arena": (["--batch-size=3"], "--batch-size: has no effect on the arena's"),
    "a setting of sets for the arena": (["--limit", "3"], "--limit: has no effect on the arena's"),
    "an empty name": (["=sums.jsonl"], "SET: '' can't be a name"),
    "an empty path": (["x="], "SET = ''"),
    "a negative seed": (["sums.jsonl", "--seed", "-1"], "--seed = -1: must be at least 0"),
    "too high a seed": (
        ["sums.jsonl", "--seed", "2147483647"],
        "--seed = 2147483647: must be below 2147483647",
    ),
    "no batch": (["sums.jsonl", "--batch-size", "0"], "--batch-size = 0: must be at least 1"),
    "no folder": (["sums.jsonl", "--json", "no/a.json"], "--json no/a.json: there is no folder no"),
    "a name that is too long": (
        ["empty.jsonl", "--json", "j" * 252],
        f"--json {'j' * 252}: can't be written (File name too long)",
    ),
    "a set's name that is too long": ([f"{'s' * 300}.csv"], f"SET {'s' * 300}.csv: no such file"),
    "an empty file": (["empty.jsonl"], "empty.jsonl: holds no questions"),
    "a folder without questions": (
        ["folder"],
        "SET = 'folder': can't be read: The directory at {folder} doesn't contain any data files; a folder"
        " must hold tables of questions: name a file (JSON, JSONL, CSV, Parquet), or a folder of such files",
    ),
    "no keys": (
        ["keyless.jsonl"],
        "keyless.jsonl:1: has none of answer, test, test_list, solution, its columns are question, solutions;"
        " a set that measures has a question and the key to its answer in every row, and --answer_column"
        " names the keys' column",
    ),
    "a long question": (
        ["long.jsonl"],
        "long.jsonl:1: the question takes ",
    ),
    "several answers, all alike": (
        ["sums.jsonl", "--num_answers", "3"],
        "SET: num_answers = 3: at temperature",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_sentence_and_exit_code_2(what: str, sums: str, capsys: Any):
    arguments, sentence = BAD[what]
    Path("empty.jsonl").write_text("")
    Path("folder").mkdir()
    Path("keyless.jsonl").write_text('{"question": "1+1", "solutions": "2"}\n')
    sentence = sentence.replace("{folder}", str(Path("folder").resolve()))
    Path("long.jsonl").write_text(json.dumps({"question": "1+" * 5000, "answer": "1"}) + "\n")
    assert evaluate(*arguments) == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if "[transformers]" not in x]
    assert [line for line in lines if line.startswith(f"lsp: {sentence}")] == lines


def test_answers_that_are_all_there_stay_though_their_last_batch_is_not_whole(tmp_path: Path):
    kept = KeptRecords(tmp_path / "a", {"asked": 1}, 2, 3)
    kept.add([{"i": 0}, {"i": 1}])
    kept.add([{"i": 2}])
    assert KeptRecords(tmp_path / "a", {"asked": 1}, 2, 3).records == [{"i": i} for i in range(3)]
    # Of four the third is half a batch, whose draws begin with it.
    assert KeptRecords(tmp_path / "a", {"asked": 1}, 2, 4).records == [{"i": 0}, {"i": 1}]


def test_a_setting_that_stands_in_the_runs_recipe_keeps_its_name(sums: str, capsys: Any):
    flags = [
        *["--steps", "1", "--threads", "1", "--log.progress", "none", "--eval.tasks", "[]"],
        *["--eval.accuracy.mine.path", sums, "--eval.accuracy.mine.method", "exact"],
        *["--eval.accuracy.mine.max_tokens", "6"],
    ]
    assert main(["train", "arena-grpo", "--run", "r", *flags]) == 0
    Path(sums).unlink()
    capsys.readouterr()
    assert main(["eval", "accuracy", "r", "mine"]) == 2
    assert "eval.accuracy.mine.path = 'sums.jsonl': no such file" in capsys.readouterr().err
    assert main(["eval", "accuracy", "r", "mine", "--limit", "x"]) == 2
    assert "lsp: --limit = 'x': must be" in capsys.readouterr().err


def test_a_model_that_cannot_be_loaded_is_the_argument_that_named_it(sums: str, capsys: Any):
    Path("m").mkdir()
    Path("m/config.json").write_text('{"model_type": "llama"}')
    for command in (
        ["accuracy", "m"],
        ["accuracy", "m", sums],
        ["win-rate", "m", "arena", "--prompts", sums, "--judge.kind", "arena"],
    ):
        assert main(["eval", *command]) == 2
        assert "lsp: MODEL = 'm': can't be loaded: " in capsys.readouterr().err
    assert main(["eval", *command[:1], "arena", "m", *command[3:]]) == 2
    assert "lsp: BASELINE = 'm': can't be loaded: " in capsys.readouterr().err


def test_weights_that_are_not_finite_have_no_accuracy_but_an_exit_code_of_their_own(
    tmp_path: Path, capsys: Any
):
    import shutil

    from safetensors.torch import load_file, save_file

    from language_self_play.model_paths import resolve_model

    folder = shutil.copytree(resolve_model("arena"), tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    next(iter(weights.values())).fill_(float("nan"))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert main(["eval", "accuracy", str(folder)]) == 3
    assert "m: its log-probs are not finite" in capsys.readouterr().err


MISTYPED = {
    "accuracy ./nothere": "./nothere: no such folder",
    f"accuracy {'m' * 300}": f"{'m' * 300}: no such folder",
    "accuracy arena nothere.jsonl": "SET nothere.jsonl: no such file",
    "win-rate ./nothere a.jsonl --prompts sums.jsonl": "./nothere: no such folder",
    "win-rate arena ./nothere --prompts sums.jsonl": "./nothere: no such folder",
    "alpaca ./nothere --baseline a.jsonl --instructions sums.jsonl": "./nothere: no such folder",
    "harness ./nothere --tasks ifeval": "./nothere: no such folder",
    "table nothere": "nothere: no such run or file",
}


@pytest.mark.parametrize("line", MISTYPED)
def test_a_typing_error_is_told_before_torch_is_imported(line: str, sums: str):
    code = (
        "import sys; sys.modules['torch'] = None; from language_self_play.cli import main;"
        f" sys.exit(main(['eval', *{line.split()!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr[:5]) == (2, "lsp: ")
    assert done.stderr[5:].startswith(MISTYPED[line])
