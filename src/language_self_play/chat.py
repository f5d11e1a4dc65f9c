"""A tokenizer with its chat template: messages to tokens, tokens to text, where to stop."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoTokenizer

from language_self_play.config import Policy as PolicySection
from language_self_play.errors import ModelError
from language_self_play.pretrained import (
    adapter_base,
    announce_hub,
    load_model_config,
    read,
    resolve_model,
)
from language_self_play.recipe_files import read_text

# Texts longer than the model's context are refused in our own words.
QUIETLY: dict[str, Any] = {"add_special_tokens": False, "verbose": False}


class Chat:
    """Both players speak through it; nothing else in the program knows a model's chat format."""

    def __init__(self, tokenizer: Any, eos_ids: Sequence[int], template_kwargs: dict[str, Any]):
        self.tokenizer = tokenizer
        self.eos_ids = sorted(set(eos_ids))
        self.pad_id = self.eos_ids[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.special_tokens = special_tokens(tokenizer)
        self._template_kwargs = template_kwargs

    def encode(self, user: str, system: str | None = None, prefill: str = "") -> list[int]:
        """Tokens of the conversation up to where the assistant speaks, then of `prefill`."""
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": user})
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **self._template_kwargs
        )
        return self.tokenizer.encode(text + prefill, **QUIETLY)

    def encode_reply(self, user: str, reply: str, system: str | None = None) -> list[int]:
        """Tokens of `reply` as the assistant writes it after `user`, without a stop token."""
        before = self.encode(user, system)
        whole = self.encode(user, system, prefill=reply)
        if whole[: len(before)] == before:
            return whole[len(before) :]
        return self.tokenizer.encode(reply, **QUIETLY)

    def decode(self, token_lists: list[list[int]]) -> list[str]:
        """Their texts; special tokens stay, so that what hides behind them is seen and judged."""
        return self.tokenizer.batch_decode(token_lists, skip_special_tokens=False)

    def without_special(self, text: str) -> str:
        """`text` with nothing in it that would be read as a special token, such as a role mark."""
        return without(text, self.special_tokens)


def special_tokens(tokenizer: Any) -> list[str]:
    """Texts that `tokenizer` reads as special tokens, longest first."""
    # Of some models, Llama 3 among them, all_special_tokens lacks the tokens that mark roles.
    added = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    return sorted({*tokenizer.all_special_tokens, *added}, key=lambda text: (-len(text), text))


def without(text: str, marks: Sequence[str]) -> str:
    """`text` with none of `marks` in it, nor one that closes up where another was taken out."""
    before = None
    while text != before:
        before = text
        for mark in marks:
            text = text.replace(mark, "")
    return text


def load_chat(section: PolicySection) -> Chat:
    """The tokenizer, with `policy.chat_template` if one is given. Raises ModelError."""
    announce_hub(resolve_model(section.path))
    load_model_config(section.path, section.trust_remote_code)  # what it is no model of, says so
    path = resolve_model(_tokenizer_path(section.path))
    tokenizer = read(
        section.path,
        lambda: AutoTokenizer.from_pretrained(path, trust_remote_code=section.trust_remote_code),
    )
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


def _tokenizer_path(path: str) -> str:
    """Where the tokenizer lies: with the model, or under an adapter that comes without one."""
    folder = Path(resolve_model(path))
    if (base := adapter_base(path)) is None:
        return path
    has_tokenizer = not folder.is_dir() or (folder / "tokenizer_config.json").is_file()
    return path if has_tokenizer else _tokenizer_path(base)


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
