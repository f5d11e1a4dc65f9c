"""The vLLM sampler: an engine in a process of its own, with its own Python, that we start and own.

Token ids go there and come back with their log-probs, as JSON lines over pipes (vllm_worker.py). The
policy's weights follow as safetensors in shared memory, at each `sync`; with LoRA the adapter alone, and
the engine without it is the reference. A server takes the engine's place where one is named
(vllm_server.py). docs/vllm.md says why it is built so.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from language_self_play.config import Sampling, Vllm
from language_self_play.distributed import ALONE, Place, Ranks
from language_self_play.errors import (
    ConfigError,
    InputFileError,
    LspError,
    MemoryLimitError,
    ServiceError,
)
from language_self_play.fixed_model import FixedModel
from language_self_play.out_of_memory import says_out_of_memory
from language_self_play.policy import Policy
from language_self_play.pretrained import UNBOUNDED_CONTEXT, context_length, vocabulary_size
from language_self_play.randomness import stream_key
from language_self_play.sampling.vllm_python import (
    IN_SERVER,
    check_python,
    environment_of_vllm,
    max_lora_rank,
)
from language_self_play.sampling.vllm_server import EngineDied, Settings, VllmServer
from language_self_play.types import Completion, FinishReason, Group, Role

WORKER = Path(__file__).with_name("vllm_worker.py")
# How torchrun tells our processes of each other; the engine must not take itself for one of them.
OF_RANKS = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_.*"
)
SHARED_MEMORY = Path("/dev/shm")
# vLLM adds a completion's number to its request's seed; torch's generators take 63 bits.
SEED_BITS = 62
SAID_LAST = 2000  # characters of what a dead engine wrote
HALVINGS = 2  # of a batch in one step: each takes the start of an engine

# Asked of an engine; the reply is never empty.
Work = Callable[[Any], dict[str, Any]]


class VllmSampler:
    """Samples in a vLLM process from the weights of the last `sync`.

    The draws are functions of (seed, step, role, group, completion), given the same engine: vLLM draws
    each completion by a generator of its own, seeded with the group's key plus the completion's number.
    Of several ranks each asks for its share, an engine of its own or all of them one server; all get all.
    """

    def __init__(self, policy: Policy | FixedModel, config: Settings, ranks: Ranks = ALONE):
        self.ranks = ranks
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
        self._run = ""  # the name of this start of the run, to a server
        self._engine: EngineProcess | VllmServer | None = None
        self._has_begun = False
        self._restarted, self._halvings = False, 0  # in this step
        self._has_newest = False  # the engine, as it was started in this step

    def sync(self, model: PreTrainedModel, step: int) -> None:
        """Send the policy's weights, version `step`; the first time, start the engine with them.

        Raises ConfigError if it can't be started, ServiceError if it died twice in this step, and
        MemoryLimitError if half its batch, and half of that, are too much.
        """
        assert model is self.policy.whole, "the engine follows one policy"
        self.step, self._restarted, self._halvings, self._has_newest = step, False, 0, False
        if self.settings.server is not None and not self._run:
            self._run = self.ranks.once(lambda: secrets.token_hex(4))
        self._with_restart(self._give_weights)
        self._has_begun = True

    def sample(
        self, prompts: list[list[int]], n: int, role: Role, settings: Sampling, max_tokens: int
    ) -> list[Group]:
        """One group of `n` completions of at most `max_tokens` tokens for each prompt, in order.

        Completions are shorter where the context ends. With a top_k of 1 they are greedy. Raises
        ServiceError if the engine died twice, MemoryLimitError as `sync`.
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
        if self.settings.server is not None or not self.settings.sleep or not self._has_begun:
            return
        _, died = self._try(lambda engine: engine.ask({"do": "sleep"}) if engine else {})
        if died is not None:  # one that has died has no memory, and the next `sync` starts another
            self._tell(f"the vLLM engine died, and is started again for the next step: {died}")

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
        groups, completions = self.ranks.share_of_completions(len(prompts), n)
        own, n_own = prompts[groups.start : groups.stop], len(completions)
        request = {
            "do": "sample",
            "prompts": own,
            "n": n_own,
            "limits": [min(max_tokens, self.context_length - len(p)) for p in own],
            # Of the first completion that is asked for here; vLLM adds the number of each behind it.
            "seeds": [(stream_key(key, g) >> (64 - SEED_BITS)) + completions.start for g in groups],
            # Of equally likely tokens vLLM's top_k draws one; its temperature 0 takes the first.
            "temperature": 0.0 if settings.top_k == 1 else settings.temperature,
            "top_p": settings.top_p,
            "top_k": settings.top_k,
            "stops": self.stops,
            "base": base,
        }
        nothing = {"version": -1, "groups": []}
        reply = self._with_restart(
            lambda engine: engine.ask(request) if own and n_own else nothing, n_own * len(own)
        )
        self.version = self.ranks.most(reply["version"])
        oldest = self.ranks.least(reply["version"] if own and n_own else self.version)
        assert oldest == self.version, f"ranks drew from versions {oldest} and {self.version}"
        drawn = [completion for group in reply["groups"] for completion in group]
        texts = self.chat.decode([self._without_stop(tokens) for tokens, _ in drawn])
        played = [
            Completion(tokens, text, logprobs, self._finish_reason(tokens))
            for text, (tokens, logprobs) in zip(texts, drawn, strict=True)
        ]
        drawn_here = [
            Group(p, played[i * n_own : (i + 1) * n_own]) for i, p in enumerate(own) if n_own
        ]
        return self.ranks.join(prompts, n, drawn_here)

    @property
    def stops(self) -> list[int]:
        """The chat's stop tokens that the model can write; vLLM refuses others."""
        return [i for i in self.chat.eos_ids if i < vocabulary_size(self.policy.model)]

    def _finish_reason(self, tokens: list[int]) -> FinishReason:
        return "stop" if tokens and tokens[-1] in self.chat.eos_ids else "length"

    def _without_stop(self, tokens: list[int]) -> list[int]:
        return tokens[:-1] if self._finish_reason(tokens) == "stop" else tokens

    # ---------------------------------------------------------------- the engine's life

    def _with_restart(self, work: Work, rows: int | None = None) -> dict[str, Any]:
        """`work` by every rank, again where an engine died; `rows` are the completions it asks for."""
        reply, died = self._try(work)
        while died is not None:
            self._mend(died, self.ranks.most(self.batch_size if rows is None else rows))
            _, died = self._try(lambda engine: self._start() if engine is None else {})
            if died is None:
                reply, died = self._try(_unless(reply, work))
        return reply

    def _mend(self, died: str, rows: int) -> None:
        """See to it that a new engine may fare better, and remember why; raise where it can't.

        One that died is started again once a step. One that ran out of memory gets half the batch, at
        most HALVINGS times a step.
        """
        ours = self.settings.server is None
        name = f"the vLLM {'engine' if ours else 'server'}"
        if ours and says_out_of_memory(died):
            self._halve_batches(rows, died)
            self._tell(
                f"{name} ran out of memory and was started again with {self.batch_size} sequences: {died}"
            )
            return
        if not self._has_begun:
            where = "rollout.vllm: the engine did not start"
            if not ours:
                where = f"rollout.vllm.server = {self.settings.server!r}"
            memory = "memory_fraction and kv_cache_gib set its memory; " if "emory" in died else ""
            raise _agreed(ConfigError(f"{where}: {died}; {memory}see docs/vllm.md"))
        if self._restarted:
            raise _agreed(ServiceError(f"{name} died twice in step {self.step}: {died}"))
        self._restarted = True
        self._tell(f"{name} died and was {'started' if ours else 'asked'} again: {died}")
        if not ours:  # it has lost the weights for all ranks, also for those that had their reply
            self.close()

    def _halve_batches(self, rows: int, died: str) -> None:
        if (now := min(self.batch_size, rows)) == 1 or self._halvings == HALVINGS:
            raise _agreed(
                MemoryLimitError(
                    f"step {self.step}: the vLLM engine has no memory left for {now} sequences at once"
                    f" ({died}); lower rollout.batch_size or rollout.vllm.context, or leave it more"
                    " memory beside keys and values, by a lower rollout.vllm.kv_cache_gib or"
                    " memory_fraction"
                )
            )
        self._halvings += 1
        self.batch_size = now // 2

    def _try(self, work: Work) -> tuple[dict[str, Any], str | None]:
        """(What `work` returned, or nothing; what the first rank's engine that died said)."""
        reply, died = {}, ""
        try:
            reply = work(self._engine)
        except EngineDied as error:
            died = str(error) or "without a word"
            self.close()
        said = [rank.decode() for rank in self.ranks.gather(died.encode())]
        return reply, next(filter(None, said), None)

    def _tell(self, what: str) -> None:
        reason = f"step {self.step}: {what}"
        self.trouble.append(reason)
        warnings.warn(reason, stacklevel=5)

    def _start(self) -> dict[str, Any]:
        """A new engine with the policy's current weights. Raises EngineDied."""
        if self.settings.server is not None:
            return self._start_with_server()
        settings, device = self.settings, self.policy.device
        engine: dict[str, Any] = {
            "dtype": str(self.policy.whole.dtype).removeprefix("torch."),
            "seed": 0,  # each request has its own
            "max_num_seqs": self.batch_size,
            "tensor_parallel_size": settings.tensor_parallel,
            "enforce_eager": device.type == "cpu" if settings.eager is None else settings.eager,
            "gpu_memory_utilization": settings.memory_fraction,  # on CPUs too, despite its name
            "load_format": "safetensors",  # nothing is unpickled
            "trust_remote_code": self.config.policy.trust_remote_code,
        }
        if self.context_length < UNBOUNDED_CONTEXT:
            engine["max_model_len"] = self.context_length
        if settings.kv_cache_gib is not None:
            engine["kv_cache_memory_bytes"] = int(settings.kv_cache_gib * 2**30)
        if device.type == "cuda":
            engine["enable_sleep_mode"] = settings.sleep
        else:
            # After a part of a prompt vLLM rewinds the completion's generator, which a CPU's can't: 0.32
            # dies of it.
            engine["enable_chunked_prefill"] = False
        if (lora := self.config.policy.lora) is not None:
            engine |= {
                "enable_lora": True,
                "max_loras": 1,
                "max_lora_rank": max_lora_rank(lora.rank),
            }
        self._engine = EngineProcess(self.config, device.type == "cpu", self.ranks.place)
        try:
            with self._whole_weights() as folder:
                self._engine.ask(
                    {
                        "do": "start",
                        "folder": str(folder),
                        "version": self.step,
                        "settings": engine,
                    }
                )
            if self.policy.adapter is not None:
                self._send_weights(self._engine)
        except BaseException:
            self.close()
            raise
        self._has_newest = True
        return {"version": self.step}

    def _start_with_server(self) -> dict[str, Any]:
        """The server, held by the first rank and with the policy's current weights. Raises EngineDied."""
        self._engine = server = VllmServer(self.config, self._run)
        try:
            server.wait()
            if self.ranks.is_first:
                with self._whole_weights() as folder:
                    server.ask({"do": "start", "folder": str(folder), "version": self.step})
            if self.policy.adapter is not None or not self.ranks.is_first:
                self._send_weights(server)
        except BaseException:
            self.close()
            raise
        self._has_newest = True
        return {"version": self.step}

    def _give_weights(self, engine: EngineProcess | VllmServer | None) -> dict[str, Any]:
        if engine is None:
            return self._start()
        return {"version": self.step} if self._has_newest else self._send_weights(engine)

    @contextmanager
    def _whole_weights(self) -> Iterator[Path]:
        """A folder with all weights but an adapter's."""
        if self.policy.folder is not None:
            yield self.policy.folder
            return
        with _Transfer(self.config) as folder:
            if isinstance(self.policy, FixedModel):
                self.policy.save_weights(folder)
            else:
                self.policy.save_weights(folder, with_adapter=False)
            yield folder

    def _send_weights(self, engine: EngineProcess | VllmServer) -> dict[str, Any]:
        if isinstance(self.policy, FixedModel):
            return {"version": self.step}  # they are there
        if isinstance(engine, VllmServer) and not self.ranks.is_first:
            engine.at(self.step)
            return {"version": self.step}
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

    def __init__(self, config: Settings, on_cpu: bool, place: Place = ALONE.place):
        settings = config.rollout.vllm
        self.timeout_s = settings.timeout_s
        self.errors = tempfile.TemporaryFile("w+b")  # noqa: SIM115  it lives as long as the process
        environment = {k: v for k, v in environment_of_vllm().items() if not OF_RANKS.fullmatch(k)}
        environment |= {
            "PYTHONPATH": str(IN_SERVER),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",  # all it needs is in the folder
        }
        if on_cpu:
            cores = cores_of_rank(sorted(os.sched_getaffinity(0)), config.threads, place)
            environment["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
        elif (devices := devices_of_rank(settings, os.environ, place)) is not None:
            environment["CUDA_VISIBLE_DEVICES"] = devices
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


def cores_of_rank(cores: list[int], threads: int | None, place: Place) -> list[int]:
    """Those of a host's cores on which the engine of one of its ranks computes: others' where there are few."""
    if place.local_size == 1:
        return cores[:threads]
    count = min(threads or 1, len(cores))
    first = place.local_rank * count
    return [cores[(first + i) % len(cores)] for i in range(count)]


def devices_of_rank(settings: Vllm, environment: Mapping[str, str], place: Place) -> str | None:
    """The CUDA_VISIBLE_DEVICES of a rank's engine; None for what the rank itself sees.

    `devices` are dealt out to the ranks of a host in order; unset, each engine has its rank's GPU. Raises
    ConfigError for a number of GPUs that can't be shared out.
    """
    if place.local_size == 1:
        return settings.devices
    if settings.devices is None:
        if settings.tensor_parallel > 1:
            raise ConfigError(
                f"rollout.vllm.tensor_parallel = {settings.tensor_parallel}: each of the"
                f" {place.local_size} ranks of a host has one GPU for its engine; name more of them in"
                " rollout.vllm.devices, or one server for all (rollout.vllm.server)"
            )
        visible = environment.get("CUDA_VISIBLE_DEVICES")
        return str(place.local_rank) if visible is None else visible.split(",")[place.local_rank]
    devices = settings.devices.split(",")
    each, left = divmod(len(devices), place.local_size)
    if each == 0 or left:
        raise ConfigError(
            f"rollout.vllm.devices = {settings.devices!r}: can't be dealt out to {place.local_size} ranks"
            " of a host; name as many for each, or one server for all (rollout.vllm.server)"
        )
    if each < settings.tensor_parallel:
        raise ConfigError(
            f"rollout.vllm.tensor_parallel = {settings.tensor_parallel}: rollout.vllm.devices ="
            f" {settings.devices!r} gives each of the {place.local_size} ranks of a host {each}; name as"
            " many for each, or lower it"
        )
    return ",".join(devices[place.local_rank * each : (place.local_rank + 1) * each])


def _unless(reply: dict[str, Any], work: Work) -> Work:
    """`work`, of which a rank that has had its reply keeps it."""
    return lambda engine: reply or work(engine)


def _agreed(error: LspError) -> LspError:
    """An error that all ranks raise."""
    error.agreed = True
    return error


class _Transfer:
    """A folder in shared memory through which weights go, removed once they have arrived."""

    def __init__(self, config: Settings):
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


def check_vllm(config: Settings) -> None:
    """Raises ConfigError if rollout.vllm.python has no vLLM; warns of a version that is not tested."""
    check_python(config.rollout.vllm.python, "rollout.vllm.python")
