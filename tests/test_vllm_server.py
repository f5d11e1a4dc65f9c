"""A real OpenAI-compatible server, vLLM's own, as the judge of pairs: what it is asked and what it replies."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

from language_self_play.arena.tiny_model import build_tokenizer
from language_self_play.cli import main

pytestmark = pytest.mark.slow

STARTS_WITHIN_S = 300
QUERIES = ["Name a colour.", "Add 1 and 2."]


def small_model(folder: Path) -> None:
    """A random Llama: what it replies is prose of a kind, and never a verdict."""
    tokenizer = build_tokenizer()
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8192,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture
def server(vllm_python: str, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """(the server's address, its log), serving the model `small`."""
    small_model(tmp_path / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # vLLM numbers its threads itself; PYTHONPATH is that of our Python.
    ours = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "PYTHONPATH", "PYTHONHOME")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    environment |= {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": str(min(os.sched_getaffinity(0))),
    }
    command = [vllm_python, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
    command += ["--model", str(tmp_path / "model"), "--served-model-name", "small"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", "8192"]
    log = tmp_path / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, env=environment, start_new_session=True
        )
    try:
        end = time.monotonic() + STARTS_WITHIN_S
        while not answers(port):
            assert process.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < end, log.read_text()[-2000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1", log
    finally:
        process.terminate()
        process.wait(60)


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
            return True
    except OSError:
        return False


def test_vllms_server_is_asked_about_both_orders_and_its_prose_is_quoted(
    server: tuple[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    address, log = server
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    Path("p.jsonl").write_text("\n".join(json.dumps({"prompt": query}) for query in QUERIES))
    for name, texts in (("mine", ["red", "3"]), ("theirs", ["blue, or green", "12"])):
        rows = zip(QUERIES, texts, strict=True)
        Path(f"{name}.json").write_text(
            json.dumps([{"instruction": q, "output": t, "generator": name} for q, t in rows])
        )
    command = ["eval", "win-rate", "mine.json", "theirs.json", "--prompts", "p.jsonl"]
    command += ["--judge.base_url", address, "--judge.model", "small"]
    command += ["--judge.max_tokens", "16", "--judge.retries", "1", "--out", "out"]
    assert main(command) == 75  # without a single verdict it can be asked again
    said = capsys.readouterr()
    assert "2 pairs in both orders: 4 requests to small" in said.out
    assert re.search(r"small at \S+ gave no score in 2 requests; .* from 0 to 2: '.+'", said.err)
    # Each of the 4 prompts twice, and nothing that the server refused.
    assert len(re.findall(r'POST /v1/chat/completions HTTP/1.1" 200', log.read_text())) == 8
    assert 'chat/completions HTTP/1.1" 4' not in log.read_text()
