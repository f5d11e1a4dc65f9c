"""Models that lie on a hub: a real HTTP server on localhost, asked by real commands."""

from __future__ import annotations

import json
import socket
import threading
from contextlib import contextmanager
from importlib import resources

import pytest

from servers import python_with_hub, serving

ARENA = resources.files("language_self_play") / "arena" / "model"
FILES = {file.name: file.read_bytes() for file in ARENA.iterdir()}
FIXED = """
import torch
from language_self_play.config import Policy
from language_self_play.fixed_model import FixedModel
FixedModel(Policy(path="you/arena"), torch.device("cpu"), torch.float32)
"""


@contextmanager
def one_that_hangs_up():
    """(its address, its calls): a server that hangs up when it is asked something."""
    calls = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    calls.append(connection.recv(1))  # until it is asked something

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", calls
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


def play(tmp_path, url, model):
    command = ["play", model, "--games", "1", "--recipe", "arena"]
    return python_with_hub(tmp_path, url, "-m", "language_self_play", *command)


def test_a_hub_that_does_not_answer_is_asked_twice_and_models_that_were_fetched_still_play(
    tmp_path,
):
    with one_that_hangs_up() as (url, calls):
        done = play(tmp_path, url, "you/arena")
        assert calls.count(b"H") == 2  # HEAD; the client asks for things of its own by GET
    assert done.returncode == 2
    asks, tells, refuses = done.stderr.splitlines()
    assert asks == "you/arena: no folder of that name here, so the hub is asked"
    assert tells.startswith(f"{url}: nothing answers there")
    assert refuses.startswith("lsp: MODEL = 'you/arena': can't be loaded: ")

    with serving({"you/arena": FILES}) as hub:
        done = play(tmp_path, hub.url, "you/arena")
        assert done.returncode == 0, done.stderr
    with one_that_hangs_up() as (url, calls):
        done = play(tmp_path, url, "you/arena")
        assert calls.count(b"H") == 2  # HEAD; the client asks for things of its own by GET
    assert done.returncode == 0, done.stderr


def test_a_model_that_the_hub_does_not_have_is_one_sentence(tmp_path):
    with serving({"you/arena": FILES}) as hub:
        done = play(tmp_path, hub.url, "you/arana")
        assert len(hub.requests) < 10
    assert done.returncode == 2
    _, line = done.stderr.splitlines()
    assert line.startswith("lsp: MODEL = 'you/arana': can't be loaded: ")


@pytest.mark.parametrize("lies", ["whole", "in parts", "both"])
def test_of_a_hubs_weights_an_engine_fetches_those_that_transformers_reads(lies, tmp_path):
    weights = FILES["model.safetensors"]
    parts = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    names = parts if lies == "in parts" else ["model.safetensors"]
    files = {name: data for name, data in FILES.items() if not name.startswith("model.")}
    files |= dict.fromkeys(names, weights)
    doubles = ["consolidated.safetensors", "pytorch_model.bin", "original/consolidated.00.pth"]
    if lies != "whole":
        index = {"metadata": {}, "weight_map": {str(i): name for i, name in enumerate(parts)}}
        files["model.safetensors.index.json"] = json.dumps(index).encode()
    if lies == "both":
        doubles += parts
    files |= dict.fromkeys(doubles, b"none of it")
    with serving({"you/arena": files}) as hub:
        done = python_with_hub(tmp_path, hub.url, "-c", FIXED)
        assert done.returncode == 0, done.stderr
        fetched = {path.rpartition("/resolve/")[2].partition("/")[2] for _, path in hub.requests}
    assert fetched & {*files} >= {"config.json", *names}
    assert not fetched & {*doubles}
