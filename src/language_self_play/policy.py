"""The model that is trained, its frozen initial copy, and its chat template."""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)

from language_self_play.config import Policy as PolicySection
from language_self_play.config import read_text
from language_self_play.errors import ConfigError, InputFileError, ModelError

BUILT_IN_MODEL = "arena"
# Models without a stated context get one that no completion reaches.
UNBOUNDED_CONTEXT = 1 << 30


class Chat:
    """A tokenizer with its chat template: messages to tokens, tokens to text, where to stop."""

    def __init__(self, tokenizer: Any, eos_ids: Sequence[int], template_kwargs: dict[str, Any]):
        self.tokenizer = tokenizer
        self.eos_ids = sorted(set(eos_ids))
        self.pad_id = self.eos_ids[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.special_tokens = sorted(tokenizer.all_special_tokens, key=len, reverse=True)
        self._template_kwargs = template_kwargs

    def encode(self, user: str, system: str | None = None, prefill: str = "") -> list[int]:
        """Tokens of the conversation up to where the assistant speaks, then of `prefill`."""
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": user})
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **self._template_kwargs
        )
        return self.tokenizer.encode(text + prefill, add_special_tokens=False)

    def encode_reply(self, user: str, reply: str, system: str | None = None) -> list[int]:
        """Tokens of `reply` as the assistant writes it after `user`, without a stop token."""
        before = self.encode(user, system)
        whole = self.encode(user, system, prefill=reply)
        if whole[: len(before)] == before:
            return whole[len(before) :]
        return self.tokenizer.encode(reply, add_special_tokens=False)

    def decode(self, token_lists: list[list[int]]) -> list[str]:
        """Their texts; special tokens stay, so that what hides behind them is seen and judged."""
        return self.tokenizer.batch_decode(token_lists, skip_special_tokens=False)

    def without_special(self, text: str) -> str:
        """`text` with nothing in it that would be read as a special token, such as a role mark."""
        for token in self.special_tokens:
            text = text.replace(token, "")
        return text


class Policy:
    """π_θ, the policy that plays both roles, and π_Ref, its frozen initial copy (or None)."""

    def __init__(self, model: PreTrainedModel, chat: Chat, reference: PreTrainedModel | None):
        self.model = model
        self.chat = chat
        self.reference = reference

    @property
    def device(self) -> torch.device:
        return self.model.device

    def save(self, folder: Path) -> None:
        """Write the model and its tokenizer where AutoModelForCausalLM finds them."""
        self.model.save_pretrained(folder)
        self.chat.tokenizer.save_pretrained(folder)

    def load_weights(self, folder: Path) -> None:
        """Overwrite π_θ's weights with those that `save` wrote. Raises ModelError."""
        saved = _load(
            str(folder),
            lambda: AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, use_safetensors=True
            ),
        )
        self.model.load_state_dict(saved.state_dict())


def load_policy(section: PolicySection, device: torch.device, with_reference: bool) -> Policy:
    """Load the model in float32, and a frozen copy of it if `with_reference`.

    Dropout stays off: the sampler's log-probs must be the trainer's. Raises ModelError.
    """
    chat, model = load_chat_model(section, device)
    reference = copy.deepcopy(model).requires_grad_(False) if with_reference else None
    return Policy(model, chat, reference)


def load_chat_model(section: PolicySection, device: torch.device) -> tuple[Chat, PreTrainedModel]:
    """The tokenizer with its chat template, checked first, then the weights. Raises ModelError."""
    chat = load_chat(section)
    path = resolve_model(section.path)
    model = _load(
        section.path,
        lambda: AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, use_safetensors=True
        ),
    )
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if len(chat.tokenizer) > vocabulary:
        raise ModelError(
            f"policy.path = {section.path!r}: the tokenizer has {len(chat.tokenizer)} tokens but the"
            f" model's vocabulary only {vocabulary}; they don't belong together"
        )
    return chat, model.to(device).eval()


def load_chat(section: PolicySection) -> Chat:
    """The tokenizer, with `policy.chat_template` if one is given. Raises ModelError."""
    path = resolve_model(section.path)
    if not Path(path).is_dir():
        print(f"{path}: no folder of that name here, so the hub is asked", file=sys.stderr)
    tokenizer = _load(section.path, lambda: AutoTokenizer.from_pretrained(path))
    if section.chat_template is not None:
        tokenizer.chat_template = read_text(Path(section.chat_template), "policy.chat_template")
    if not tokenizer.chat_template:
        raise ModelError(
            f"policy.path = {section.path!r}: the tokenizer has no chat template, and both players"
            " speak through one; use an instruction-tuned model, or give policy.chat_template a"
            " Jinja file"
        )
    eos_ids = _eos_ids(path, tokenizer)
    if not eos_ids:
        raise ModelError(
            f"policy.path = {section.path!r}: neither the generation config nor the tokenizer names"
            " an end-of-sequence token, so no completion could end"
        )
    chat = Chat(tokenizer, eos_ids, section.chat_template_kwargs)
    try:
        chat.encode("a query")
    except Exception as error:
        # A template is a program of the model's author; whatever it raises is its message.
        raise ModelError(
            f"policy.path = {section.path!r}: the chat template fails on a plain user message: {error}"
        ) from None
    return chat


def resolve_model(path: str) -> str:
    """The folder or hub id to load from; `arena` is the built-in model."""
    if path == BUILT_IN_MODEL:
        return str(resources.files("language_self_play") / "arena" / "model")
    folder = Path(path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            inside = folder / "model"
            hint = f"; did you mean {inside}?" if (inside / "config.json").is_file() else ""
            raise ModelError(f"{path}: the folder holds no config.json, so it is no model{hint}")
        return path
    if folder.exists():
        raise ModelError(f"{path}: is a file; a model is a folder with config.json and safetensors")
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise ModelError(f"{path}: no such folder")
    return path


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
        raise ConfigError(f"device = {name!r}: can't be used here: {reason}") from None
    return device


def load_model_config(path: str) -> PreTrainedConfig:
    """The model's own config, without its weights. Raises ModelError."""
    return _load(path, lambda: AutoConfig.from_pretrained(resolve_model(path)))


def num_parameters(path: str) -> int:
    """How many weights the model has, without loading them. Raises ModelError."""
    config = load_model_config(path)
    with torch.device("meta"):
        model = _load(path, lambda: AutoModelForCausalLM.from_config(config))
    return sum(p.numel() for p in model.parameters())


def context_length(config: PreTrainedConfig) -> int:
    """Most tokens of prompt and completion together; UNBOUNDED_CONTEXT if the model states none."""
    stated = getattr(config.get_text_config(), "max_position_embeddings", None)
    return stated or UNBOUNDED_CONTEXT


def _eos_ids(path: str, tokenizer: Any) -> list[int]:
    """Stop tokens of the generation config (there may be several) and of the tokenizer."""
    ids: list[int] = []
    try:
        eos = transformers.GenerationConfig.from_pretrained(path).eos_token_id
        ids += eos if isinstance(eos, list) else [eos]
    except OSError as error:
        # Not every model has a generation config; one that is there must be readable.
        if (Path(path) / "generation_config.json").exists():
            raise ModelError(f"{path}/generation_config.json: can't be read: {error}") from None
    return [i for i in [*ids, tokenizer.eos_token_id] if i is not None]


def _load(path: str, load: Any) -> Any:
    """Call a transformers loader; whatever it raises becomes one sentence."""
    transformers.utils.logging.disable_progress_bar()
    try:
        return load()
    except (InputFileError, ModelError):
        raise
    except Exception as error:
        # Loaders raise errors of many kinds (OSError, ValueError, KeyError, safetensors' own).
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = " ".join(lines[:2]) if lines else type(error).__name__
        raise ModelError(f"policy.path = {path!r}: can't be loaded: {reason}") from None
