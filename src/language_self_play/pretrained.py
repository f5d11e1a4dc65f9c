"""Models as they lie in folders and on the hub: found, checked and loaded, safetensors only.

A folder or hub id may hold a whole model (config.json) or a LoRA adapter (adapter_config.json), whose
base is then found in the same way and the adapter merged into it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from language_self_play.errors import ConfigError, InputFileError, ModelError
from language_self_play.extras import require
from language_self_play.hub import look_for_hub
from language_self_play.model_paths import resolve_model
from language_self_play.shard_files import Shards

# Models without a stated context get one that no completion reaches.
UNBOUNDED_CONTEXT = 1 << 30

Loaded = TypeVar("Loaded")


def load_model(
    path: str, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The causal language model at `path`, in evaluation mode and without dropout.

    The sampler's log-probs must be the trainer's, so no dropout is ever active, in training neither.
    Raises ModelError, or ConfigError for an adapter without the library that reads it.
    """
    if (base := adapter_base(path)) is not None:
        peft = require("peft", "lora", f"policy.path = {path!r} (an adapter)")
        model = load_model(base, dtype, device, trust_remote_code)
        adapted = read(path, lambda: peft.PeftModel.from_pretrained(model, path).merge_and_unload())
        return adapted.eval()
    found = resolve_model(path)
    config = load_model_config(path, trust_remote_code)
    load: Callable[..., Any] = partial(
        AutoModelForCausalLM.from_pretrained, found, trust_remote_code=trust_remote_code
    )
    if shards := shards_in(found):
        # The class itself, which is told what it would read from its own files.
        kind = type(hollow_model(path, dtype, trust_remote_code))
        weights = read(path, lambda: Shards((file, "") for file in shards).model())
        load = partial(kind.from_pretrained, None, config=config, state_dict=weights)
    model = load_whole(
        path,
        partial(
            load,
            dtype=dtype,
            use_safetensors=True,
            attn_implementation=attention_kernel(config),
            output_loading_info=True,
        ),
    )
    model.to(device)  # type: ignore[arg-type]  # transformers' stub
    return without_dropout(model.eval())


def hollow_model(path: str, dtype: torch.dtype, trust_remote_code: bool = False) -> PreTrainedModel:
    """`load_model`'s model without its weights and buffers, which are on the meta device."""
    config = load_model_config(path, trust_remote_code)
    build = partial(AutoModelForCausalLM.from_config, attn_implementation=attention_kernel(config))
    with torch.device("meta"):
        model = read(path, lambda: build(config, dtype=dtype, trust_remote_code=trust_remote_code))
    return without_dropout(model.eval())


def load_whole(
    path: str,
    load: Callable[[], Any],  # transformers' stub does not know what it returns
    setting: str = "policy.path",
) -> PreTrainedModel:
    """The model that `load` returns together with a report of its loading.

    Raises ModelError for one that can't be loaded, or some of whose weights are not there.
    """
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()  # its table of missing weights; ours is below
    try:
        model, report = read(path, load, setting)
    finally:
        transformers.utils.logging.set_verbosity(verbosity)
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"{setting} = {path!r}: the weights have no {', '.join(missing[:3])}, which would be drawn"
            " at random; the folder is damaged, or holds a model of another kind"
        )
    return model


def shards_in(path: str) -> list[Path]:
    """The files of rows (shard_files.py) in the folder at `path`; none in one of a whole model."""
    return sorted(Path(path).glob("shard-*-of-*.safetensors"))


def attention_kernel(config: PreTrainedConfig) -> str | None:
    """The attention that transformers is asked for; None for its own choice.

    Its usual kernel leaves out the cap that Gemma 2 puts on attention scores; the eager one has it.
    """
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    return "eager" if capped else None


def without_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """`model` with every dropout probability 0, its config unchanged."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    return model


def load_model_config(path: str, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The model's own config, without its weights; of an adapter its base's. Raises ModelError."""
    found = resolve_model(adapter_base(path) or path)
    if adapter_base(found) is not None:
        return load_model_config(found, trust_remote_code)
    return read(
        path, lambda: AutoConfig.from_pretrained(found, trust_remote_code=trust_remote_code)
    )


def adapter_base(path: str) -> str | None:
    """The model under the LoRA adapter at `path`; None if `path` is a whole model.

    Raises ModelError for an adapter that doesn't say, or whose weights are not safetensors.
    """
    found = resolve_model(path)
    folder = Path(found)
    if folder.is_dir() and (folder / "config.json").is_file():
        return None
    file = read(path, lambda: transformers.utils.find_adapter_config_file(found))
    if file is None:
        return None
    if folder.is_dir() and not (folder / "adapter_model.safetensors").is_file():
        raise ModelError(f"{path}: the adapter has no adapter_model.safetensors")
    if not folder.is_dir():  # PEFT would take pickled weights of a hub's adapter
        read(path, lambda: transformers.utils.cached_file(found, "adapter_model.safetensors"))
    table = read(path, lambda: json.loads(Path(file).read_text("utf-8")))
    base = table.get("base_model_name_or_path") if isinstance(table, dict) else None
    if not isinstance(base, str) or not base or base == path:
        raise ModelError(f"{path}: adapter_config.json names no base_model_name_or_path")
    return base


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA, else MPS, else CPU. Raises ConfigError for a device that isn't here."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ConfigError(
            f"device = {name!r}: can't be used here: {reason}; try another, such as --device cpu"
        ) from None
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on a CUDA device that has it in hardware, else float32."""
    if name == "auto":
        capable = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if capable else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def context_length(config: PreTrainedConfig) -> int:
    """Most tokens of prompt and completion together; UNBOUNDED_CONTEXT if the model states none.

    With longrope no more than it was first trained for. Beyond that all positions of a pass are rotated
    by other factors, which keys that a sampler has kept are not, nor other micro-batches: the sampler's
    log-probs would not be the trainer's.
    """
    return longrope_context(config) or stated_context(config)


def stated_context(config: PreTrainedConfig) -> int:
    """The context that the model's config states, or UNBOUNDED_CONTEXT."""
    stated = getattr(config.get_text_config(), "max_position_embeddings", None)
    return stated or UNBOUNDED_CONTEXT


def longrope_context(config: PreTrainedConfig) -> int | None:
    """Where the factors of longrope (Ding et al. 2024), as of Phi-3, change; None for other models."""
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    # Models with layers of several kinds have one table for each kind.
    tables = [rope, *(table for table in rope.values() if isinstance(table, dict))]
    originals = [
        table.get("original_max_position_embeddings")
        or getattr(text, "original_max_position_embeddings", None)
        for table in tables
        if table.get("rope_type", table.get("type")) in ("longrope", "su")  # its first name
    ]
    return min((length for length in originals if length), default=None)


def vocabulary_size(model: PreTrainedModel) -> int:
    """How many tokens have an embedding: at least as many as the tokenizer knows."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    return weight.shape[0]


def announce_hub(path: str) -> None:
    """Say that the hub is asked for `path`: a mistyped folder name looks like a hub id."""
    if not Path(path).is_dir():
        print(f"{path}: no folder of that name here, so the hub is asked", file=sys.stderr)


def read(path: str, load: Callable[[], Loaded], setting: str = "policy.path") -> Loaded:
    """Call a loader of what `setting` names; whatever it raises becomes one sentence, a ModelError."""
    transformers.utils.logging.disable_progress_bar()
    if not Path(resolve_model(path)).is_dir():
        look_for_hub()
    try:
        return load()
    except (InputFileError, ModelError):
        raise
    except Exception as error:
        # Loaders raise errors of many kinds (OSError, ValueError, KeyError, safetensors' own).
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = " ".join(lines[:2]) if lines else type(error).__name__
        if "trust_remote_code" in str(error):
            reason = "it needs Python code of its authors; trust_remote_code = true runs it"
        elif "sentencepiece" in str(error):
            reason = "it has no tokenizer.json to load; if it has a SentencePiece model, pip install sentencepiece"
        raise ModelError(f"{setting} = {path!r}: can't be loaded: {reason}") from None
