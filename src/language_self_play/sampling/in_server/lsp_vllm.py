"""What a vLLM server has of ours: a gate before its routes, and the loading of weights that arrive there.

`lsp vllm-serve` puts this file's folder on the server's PYTHONPATH. It is imported by the Python that has
vLLM, which need not have this package: it imports nothing of ours. See ../vllm_server.py, its client.

    --middleware lsp_vllm.Gate                     every route but /health asks for the key, and there are
        GET    /lsp/about                          what is served
        GET    /lsp/hold                           one run holds the server, as long as its connection lasts
        PUT    /lsp/weights/UPLOAD/FILE            a file of weights, on its way to the engine
        DELETE /lsp/weights/UPLOAD                 they have been loaded
    --weight-transfer-config '{"backend": "lsp"}'  loads an upload through vLLM's own interface
    --worker-extension-cls lsp_vllm.Extension      its import makes that backend known
"""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

SHARED_MEMORY = Path("/dev/shm")
BEAT_S = 10.0  # a byte so often, so that a connection whose other end has gone is noticed
NAME = re.compile(r"[A-Za-z0-9][\w.-]*")

# What a server without a key may be called: a page whose site's name was made to mean this host sends that name.
HERE = re.compile(r"(127\.0\.0\.1|\[::1\]|localhost)(:\d+)?", re.IGNORECASE)

# Whoever holds the server changes it; these only read, or sample.
FOR_ALL = ("/v1/", "/inference/")

# What tells that two models have weights of the same shapes.
SHAPE = (
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "tie_word_embeddings"),
)


# ---------------------------------------------------------------- in the server's process


class Gate:
    """ASGI middleware before all others: asks for the key, knows who holds the server, takes weights in.

    vLLM itself asks for its key on /v1 and its like alone, not on the routes that change weights.
    """

    def __init__(self, app: Any):
        self.app = app
        self.key = os.environ.get("VLLM_API_KEY", "").strip()
        self.held_by: dict[str, str] | None = None
        self.folder: Path | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            try:
                await self.app(scope, receive, send)
            finally:
                self._remove_uploads()
            return
        path, method = scope["path"], scope.get("method", "")
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1")
            for name, value in scope["headers"]
        }
        run = headers.get("x-lsp-run", "")
        if path == "/health":
            await self.app(scope, receive, send)
        elif self.key and not hmac.compare_digest(
            headers.get("authorization", "").encode(), f"Bearer {self.key}".encode()
        ):
            await _reply(send, 401, error="the key is missing or wrong")
        elif not self.key and "origin" in headers:
            await _reply(send, 403, error="without a key this server answers no pages of a browser")
        elif not self.key and not HERE.fullmatch(headers.get("host", "")):
            said = "without a key this server is 127.0.0.1, [::1] or localhost alone; give it a key"
            await _reply(send, 403, error=said)
        elif path == "/lsp/about":
            await _reply(send, 200, **about(scope["app"].state, self.held_by))
        elif self.held_by is not None and run != self.held_by["run"] and self._changes(scope):
            await _reply(send, 409, error=f"it is held by {self.held_by['name']}")
        elif path == "/lsp/hold":
            await self._hold({"run": run, "name": headers.get("x-lsp-name", "?")}, receive, send)
        elif path.startswith("/lsp/weights/"):
            parts = path.split("/")[3:]
            if len(parts) > 2 or not all(NAME.fullmatch(part) for part in parts):
                await _reply(send, 400, error=f"{path}: no name for weights")
            elif method == "PUT" and len(parts) == 2:
                await self._take(parts, receive, send)
            elif method == "DELETE" and len(parts) == 1:
                if self.folder is not None:
                    shutil.rmtree(self.folder / parts[0], ignore_errors=True)
                await _reply(send, 200)
            else:
                await _reply(send, 405, error=f"{method} {path}: not known")
        else:
            await self.app(scope, receive, send)

    def _changes(self, scope: Any) -> bool:
        path = scope["path"]
        samples = path.startswith(FOR_ALL) and not path.endswith("_lora_adapter")
        reads = scope.get("method") in ("GET", "HEAD", "OPTIONS")
        return path == "/lsp/hold" or not (samples or reads)

    async def _hold(self, holder: dict[str, str], receive: Any, send: Any) -> None:
        """The server is the run's until its connection ends."""
        self.held_by = holder
        try:
            start: dict[str, Any] = {"type": "http.response.start", "status": 200}
            await send(start | {"headers": [(b"content-type", b"text/plain")]})
            while self.held_by is holder:  # a run that has lost its connection takes its own place
                await send({"type": "http.response.body", "body": b"\n", "more_body": True})
                with suppress(TimeoutError):
                    while True:
                        message = await asyncio.wait_for(receive(), BEAT_S)
                        if message["type"] == "http.disconnect":
                            return
            await send({"type": "http.response.body", "body": b""})
        finally:
            if self.held_by is holder:
                self.held_by = None
                self._remove_uploads()

    async def _take(self, parts: list[str], receive: Any, send: Any) -> None:
        parent = os.environ.get("LSP_VLLM_UPLOADS")
        if parent is None and SHARED_MEMORY.is_dir():
            parent = str(SHARED_MEMORY)
        try:
            if self.folder is None:
                self.folder = Path(tempfile.mkdtemp(prefix="lsp-vllm-", dir=parent))
        except OSError as error:
            said = f"LSP_VLLM_UPLOADS = {parent}: can't be written ({error.strerror})"
            await _reply(send, 507, error=said)
            return
        upload, name = parts
        folder = self.folder / upload
        try:
            folder.mkdir(exist_ok=True)
            with (folder / name).open("wb") as file:
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ConnectionResetError
                    file.write(message.get("body", b""))
                    more = message.get("more_body", False)
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            if not isinstance(error, ConnectionResetError):
                await _reply(send, 507, error=f"{self.folder}: can't be written ({error.strerror})")
            return
        await _reply(send, 200, folder=str(folder))

    def _remove_uploads(self) -> None:
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder = None


def about(state: Any, held_by: dict[str, str] | None) -> dict[str, Any]:
    """What a run must know before it plays with this server."""
    config, arguments = state.vllm_config, state.args
    model, transfer = config.model_config, config.weight_transfer_config
    text = model.hf_text_config.to_dict()
    return {
        "is_alive": not state.engine_client.errored,
        "held_by": None if held_by is None else held_by["name"],
        "model": model.served_model_name,
        "shape": {name: text[name] for name in SHAPE if text.get(name) is not None},
        "dtype": str(model.dtype).removeprefix("torch."),
        "context": model.max_model_len,
        "max_num_seqs": config.scheduler_config.max_num_seqs,
        "logprobs_mode": model.logprobs_mode,
        "transfer": None if transfer is None else transfer.backend,
        "lora_rank": config.lora_config.max_lora_rank if config.lora_config else None,
        "routes_for_training": bool(int(os.environ.get("VLLM_SERVER_DEV_MODE", "0"))),
        "api_servers": getattr(arguments, "api_server_count", None) or 1,
    }


async def _reply(send: Any, status: int, **said: Any) -> None:
    body = json.dumps(said).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


# ---------------------------------------------------------------- in the engine's process


class Extension:
    """Nothing: vLLM imports this file in each worker to have it."""


@dataclass
class Begin(WeightTransferInitInfo):
    """Nothing has to be agreed on."""


@dataclass
class Upload(WeightTransferUpdateInfo):
    """A folder of safetensors that the gate has taken in: all weights, as a checkpoint names them."""

    folder: str


class UploadedWeights(WeightTransferEngine):
    """vLLM's interface of weight transfer, for weights that lie in a folder of the server's host.

    All is done in one call, so that an update whose sender dies in between leaves nothing half done.
    """

    init_info_cls = Begin
    update_info_cls = Upload

    def init_transfer_engine(self, init_info: Begin) -> None:
        pass

    def start_weight_update(self) -> None:
        pass

    def finish_weight_update(self) -> None:
        pass

    def shutdown(self) -> None:
        pass

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":  # where there is nothing to wait for, waiting raises
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: Upload) -> None:
        """Load them. Raises ValueError if some are missing; shapes that don't fit raise, too."""
        expected = {name.replace(".base_layer.", ".") for name, _ in self.model.named_parameters()}
        initialize_layerwise_reload(self.model)
        try:
            loaded = self.model.load_weights(tensors(Path(update_info.folder)))
        finally:
            finalize_layerwise_reload(self.model, self.model_config)
        pack_tied_weights(self.model)  # vLLM 0.32's reload forgets them
        if loaded is not None and (missing := sorted(expected - loaded)):
            raise ValueError(f"weights are missing, such as {missing[0]}")


WeightTransferEngineFactory.register_engine("lsp", UploadedWeights)


def tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the folder's safetensors files, with its name."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118  it is no dict
                yield name, opened.get_tensor(name)


def pack_tied_weights(model: Any) -> None:
    """Pack again what a CPU's kernels have packed of a weight that vLLM did not see being reloaded.

    That is an output embedding which is tied to the input's.
    """
    for layer in model.modules():
        weight = getattr(layer, "weight", None)
        # Other layers keep nothing but the packed form, and were packed when they were reloaded.
        if hasattr(layer, "cpu_linear") and weight is not None and weight.numel():
            layer.quant_method.process_weights_after_loading(layer)
