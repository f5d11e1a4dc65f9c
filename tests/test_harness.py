"""`lsp eval harness`: lm-eval on a local task of three questions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from language_self_play.cli import main

TASK = """\
task: lsp_sums
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: ["2", "8", "31"]
doc_to_target: "{{{{a}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
"""


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Sums as the arena writes them, units first; the key of the last is wrong."""
    pytest.importorskip("lm_eval", reason="the extra harness is not installed")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    rows = [("1+1", 0), ("4+4", 1), ("4+9", 2), ("5+3", 0)]  # the keys are places of choices
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps({"q": q, "a": a}) + "\n" for q, a in rows))
    (folder / "sums.yaml").write_text(TASK.format(data=data))
    return str(folder)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # lm-eval's own, and those of what it imports
def test_a_local_task_is_scored_and_its_results_are_written(
    tasks: str, capfd: Any, caplog: pytest.LogCaptureFixture
):
    command = ["eval", "harness", "arena", "--tasks", "lsp_sums", "--include-path", tasks]
    assert main([*command, "--chat", "--num-fewshot", "0", "--json", "h.json"]) == 0
    out, err = capfd.readouterr()
    # Nothing of how the model was handed over, of the task's defaults, or of git.
    assert [r.getMessage() for r in caplog.records if r.name.startswith("lm_eval")] == []
    assert "fatal" not in err
    assert "lsp_sums" in out
    assert "0.7500" in out
    report = json.loads(Path("h.json").read_text())
    # 3 of 4 keys are right.
    assert report["results"]["lsp_sums"]["acc,none"] == 0.75
    assert report["n-samples"]["lsp_sums"]["effective"] == 4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_what_lm_eval_warns_of_a_question_is_shown(tasks: str, caplog: pytest.LogCaptureFixture):
    with Path(tasks, "data.jsonl").open("a") as file:
        file.write(json.dumps({"q": "1+" * 5000, "a": 0}) + "\n")
    assert main(["eval", "harness", "arena", "--tasks", "lsp_sums", "--include-path", tasks]) == 0
    assert "exceeds model's maximum length" in caplog.text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_task_that_is_none_is_named_with_the_nearest(tasks: str, capsys: Any):
    command = ["eval", "harness", "arena", "--include-path", tasks, "--tasks", "lsp_sum"]
    assert main(command) == 2
    assert "--tasks lsp_sum: lm-eval has no such task; did you mean lsp_sums?" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--tasks", " , "], "--tasks is empty"),
        (["--tasks", "a", "--limit", "0"], "--limit = 0: must be at least 1"),
        (["--tasks", "a", "--num-fewshot", "-1"], "--num-fewshot = -1: must be at least 0"),
        (["--tasks", "a", "--include-path", "nowhere"], "--include-path nowhere: no such folder"),
        (["--tasks", "a", "--json", "no/h.json"], "--json no/h.json: there is no folder no"),
        ([], "the following arguments are required: --tasks"),
    ],
)
def test_bad_flags_are_one_sentence(flags: list[str], sentence: str, capsys: Any):
    assert main(["eval", "harness", "arena", *flags]) == 2
    assert capsys.readouterr().err.startswith(f"lsp: {sentence}")


def test_without_lm_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: Any):
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["eval", "harness", "arena", "--tasks", "gsm8k"]) == 2
    assert "pip install 'language-self-play[harness]'" in capsys.readouterr().err
