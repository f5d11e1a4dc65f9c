"""vLLM as a server, started by `lsp vllm-serve`: it follows the policy, serves one run, and may die.

The real server of vLLM's CPU build, on localhost. And several ranks, which ask one server or have an engine
each: they play what one plays.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_vllm import (
    CONTEXT,
    GREEDY,
    HIDDEN,
    PROMPTS,
    assert_is_the_policy,
    calm,
    events,
    logprobs_of,
    tokens_of,
    update,
)

from language_self_play import Config, self_play
from language_self_play.chat import Chat
from language_self_play.cli import main
from language_self_play.cli.vllm_serve import server_command
from language_self_play.config import Sampling
from language_self_play.distributed import Place
from language_self_play.errors import ConfigError, Paused, ServiceError
from language_self_play.policy import Policy
from language_self_play.recipe_files import load_recipe, merge
from language_self_play.run_folder import RunFolder
from language_self_play.sampling.vllm import VllmSampler, cores_of_rank, devices_of_rank
from language_self_play.sampling.vllm_server import EngineDied, VllmServer, about, check_server

slow = pytest.mark.slow

STARTS_WITHIN_S = 300
KEY = "secret"
LOGPROB_TOLERANCE = 1e-5


class Server:
    """A server of `lsp vllm-serve` that a test has started, and may start again at the same port."""

    def __init__(self, python: str, model: str, log: Path, *options: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self.command = [sys.executable, "-m", "language_self_play", "vllm-serve", model]
        self.command += ["--python", python, "--port", str(self.port), "--dtype", "float32"]
        self.command += [*options, *([] if "--" in options else ["--"])]
        self.command += ["--enforce-eager", "--max-num-seqs", "4"]
        self.log = log
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        environment = os.environ | {
            "VLLM_API_KEY": KEY,
            "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": str(min(os.sched_getaffinity(0))),
        }
        with self.log.open("a") as out:
            self.process = subprocess.Popen(
                self.command, stdout=out, stderr=out, env=environment, start_new_session=True
            )

    def wait(self) -> None:
        assert self.process is not None
        end = time.monotonic() + STARTS_WITHIN_S
        while True:
            try:
                about(self.address, KEY)
                return
            except EngineDied:
                assert self.process.poll() is None, self.log.read_text()[-3000:]
                assert time.monotonic() < end, self.log.read_text()[-3000:]
                time.sleep(0.3)

    def end(self, how: signal.Signals = signal.SIGTERM) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, how)
        self.process.wait(60)


@contextmanager
def serving(*arguments: Any) -> Iterator[Server]:
    server = Server(*arguments)
    server.start()
    try:
        server.wait()
        yield server
    finally:
        assert server.process is not None
        if server.process.poll() is None:
            server.end()


@pytest.fixture(autouse=True)
def _with_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", KEY)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def llama(make_model: Callable[..., Any], folder: Path, tokenizer: Any) -> Any:
    """A Llama whose embeddings are tied, and where it lies on disk: as `served_llama` begins."""
    model = calm(make_model("llama", tied=True, context=CONTEXT, hidden=HIDDEN))
    model.save_pretrained(folder / "llama")
    tokenizer.save_pretrained(folder / "llama")
    return model


@pytest.fixture(scope="module")
def served_llama(llama: Any, folder: Path, vllm_python: str) -> Iterator[Server]:
    with serving(vllm_python, str(folder / "llama"), folder / "llama.log") as server:
        yield server


@pytest.fixture(scope="module")
def served_arena(folder: Path, vllm_python: str) -> Iterator[Server]:
    """The arena's model, at a server that takes adapters."""
    with serving(
        vllm_python, "arena", folder / "arena.log", "--lora-rank", "4", "--max-model-len", "512"
    ) as server:
        yield server


def config_of(make_config: Callable[..., Config], address: str, **vllm: Any) -> Config:
    rollout = {"engine": "vllm", "vllm": {"server": address, "server_wait_s": 0.0} | vllm}
    return make_config(threads=1, dtype="float32", rollout=rollout)


@pytest.fixture
def sampler(
    llama: Any, endless_chat: Chat, make_config: Callable[..., Config], served_llama: Server
) -> Iterator[VllmSampler]:
    """The server, as a run with this model has it; completions end at their limits only."""
    config = config_of(make_config, served_llama.address)
    made = VllmSampler(Policy(llama, endless_chat), config)
    made.sync(llama, 0)
    yield made
    made.close()
    wait_until_free(served_llama)


def wait_until_free(server: Server) -> None:
    """A server notices a moment later that a run has let go of it."""
    end = time.monotonic() + 10
    while about(server.address, KEY)["held_by"] is not None:
        assert time.monotonic() < end
        time.sleep(0.05)


def uploads() -> set[str]:
    """Where weights lie on their way, at the server or on this side."""
    return {p.name for p in Path("/dev/shm").glob("lsp-*")}


# ---------------------------------------------------------------- the policy's tokens


@slow
def test_after_each_of_three_updates_the_server_is_the_policy(sampler: VllmSampler):
    model = sampler.policy.model
    for step in range(4):
        if step:
            update(dict(model.named_parameters()), step)
            sampler.sync(model, step)
        assert_is_the_policy(sampler, model, sampler.sample)


@slow
def test_the_server_draws_what_an_engine_of_the_run_draws(
    sampler: VllmSampler, make_config: Callable[..., Config], vllm_python: str
):
    # 6 completions are more than the server writes at once: two requests, of 4 and 2.
    own = {"python": vllm_python, "kv_cache_gib": 0.25}
    config = make_config(threads=1, rollout={"engine": "vllm", "vllm": own})
    engine = VllmSampler(sampler.policy, config)
    engine.sync(sampler.policy.model, 0)
    try:
        drawn = [s.sample(PROMPTS, 6, "solver", Sampling(), 8) for s in (sampler, engine)]
    finally:
        engine.close()
    assert tokens_of(drawn[0]) == tokens_of(drawn[1])
    flat = [tuple(c) for group in tokens_of(drawn[0]) for c in group]
    assert len(set(flat)) == len(flat) == 12
    torch.testing.assert_close(logprobs_of(drawn[0]), logprobs_of(drawn[1]), rtol=0, atol=1e-5)


@slow
def test_stop_tokens_end_completions_and_limits_are_each_prompts_own(
    sampler: VllmSampler, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
):
    long = [4 + i % 90 for i in range(CONTEXT - 5)]
    groups = sampler.sample([long, [1, 20, 2]], 2, "solver", Sampling(), 12)
    assert [[len(c.tokens) for c in g.completions] for g in groups] == [[5, 5], [12, 12]]
    [group] = sampler.sample([[1, 20, 2]], 12, "solver", Sampling(temperature=2.0), 12)
    stop = group.completions[0].tokens[3]
    monkeypatch.setattr(sampler, "chat", Chat(tokenizer, [stop], {}))
    [again] = sampler.sample([[1, 20, 2]], 12, "solver", Sampling(temperature=2.0), 12)
    for free, stopped in zip(group.completions, again.completions, strict=True):
        cut = free.tokens.index(stop) + 1 if stop in free.tokens else 12
        assert stopped.tokens == free.tokens[:cut]
        assert stopped.finish_reason == ("stop" if stop in free.tokens else "length")


@slow
def test_weights_that_do_not_fit_are_refused_and_the_next_ones_are_the_policy(
    sampler: VllmSampler, make_model: Callable[..., Any], tmp_path: Path
):
    server = sampler._engine
    assert isinstance(server, VllmServer)
    make_model("llama", hidden=64).save_pretrained(tmp_path / "narrow")
    with pytest.raises(EngineDied, match="it answers 500"):
        server.ask({"do": "load", "folder": str(tmp_path / "narrow"), "version": 7})
    (tmp_path / "part").mkdir()
    part = {"model.norm.weight": torch.ones(HIDDEN)}
    from safetensors.torch import save_file

    save_file(part, tmp_path / "part" / "model.safetensors")
    with pytest.raises(EngineDied, match="weights are missing, such as model.embed_tokens"):
        server.ask({"do": "load", "folder": str(tmp_path / "part"), "version": 7})
    sampler.sync(sampler.policy.model, 8)
    assert_is_the_policy(sampler, sampler.policy.model, sampler.sample)


@slow
def test_an_update_whose_sender_died_does_not_stand_in_the_way_of_the_next(sampler: VllmSampler):
    server = sampler._engine
    assert isinstance(server, VllmServer)
    server._post("/pause")
    server._post("/start_weight_update")
    sampler.sync(sampler.policy.model, 1)
    assert_is_the_policy(sampler, sampler.policy.model, sampler.sample)


@slow
def test_nothing_of_the_weights_stays_behind(
    llama: Any, endless_chat: Chat, make_config: Callable[..., Config], served_llama: Server
):
    before = uploads()
    sampler = VllmSampler(
        Policy(llama, endless_chat), config_of(make_config, served_llama.address)
    )
    sampler.sync(llama, 0)
    server = sampler._engine
    assert isinstance(server, VllmServer)
    server._upload(Path(llama.config._name_or_path or "."), "left")  # nothing there, nothing sent
    left = Path("/dev/shm") / "x"
    left.write_bytes(b"x")
    with left.open("rb") as body:
        server._request("PUT", "/lsp/weights/left/x.safetensors", body, {"Content-Length": "1"})
    left.unlink()
    assert len(uploads() - before) == 1
    sampler.close()
    wait_until_free(served_llama)
    assert uploads() == before


# ---------------------------------------------------------------- who may, and who holds it


@slow
def test_every_route_but_health_asks_for_the_key(served_llama: Server):
    # vLLM's own key does not guard the routes of the second line.
    asked = [("GET", "/health"), ("GET", "/v1/models"), ("GET", "/lsp/about")]
    asked += [("POST", "/pause"), ("POST", "/collective_rpc"), ("GET", "/weight_info")]
    found = {}
    for key in ("", "wrong", KEY):
        for method, path in asked:
            connection = HTTPConnection("127.0.0.1", served_llama.port, timeout=20)
            if not (key == KEY and method == "POST"):
                connection.request(method, path, headers={"Authorization": f"Bearer {key}"})
                found[key, path] = connection.getresponse().status
            connection.close()
    assert {path for (key, path), status in found.items() if key != KEY and status == 200} == {
        "/health"
    }
    assert {status for (key, path), status in found.items() if key != KEY} == {200, 401}
    assert {status for (key, _), status in found.items() if key == KEY} == {200}


@slow
def test_names_of_uploads_stay_in_their_folder(sampler: VllmSampler):
    server = sampler._engine
    assert isinstance(server, VllmServer)
    for path in ("../x", "a/..", "a/../../x", ".hidden/x", "a/b/c"):
        with pytest.raises(EngineDied, match="it answers 400"):
            server._request("PUT", f"/lsp/weights/{path}", b"x")


@slow
def test_one_run_holds_the_server_and_another_is_refused_before_it_loads_anything(
    sampler: VllmSampler,
    served_llama: Server,
    make_config: Callable[..., Config],
    tmp_path: Path,
):
    config = config_of(make_config, served_llama.address)
    with pytest.raises(ConfigError, match=rf"is held by another run, process {os.getpid()} on "):
        check_server(config, "float32", {}, CONTEXT)
    other = VllmServer(config, "other")
    other.wait()
    with pytest.raises(EngineDied, match=r"it answers 409: it is held by process \d+ on"):
        other.ask({"do": "start", "folder": str(tmp_path), "version": 0})
    for path in ("/pause", "/update_weights", "/collective_rpc", "/v1/load_lora_adapter"):
        with pytest.raises(EngineDied, match="it answers 409"):
            other._post(path, {})
    other.close()
    assert_is_the_policy(sampler, sampler.policy.model, sampler.sample)


@slow
def test_completions_of_other_weights_are_never_taken(sampler: VllmSampler):
    server = sampler._engine
    assert isinstance(server, VllmServer)
    server._post("/update_weight_version", {"new_version": "other:0"})
    with pytest.warns(UserWarning, match="it holds weights 'other:0', not this run's"):
        sampler.sample(PROMPTS, 2, "solver", Sampling(), 4)
    assert_is_the_policy(sampler, sampler.policy.model, sampler.sample)
    server = sampler._engine
    assert isinstance(server, VllmServer)
    server._post("/update_weight_version", {"new_version": "other:0"})
    with pytest.raises(ServiceError, match=r"the vLLM server died twice in step 0: it holds"):
        sampler.sample(PROMPTS, 2, "solver", Sampling(), 4)


@slow
def test_what_is_under_way_ends_at_once_when_the_run_is_stopped(sampler: VllmSampler):
    main_thread = threading.main_thread().ident
    assert main_thread is not None
    threading.Timer(0.7, signal.pthread_kill, (main_thread, signal.SIGINT)).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        sampler.sample([[1, 20, 21, 2]] * 200, 4, "solver", Sampling(), 500)
    assert time.monotonic() - began < 5
    assert_is_the_policy(sampler, sampler.policy.model, sampler.sample)
