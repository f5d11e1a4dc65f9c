"""A vLLM server, on this host or another, as the engine: asked over HTTP what vllm_worker.py is over a pipe.

`lsp vllm-serve` has started it, with in_server/lsp_vllm.py in it. Everything goes through its one port: token
ids there and back, and the weights as safetensors, which vLLM's own interface of weight transfer then loads. A
run holds the server while it plays; every completion says which weights wrote it.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlsplit

from language_self_play.config import Policy, Rollout, Vllm
from language_self_play.errors import ConfigError

CONNECTS_WITHIN_S = 10.0
ASKS_AGAIN_S = 1.0
SENT_AT_ONCE = 1 << 20  # bytes of weights
# What vLLM's server writes where a log-prob is no number.
NO_LOGPROB = -9999.0
SAID_LAST = 2000  # characters of what it said
ADAPTER = "adapter_config.json"


class Settings(Protocol):
    """What an engine takes of a run's configuration, or an evaluation has in its place."""

    @property
    def policy(self) -> Policy: ...

    @property
    def rollout(self) -> Rollout: ...

    @property
    def seed(self) -> int: ...

    @property
    def threads(self) -> int | None: ...


class EngineDied(Exception):
    """The engine's process or server ended, went away, or raised; the message is what it said last."""


class ServerAway(EngineDied):
    """Nothing at the server's address can be asked; later there may be."""


class Request(NamedTuple):
    """`completions` of one prompt that are asked for in one request."""

    group: int
    completions: range


class _UnderWay:
    """The requests that threads have sent, or are about to send, until all are ended at once."""

    def __init__(self) -> None:
        self._connections: list[http.client.HTTPConnection] = []
        self._is_ended = False

    def add(self, connection: http.client.HTTPConnection) -> None:
        """It is connected. Raises ServerAway once the others were ended."""
        self._connections.append(connection)
        if self._is_ended:  # end() may have come before it could be seen there
            raise ServerAway("what it was asked for is no longer wanted")

    def end(self) -> None:
        self._is_ended = True
        for connection in list(self._connections):
            _shut(connection)


class VllmServer:
    """The engine behind rollout.vllm.server, of one run and one of its ranks.

    `run` names this start of the run. The first rank alone holds the server and gives it weights.
    """

    def __init__(self, config: Settings, run: str):
        settings = config.rollout.vllm
        assert settings.server is not None
        self.address = settings.server
        self.timeout_s, self.wait_s = settings.timeout_s, settings.server_wait_s
        self.key = key_in(settings.api_key_env)
        self.batch_size = config.rollout.batch_size
        self.has_adapter = config.policy.lora is not None
        self.run = run
        self.version = -1
        self.adapter: str | None = None
        self.about: dict[str, Any] = {}
        self._hold: http.client.HTTPConnection | None = None

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """As EngineProcess.ask does. Raises EngineDied."""
        match request["do"]:
            case "start":
                self._start(request)
            case "load":
                self._load(request)
            case "adapter":
                self._load_adapter(request)
            case "sample":
                return {"version": self.version, "groups": self._sample(request)}
            case unknown:
                raise AssertionError(f"unknown request {unknown!r}")
        return {"version": self.version}

    def close(self) -> None:
        """Let go of the server; it goes on running."""
        if self._hold is not None:
            _shut(self._hold)
        self._hold = None

    def at(self, version: int) -> None:
        """From here on the first rank has given it the weights of `version`."""
        self.version = version
        self.adapter = self._adapter_name(version) if self.has_adapter else None

    def wait(self) -> None:
        """Until it answers, for at most rollout.vllm.server_wait_s. Raises EngineDied."""
        deadline = time.monotonic() + self.wait_s
        while True:
            try:
                self.about = about(self.address, self.key)
                return
            except ServerAway as away:
                if time.monotonic() > deadline:
                    raise EngineDied(
                        f"{away}, for {self.wait_s:g} s (rollout.vllm.server_wait_s)"
                    ) from None
                time.sleep(ASKS_AGAIN_S)

    # ---------------------------------------------------------------- weights

    def _start(self, request: dict[str, Any]) -> None:
        self._take_hold()
        self.adapter = None
        self._load(request)

    def _take_hold(self) -> None:
        connection = self._connected()
        try:
            connection.request("GET", "/lsp/hold", headers=self._headers())
            response = connection.getresponse()
            if response.status != http.HTTPStatus.OK:
                raise EngineDied(_reason(response.status, response.read()))
            response.read(1)  # it is ours
        except (OSError, http.client.HTTPException) as error:
            _shut(connection)
            raise ServerAway(_in_words(error)) from None
        except EngineDied:
            _shut(connection)
            raise
        self._hold = connection

    def _load(self, request: dict[str, Any]) -> None:
        version = request["version"]
        with self._uploaded(Path(request["folder"]), f"weights-{version}") as folder:
            # No request of an earlier life goes on, and no key or value of the old weights is kept.
            self._post("/pause?mode=abort&clear_cache=true")
            self._begin_update()
            self._post("/update_weights", {"update_info": {"folder": folder}})
            self._post("/finish_weight_update", {"weight_version": self._name(version)})
            self._post("/resume")
        self.version = version

    def _begin_update(self) -> None:
        try:
            self._post("/start_weight_update")
        except ServerAway:
            raise
        except EngineDied:  # one whose sender has died is still open; ending it does nothing else
            self._post("/finish_weight_update", {})
            self._post("/start_weight_update")

    def _load_adapter(self, request: dict[str, Any]) -> None:
        version, before = request["version"], self.adapter
        name = self._adapter_name(version)
        # Its folder stays as long as the adapter: vLLM may read it again.
        folder = self._upload(Path(request["folder"]), name)
        if before in (name, None):  # after a failed request the server may have it, and we not know
            with suppress(EngineDied):
                self._post("/v1/unload_lora_adapter", {"lora_name": name})
        self._post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": folder})
        self._post("/update_weight_version", {"new_version": self._name(version)})
        self.version, self.adapter = version, name
        if before is not None and before != name:
            self._post("/v1/unload_lora_adapter", {"lora_name": before})
            self._request("DELETE", f"/lsp/weights/{before}")

    @contextmanager
    def _uploaded(self, folder: Path, name: str) -> Iterator[str]:
        """The folder's weights on the server's host, removed there afterwards."""
        try:
            yield self._upload(folder, name)
        finally:
            with suppress(EngineDied):
                self._request("DELETE", f"/lsp/weights/{name}")

    def _upload(self, folder: Path, name: str) -> str:
        """Where on its host the server has put the folder's weights."""
        there = ""
        for file in weight_files(folder):
            with file.open("rb") as opened:
                size = {"Content-Length": str(file.stat().st_size)}
                reply = self._request("PUT", f"/lsp/weights/{name}/{file.name}", opened, size)
            there = reply["folder"]
        return there

    def _name(self, version: int) -> str:
        return f"{self.run}:{version}"

    def _adapter_name(self, version: int) -> str:
        return f"adapter-{self.run}-{version}"

    # ---------------------------------------------------------------- completions

    def _sample(self, request: dict[str, Any]) -> list[list[tuple[list[int], list[float]]]]:
        """(tokens, log-probs) of each completion of each prompt, in order; all prompts at once."""
        n = request["n"]
        at_once = min(n, self.about["max_num_seqs"])
        asked = [
            Request(group, range(n)[first : first + at_once])
            for group in range(len(request["prompts"]))
            for first in range(0, n, at_once)
        ]
        groups: list[list[tuple[list[int], list[float]]]] = [[] for _ in request["prompts"]]
        under_way = _UnderWay()
        pool = ThreadPoolExecutor(max(1, min(len(asked), self.batch_size // at_once)))
        try:
            for part, drawn in zip(
                asked,
                pool.map(lambda part: self._completions(request, part, under_way), asked),
                strict=True,
            ):
                groups[part.group] += drawn
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            under_way.end()  # Ctrl-C included
            raise
        finally:
            pool.shutdown()
        return groups

    def _completions(
        self, request: dict[str, Any], part: Request, under_way: _UnderWay
    ) -> list[tuple[list[int], list[float]]]:
        group, count = part.group, len(part.completions)
        parameters = {
            "n": count,
            "temperature": request["temperature"],
            "top_p": request["top_p"],
            "top_k": request["top_k"],
            "max_tokens": request["limits"][group],
            # vLLM adds a completion's number within its request.
            "seed": request["seeds"][group] + part.completions.start,
            "stop_token_ids": request["stops"],
            "ignore_eos": True,  # the chat's stop tokens alone count
            "detokenize": False,
            "logprobs": 0,  # of the sampled token
        }
        base: str = self.about["model"]
        reply = self._post(
            "/inference/v1/generate",
            {
                "model": base if request["base"] else self.adapter or base,
                "token_ids": request["prompts"][group],
                "sampling_params": parameters,
            },
            under_way,
        )
        choices = sorted(reply["choices"], key=lambda choice: choice["index"])
        for choice in choices:
            self._check_version(choice)
        return [
            (
                choice["token_ids"],
                [_number(at["logprob"]) for at in choice["logprobs"]["content"]],
            )
            for choice in choices
        ]

    def _check_version(self, choice: dict[str, Any]) -> None:
        """Raises EngineDied if other weights than those of `version` wrote any of its tokens."""
        if choice["finish_reason"] == "abort":
            raise EngineDied("it gave up a completion that it was writing")
        wrote = {span["version"] for span in choice["weight_versions"] or []}
        if choice["token_ids"] and wrote != {self._name(self.version)}:
            others = sorted(wrote - {self._name(self.version)}) or ["without a name"]
            raise EngineDied(
                f"it holds weights {others[0]!r}, not this run's {self._name(self.version)!r}: it was"
                " started again, or another run has given it its own"
            )

    # ---------------------------------------------------------------- HTTP

    def _post(
        self, path: str, said: dict[str, Any] | None = None, under_way: _UnderWay | None = None
    ) -> dict[str, Any]:
        body = json.dumps(said).encode() if said is not None else b""
        return self._request("POST", path, body, {"Content-Type": "application/json"}, under_way)

    def _request(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
        under_way: _UnderWay | None = None,
    ) -> dict[str, Any]:
        connection = self._connected()
        try:
            if under_way is not None:
                under_way.add(connection)
            connection.request(method, path, body, self._headers() | (headers or {}))
            response = connection.getresponse()
            status, said = response.status, response.read()
        except TimeoutError:
            raise EngineDied(f"no reply in {self.timeout_s:g} s (rollout.vllm.timeout_s)") from None
        except (OSError, http.client.HTTPException) as error:
            raise ServerAway(_in_words(error)) from None
        finally:
            connection.close()
        if status != http.HTTPStatus.OK:
            raise EngineDied(_reason(status, said))
        return _table(said)

    def _connected(self) -> http.client.HTTPConnection:
        connection = _connection(self.address, CONNECTS_WITHIN_S)
        connection.auto_open = 0  # what is ended while it is used stays so
        try:
            connection.connect()
        except OSError as error:
            raise ServerAway(_in_words(error)) from None
        connection.sock.settimeout(self.timeout_s)
        return connection

    def _headers(self) -> dict[str, str]:
        name = f"process {os.getpid()} on {socket.gethostname()}"
        return _authorization(self.key) | {"X-Lsp-Run": self.run, "X-Lsp-Name": name}


def about(address: str, key: str) -> dict[str, Any]:
    """What the server at `address` says of itself. Raises ServerAway, or EngineDied for another reply."""
    connection = _connection(address, CONNECTS_WITHIN_S)
    try:
        connection.request("GET", "/lsp/about", headers=_authorization(key))
        response = connection.getresponse()
        status, said = response.status, response.read()
    except (OSError, http.client.HTTPException) as error:
        raise ServerAway(_in_words(error)) from None
    finally:
        connection.close()
    if status == http.HTTPStatus.NOT_FOUND:
        raise EngineDied("it is no server of `lsp vllm-serve`")
    if status >= http.HTTPStatus.INTERNAL_SERVER_ERROR:  # of a proxy before it, too
        raise ServerAway(_reason(status, said))
    if status != http.HTTPStatus.OK:
        raise EngineDied(_reason(status, said))
    table = _table(said)
    if "max_num_seqs" not in table:
        raise EngineDied("it is no server of `lsp vllm-serve`")
    if not table["is_alive"]:
        raise ServerAway("its engine has died")
    return table


def ask_server(settings: Vllm) -> dict[str, Any]:
    """What the server of [rollout.vllm] says of itself. Raises ConfigError where there is none."""
    assert settings.server is not None
    name = f"rollout.vllm.server = {settings.server!r}"
    try:
        return about(settings.server, key_in(settings.api_key_env))
    except ServerAway as error:
        raise ConfigError(
            f"{name}: {error}; start it by `lsp vllm-serve`, or correct the address (docs/vllm.md)"
        ) from None
    except EngineDied as error:
        hint = ""
        if "key" in str(error):
            hint = f"; {settings.api_key_env} in the environment must hold the server's"
        raise ConfigError(f"{name}: {error}{hint} (docs/vllm.md)") from None


def check_server(config: Settings, dtype: str | None, model: dict[str, Any], context: int) -> None:
    """Raises ConfigError unless the server of rollout.vllm.server can play this run.

    `dtype` is None where any will do; `model` is the policy's configuration as transformers has it,
    `context` its longest text.
    """
    settings = config.rollout.vllm
    name = f"rollout.vllm.server = {settings.server!r}"
    found = ask_server(settings)
    text = model.get("text_config") or model
    for field, value in found["shape"].items():
        if text.get(field) is not None and text[field] != value:
            raise ConfigError(
                f"{name}: serves {found['model']!r}, whose {field} is {value}; policy.path ="
                f" {config.policy.path!r} has {text[field]}: start it with this run's model"
            )
    if dtype is not None and found["dtype"] != dtype:
        raise ConfigError(
            f"{name}: computes in {found['dtype']}, and this run in {dtype}; start it with --dtype"
            f" {dtype}, or set dtype"
        )
    wanted = min(context, settings.context or context)
    if found["context"] < wanted:
        raise ConfigError(
            f"{name}: has room for {found['context']} tokens, and this run asks for up to {wanted}; start"
            f" it with --max-model-len {wanted}, or set rollout.vllm.context = {found['context']}"
        )
    if found["transfer"] != "lsp" or not found["routes_for_training"]:
        raise ConfigError(f"{name}: takes no weights; start it by `lsp vllm-serve` (docs/vllm.md)")
    if found["logprobs_mode"] != "processed_logprobs":
        raise ConfigError(
            f"{name}: gives {found['logprobs_mode']}; start it with --logprobs-mode processed_logprobs"
        )
    if found["api_servers"] > 1:
        raise ConfigError(
            f"{name}: has {found['api_servers']} processes that answer, which don't know of each other"
            " who holds it; start it with --api-server-count 1"
        )
    if config.policy.lora is not None and config.policy.lora.rank > (found["lora_rank"] or 0):
        raise ConfigError(
            f"{name}: takes no adapter of rank {config.policy.lora.rank}; start it with --lora-rank"
            f" {config.policy.lora.rank}"
        )
    if found["held_by"] is not None:
        raise ConfigError(
            f"{name}: is held by another run, {found['held_by']}; let it end, or start a server for this"
            " one"
        )


def key_in(variable: str) -> str:
    """The key that an environment variable holds, empty without one. Raises ConfigError."""
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(
            f"{variable} in the environment: holds no key; one has letters, digits and signs of ASCII"
        )
    return key


def weight_files(folder: Path) -> list[Path]:
    """The files of a model's weights, or of an adapter: some hub models lie twice in their folder.

    Raises EngineDied for an index that can't be read, or that names a file which isn't there.
    """
    index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if whole.is_file():  # transformers, too, takes it before the index
        return [whole]
    if not index.is_file():
        return [
            f for f in sorted(folder.iterdir()) if f.suffix == ".safetensors" or f.name == ADAPTER
        ]
    try:
        named = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        files = [folder / name for name in named]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise EngineDied(f"{index}: can't be read as an index of weights") from None
    for file in files:
        if not file.is_file():
            raise EngineDied(f"{file}: is missing, and {index.name} names it")
    return files


def _connection(address: str, timeout_s: float) -> http.client.HTTPConnection:
    parts = urlsplit(address)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    assert parts.hostname is not None
    return kind(parts.hostname, parts.port, timeout=timeout_s, blocksize=SENT_AT_ONCE)


def _shut(connection: http.client.HTTPConnection) -> None:
    """End it now, also while another thread waits for its reply."""
    opened = connection.sock
    if opened is not None:
        with suppress(OSError):
            opened.shutdown(socket.SHUT_RDWR)
    connection.close()


def _authorization(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


def _in_words(error: Exception) -> str:
    said = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return f"nothing answers there ({said})"


def _table(said: bytes) -> dict[str, Any]:
    """What was said, where it is a table; vLLM says some things in words."""
    with suppress(ValueError):
        table = json.loads(said)
        if isinstance(table, dict):
            return table
    return {}


def _reason(status: int, said: bytes) -> str:
    """Why the server refused, in its words."""
    error = _table(said).get("error")
    if isinstance(error, dict):
        error = error.get("message")
    words = str(error or said.decode(errors="replace") or "no word why")
    return f"it answers {status}: {' '.join(words.split())[:SAID_LAST]}"


def _number(logprob: float) -> float:
    return math.nan if logprob == NO_LOGPROB else logprob
