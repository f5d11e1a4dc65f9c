"""Random models of three sizes, a tokenizer in which texts and ids map one to one, and prompts.

Two sides that are compared load the same weights from the same folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD_ID = 0
CONTEXT = 2048

SIZES: dict[str, dict[str, Any]] = {
    "1M": {
        "vocab_size": 2048,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    },
    "30M": {
        "vocab_size": 8192,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 9,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    # SmolLM-135M's shape.
    "135M": {
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    # For the tests of these files.
    "toy": {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}


@dataclass(frozen=True)
class Work:
    """What a step has to do: a model, its type, and how much is sampled and learned from."""

    size: str = "1M"
    dtype: str = "float32"
    beta: float = 0.05
    num_queries: int = 8
    group_size: int = 8
    challenger_prompt: int = 400  # tokens
    solver_prompt: int = 140  # the chat template's and a query of 128
    length: int = 128  # of every completion, of both roles
    vocabulary: int | None = None  # None: the size's own

    @property
    def shape(self) -> dict[str, Any]:
        """The model's architecture."""
        own = SIZES[self.size]
        return own if self.vocabulary is None else own | {"vocab_size": self.vocabulary}

    @property
    def vocab_size(self) -> int:
        return self.shape["vocab_size"]

    @property
    def torch_dtype(self) -> torch.dtype:
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.dtype]


def save_model(work: Work, folder: Path) -> None:
    """Random weights and a tokenizer, where `from_pretrained` finds them."""
    config = LlamaConfig(
        **work.shape,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=PAD_ID,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(work.torch_dtype).save_pretrained(folder)
    build_tokenizer(work.vocab_size).save_pretrained(folder)


def build_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """One word a token, `w0` to `w{vocabulary - 1}`.

    Its stop token is the id after the last: no model can draw it, so every completion has full length.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = {f"w{i}": i for i in range(vocabulary)} | {"stop": vocabulary}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=f"w{PAD_ID}",
        eos_token="stop",
        padding_side="left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def prompts(work: Work, seed: int) -> tuple[list[int], list[list[int]]]:
    """The challenger prompt and the Solver's prompts, as token ids without padding's."""
    generator = torch.Generator().manual_seed(seed)

    def draw(length: int) -> list[int]:
        return torch.randint(1, work.vocab_size, (length,), generator=generator).tolist()

    return draw(work.challenger_prompt), [draw(work.solver_prompt) for _ in range(work.num_queries)]


def as_text(tokens: list[int]) -> str:
    """The text that `build_tokenizer`'s tokenizer reads as `tokens`."""
    return " ".join(f"w{token}" for token in tokens)
