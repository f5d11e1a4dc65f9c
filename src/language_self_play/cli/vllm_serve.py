"""`lsp vllm-serve`: vLLM's own server, started with what a run needs of it."""

from __future__ import annotations

import os
import re
import shlex
import socket
import sys
from collections.abc import Mapping
from typing import NamedTuple

from language_self_play.cli import Parser, naming_model
from language_self_play.errors import ConfigError

DESCRIPTION = """\
Serve MODEL with vLLM, on this host, for runs that name it in rollout.vllm.server: they sample from it,
and give it their weights at each step.

MODEL is a folder, a hub id or `arena`: what the run has as policy.path. Options of vLLM's own follow
after `--`; `vllm serve --help` lists them."""

EPILOG = """\
examples:
  lsp vllm-serve ./my-model --python .venv-vllm/bin/python
  lsp vllm-serve ./my-model --dtype bfloat16 --max-model-len 4096 -- --tensor-parallel-size 4
  VLLM_API_KEY=… lsp vllm-serve ./my-model --host 0.0.0.0         for runs on other hosts
  lsp vllm-serve ./my-model --dry-run                             show the plain command
  lsp train my.toml --rollout.engine vllm --rollout.vllm.server http://127.0.0.1:8000

Whoever can ask this server can change its weights. So it listens on this host alone unless it is told
otherwise, and then it wants a key."""

# The share of a host's memory for a server without a GPU, as rollout.vllm.memory_fraction has it.
ON_CPU = 0.4
# Options of vLLM's that would undo ours, and what to do instead.
OURS_ALONE = "it is set here, and a run needs it as it is; leave it out"
BEFORE = "give --{} before the --"
GIVEN = {
    "host": BEFORE.format("host") + ", which then asks for a key",
    "api-key": "put the key into VLLM_API_KEY in the environment, from where all routes have it",
    "uds": BEFORE.format("host"),
    "config": "write its options out: it could hold any of these",
    **{name: BEFORE.format(name) for name in ("port", "dtype", "max-model-len")},
    **dict.fromkeys(("enable-lora", "max-loras", "max-lora-rank"), BEFORE.format("lora-rank")),
    **dict.fromkeys(("model", "middleware", "worker-extension-cls"), OURS_ALONE),
    **dict.fromkeys(("weight-transfer-config", "logprobs-mode", "generation-config"), OURS_ALONE),
    **dict.fromkeys(("skip-tokenizer-init", "enable-scale-out"), OURS_ALONE),
    # Started by `vllm serve`, as a command that --dry-run shows may be; without our gate before them.
    **dict.fromkeys(
        ("grpc", "grpc-port"), "whoever reaches that port is asked for no key; leave it out"
    ),
}
HERE = ("127.0.0.1", "::1", "localhost")


class Command(NamedTuple):
    """What is run, and what is set for it in the environment."""

    arguments: list[str]
    environment: dict[str, str]


def run(arguments: list[str]) -> int:
    parser = Parser(prog="lsp vllm-serve", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--python", metavar="FILE", help="the Python that has vLLM (default: ours)")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: %(default)s)"
    )
    parser.add_argument("--port", type=int, default=8000, help="port (default: %(default)s)")
    parser.add_argument(
        "--api-key-env",
        default="VLLM_API_KEY",
        metavar="NAME",
        help="environment variable that holds the key (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        help="type to compute in: the run's",
    )
    parser.add_argument("--max-model-len", type=int, metavar="N", help="longest text, in tokens")
    parser.add_argument(
        "--lora-rank", type=int, metavar="R", help="for runs with policy.lora of at most this rank"
    )
    parser.add_argument("--dry-run", action="store_true", help="show the command; start nothing")
    own, of_vllm = _split(arguments)
    _refuse_ours(of_vllm)
    options = parser.parse_args(own)

    from language_self_play.config import VLLM_LORA_RANKS

    for name in ("python", "host", "model"):
        if getattr(options, name) == "":
            raise ConfigError(f"{name if name == 'model' else f'--{name}'} is empty")
    if not 0 < options.port < 1 << 16:
        raise ConfigError(f"--port {options.port}: must be a number from 1 to 65535")
    if options.max_model_len is not None and options.max_model_len < 1:
        raise ConfigError(f"--max-model-len {options.max_model_len}: must be at least 1")
    if options.lora_rank is not None and not 0 < options.lora_rank <= VLLM_LORA_RANKS[-1]:
        raise ConfigError(
            f"--lora-rank {options.lora_rank}: must be from 1 to {VLLM_LORA_RANKS[-1]}"
        )

    from language_self_play.sampling.vllm_python import check_python, environment_of_vllm
    from language_self_play.sampling.vllm_server import key_in

    key = key_in(options.api_key_env)
    if options.host not in HERE and not key:
        raise ConfigError(
            f"--host {options.host}: whoever reaches this server can change its weights; put a key into"
            f" {options.api_key_env} in the environment, or leave --host out"
        )

    on_cpu = check_python(options.python, "--python")
    if not options.dry_run:
        _check_port(options.host, options.port)

    from language_self_play.pretrained import adapter_base, load_model_config, resolve_model

    model = resolve_model(options.model)
    with naming_model():
        if (base := adapter_base(model)) is not None:
            raise ConfigError(
                f"{options.model}: is an adapter; serve its base, {base}, to which the run adds it"
            )
        load_model_config(options.model)  # what is no model is told here in a sentence
    python = options.python or sys.executable
    command = server_command(
        python,
        model,
        options.host,
        options.port,
        key,
        dtype=options.dtype,
        max_model_len=options.max_model_len,
        lora_rank=options.lora_rank,
        on_cpu=on_cpu,
    )
    command.arguments.extend(of_vllm)
    if options.dry_run:
        hidden = command.environment | ({"VLLM_API_KEY": "…"} if key else {})
        words = [f"{name}={shlex.quote(value)}" for name, value in hidden.items()]
        print(" ".join([*words, shlex.join(command.arguments)]))
        return 0
    sys.stdout.flush()
    os.execvpe(python, command.arguments, environment_of_vllm() | command.environment)


def server_command(
    python: str,
    model: str,
    host: str,
    port: int,
    key: str = "",
    dtype: str | None = None,
    max_model_len: int | None = None,
    lora_rank: int | None = None,
    on_cpu: bool = False,
) -> Command:
    """vLLM's server as a run needs it; docs/vllm.md says what each option is for."""
    from language_self_play.sampling.vllm_python import IN_SERVER, max_lora_rank

    # As `vllm serve` does, which looks for its own version under a name that the CPUs' package has not.
    arguments = [python, "-P", "-m", "vllm.entrypoints.openai.api_server"]
    if on_cpu and dtype in (None, "auto"):
        dtype = "float32"  # as a run has it there
    given: Mapping[str, object] = {
        "--model": model,
        "--host": host,
        "--port": port,
        "--logprobs-mode": "processed_logprobs",
        "--generation-config": "vllm",
        "--middleware": "lsp_vllm.Gate",
        "--worker-extension-cls": "lsp_vllm.Extension",
        "--weight-transfer-config": '{"backend": "lsp"}',
        "--dtype": dtype,
        "--max-model-len": max_model_len,
    }
    for name, value in given.items():
        if value is not None:
            arguments += [name, str(value)]
    if on_cpu:
        # vLLM would take 0.92 of the host's memory; and 0.32 dies there of a prompt in parts.
        arguments += ["--gpu-memory-utilization", str(ON_CPU), "--no-enable-chunked-prefill"]
    arguments += ["--load-format", "safetensors"]  # nothing is unpickled
    arguments += ["--skip-tokenizer-init", "--enable-prefix-caching", "--enable-scale-out"]
    environment = {"PYTHONPATH": str(IN_SERVER), "VLLM_SERVER_DEV_MODE": "1"}
    environment["VLLM_NO_USAGE_STATS"] = "1"
    if key:
        environment["VLLM_API_KEY"] = key
    if lora_rank is not None:
        rank = str(max_lora_rank(lora_rank))
        arguments += ["--enable-lora", "--max-loras", "1", "--max-lora-rank", rank]
        environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    return Command(arguments, environment)


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Our arguments, and vLLM's behind `--`."""
    if "--" not in arguments:
        return arguments, []
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]


def _refuse_ours(of_vllm: list[str]) -> None:
    """Raises ConfigError for an option that would undo one of ours: the last one counts."""
    for option in of_vllm:
        if (found := re.match(r"--(?:no-)?(\w[\w-]*)", option)) is None:
            continue
        # vLLM takes underscores, `--name=value`, `--name.key value`, and names that are cut short.
        given = found[1].replace("_", "-")
        for name, instead in GIVEN.items():
            if name.startswith(given):
                raise ConfigError(f"-- {option}: --{name} can't be given here; {instead}")


def _check_port(host: str, port: int) -> None:
    """Raises ConfigError where nothing can listen; vLLM would say so by a traceback, after a while."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        )[0]
        with socket.socket(family, kind, protocol) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(address)
    except OSError as error:
        raise ConfigError(
            f"--host {host} --port {port}: can't be listened on ({error.strerror}); choose another"
        ) from None
