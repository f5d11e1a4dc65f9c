"""Nothing that a model or a setting says is ever executed; no secret is ever written."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from language_self_play import self_play
from language_self_play.chat import Chat
from language_self_play.cli import main
from language_self_play.errors import ModelError
from language_self_play.pretrained import resolve_model
from language_self_play.prompts import challenger_prompt
from language_self_play.run_folder import RunFolder
from servers import Endpoint, says
from test_train import small

KEYS = {"OPENAI_API_KEY": "sk-fake-51f0c2a7d9", "HF_TOKEN": "hf_fakeQ8xkT2vLw"}
FLAGS = (
    "--steps=2 --threads=1 --challenger.num_queries=6 --solver.group_size=3 --checkpoint.every=1"
    " --eval.tasks=[]"
).split()


# ---------------------------------------------------------------- secrets


@pytest.fixture
def endpoint():
    import threading

    server = Endpoint()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def repeats_the_key(status: int) -> Any:
    """An endpoint that answers with what it was sent, as some do when a key is wrong."""

    def reply(handler: Any) -> None:
        message = f"incorrect key provided: {handler.headers['Authorization']}"
        handler.send(status, json.dumps({"error": {"message": message}}), retry_after="0")

    return reply


def arguments(folder: Path, endpoint: Endpoint) -> list[str]:
    judge = {
        "kind": "judge",
        "base_url": endpoint.url,
        "model": "m",
        "retries": "1",
        "cache": str(folder.parent / "replies.sqlite"),
    }
    flags = [f"--reward.grade.{name}={value}" for name, value in judge.items()]
    return ["train", "arena-zero", "--run", str(folder), *FLAGS, *flags]


def assert_no_key(folder: Path, *outputs: str) -> None:
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert len(files) > 5
    for name, key in KEYS.items():
        for file in files:
            assert key.encode() not in file.read_bytes(), f"{name} in {file}"
        assert not [output for output in outputs if key in output], name


def test_a_finished_run_holds_no_key(endpoint, tmp_path):
    endpoint.script = [repeats_the_key(500)]
    endpoint.default = says(f'Your key is {KEYS["OPENAI_API_KEY"]}. {{"score": 5}}')
    process = subprocess.run(
        [sys.executable, "-m", "language_self_play", *arguments(tmp_path / "run", endpoint)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **KEYS, "OMP_NUM_THREADS": "1", "LSP_TRACEBACK": "1"},
    )
    assert process.returncode == 0, process.stderr
    assert f"Bearer {KEYS['OPENAI_API_KEY']}" in endpoint.keys  # it was there to be leaked
    assert (tmp_path / "run" / "model" / "README.md").is_file()
    assert_no_key(tmp_path, process.stdout, process.stderr)


@pytest.mark.parametrize(("status", "code", "event"), [(401, 2, "failed"), (503, 75, "paused")])
def test_a_run_that_its_judge_refuses_or_leaves_holds_no_key(
    status, code, event, endpoint, tmp_path, monkeypatch, capsys
):
    for name, key in KEYS.items():
        monkeypatch.setenv(name, key)
    endpoint.default = repeats_the_key(status)
    assert main(arguments(tmp_path / "run", endpoint)) == code
    shown = capsys.readouterr()
    assert "incorrect key provided: Bearer ***" in shown.err
    assert f'"{event}"' in (tmp_path / "run" / "events.jsonl").read_text()
    assert_no_key(tmp_path, shown.out, shown.err)


# ---------------------------------------------------------------- what models write


def hostile(canary: Path) -> list[str]:
    touch = f"touch {canary}"
    return [
        "\x1b[2J\x1b]0;owned\x07",
        "over\u202egnp.exe",
        f"<script>require('fs').writeFileSync('{canary}', '')</script>",
        f"{{{{ cycler.__init__.__globals__.os.popen('{touch}').read() }}}}",
        f"__import__('os').system('{touch}')",
        f"$({touch})`{touch}`; {touch}",
        "[bold red]markup[/] [link=http://evil.test]x[/link]",
        f"cos\nsystem\n(S'{touch}'\ntR.",
    ]


STEERS = ("\x1b", "\x07", "\u202e", "\x9b")


def test_what_a_model_writes_is_shown_escaped_and_never_evaluated(tmp_path, monkeypatch, capsys):
    canary = tmp_path / "canary"
    texts = hostile(canary)
    monkeypatch.setattr(
        Chat, "decode", lambda self, lists: [texts[i % len(texts)] for i in range(len(lists))]
    )
    folder = tmp_path / "run"
    flags = [*FLAGS, "--challenger.num_queries=8", "--challenger.max_tokens=120"]
    config = ["--log.progress=plain", "--self_reward.mode=generate"]
    assert main(["train", "arena", "--run", str(folder), *flags, *config]) == 0
    trained = capsys.readouterr()
    assert main(["play", str(folder), "--games", "8"]) == 0
    played = capsys.readouterr()
    for shown in (trained.out, trained.err, played.out, played.err):
        assert not [c for c in STEERS if c in shown]
    assert r"\x1b[2J" in played.out
    assert r"over\u202egnp.exe" in played.out
    assert "cycler.__init__" in played.out  # as it is: no template has seen it
    assert "[bold red]markup" in played.out
    queries = {game["query"] for game in RunFolder(folder).games(0)}
    assert set(texts) >= queries  # the files hold what was written, and JSON escapes it
    card = (folder / "model" / "README.md").read_text()
    assert not [c for c in STEERS if c in card]
    assert not canary.exists()


# ---------------------------------------------------------------- what a model folder brings


@pytest.fixture
def model(tmp_path) -> Path:
    """A copy of the arena's model."""
    return Path(shutil.copytree(resolve_model("arena"), tmp_path / "model"))


ESCAPES = {
    "popen": "{{ cycler.__init__.__globals__.os.popen('touch CANARY').read() }}",
    "builtins": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "import": "{{ self.__init__.__globals__.__builtins__.__import__('os').system('touch CANARY') }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "mutation": "{% set _ = messages.append({'role': 'system', 'content': 'x'}) %}",
}


@pytest.mark.parametrize("escape", ESCAPES)
def test_a_chat_template_runs_in_a_sandbox(escape, model, tmp_path):
    canary = tmp_path / "canary"
    template = ESCAPES[escape].replace("CANARY", str(canary))
    (model / "chat_template.jinja").write_text(template)
    with pytest.raises(ModelError, match="the chat template fails on a plain user message"):
        self_play(small("arena-zero", policy={"path": str(model)}), tmp_path / "run")
    assert not canary.exists()


class Touch:
    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self) -> Any:
        return Path.touch, (self.canary,)


def test_pickled_weights_are_never_loaded(model, tmp_path):
    canary = tmp_path / "canary"
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(canary)))
    pickle.loads((model / "pytorch_model.bin").read_bytes())
    assert canary.exists()  # it would
    canary.unlink()
    with pytest.raises(ModelError):
        self_play(small("arena-zero", policy={"path": str(model)}), tmp_path / "run")
    assert not canary.exists()


def test_a_models_own_code_is_not_run_unless_it_is_asked_for(model, tmp_path):
    canary = tmp_path / "canary"
    (model / "modeling_evil.py").write_text(f"open({str(canary)!r}, 'w')\n")
    config = json.loads((model / "config.json").read_text())
    config["model_type"] = "evil"
    config["auto_map"] = {
        "AutoConfig": "modeling_evil.EvilConfig",
        "AutoModelForCausalLM": "modeling_evil.EvilModel",
    }
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError):
        self_play(small("arena-zero", policy={"path": str(model)}), tmp_path / "run")
    assert not canary.exists()


# ---------------------------------------------------------------- what settings say

TEXTS = [
    *("policy.path", "challenger.prompt", "challenger.task", "challenger.template"),
    *("solver.system_prompt", "self_reward.rubric", "device", "policy.chat_template"),
    *("algorithm", "self_reward.mode", "reward.answer.kind", "learner.lr"),
]


@pytest.mark.parametrize("setting", TEXTS)
def test_no_setting_but_a_python_reward_runs_code(setting, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for code in (
        "__import__('pathlib').Path('canary').touch()",
        "{{ cycler.__init__.__globals__.os.popen('touch canary').read() }}$(touch canary)",
    ):
        exit_code = main(["train", "arena", "--dry-run", f"--{setting}", code])
        assert exit_code in (0, 2), capsys.readouterr().err
        assert os.listdir(tmp_path) == []


def test_placeholders_are_replaced_and_nothing_else(tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text("{task.__class__.__mro__} {0} {task} {template} %s ${task}")
    text = challenger_prompt(str(file), "{template}", "{{ 7 * 7 }}")
    # Each is replaced once: what is put in is not read again.
    assert text == "{task.__class__.__mro__} {0} {template} {{ 7 * 7 }} %s ${template}"
