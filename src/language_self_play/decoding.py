"""The next token's logits of many rows, token after token: behind shared prompts, or plainly.

Both ways give the same logits; `SharedDecoding` copies nothing as rows grow and computes a prompt's
keys and values once for all its rows. `PlainDecoding` is for models whose attention it does not know.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from language_self_play.lean_decoder import LeanDecoder
from language_self_play.prefill import Prefilled
from language_self_play.shared_prompt import SharedPrompt, go_on


class Decoding(Protocol):
    """R rows, the logits (R, V) of their next tokens, and where those stand."""

    logits_RV: Tensor
    positions_R: Tensor

    def step(self, tokens_R: Tensor) -> None:
        """Append one token to every row."""

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these, before the next step."""


class SharedDecoding:
    """Rows behind prompts that exist once; with `lean` instead of the model's modules."""

    def __init__(
        self,
        model: PreTrainedModel,
        context_length: int,
        logits_RV: Tensor,
        cache: SharedPrompt,
        positions_R: Tensor,
        lean: LeanDecoder | None = None,
    ):
        self.model, self.cache, self.lean = model, cache, lean
        self.logits_RV, self.positions_R = logits_RV, positions_R
        self.last_position = context_length - 1
        if lean:
            cache.to(lean.dtype)

    @classmethod
    def behind(
        cls,
        model: PreTrainedModel,
        context_length: int,
        prompts: Prefilled,
        prompt_of_row: Tensor,
        lean: LeanDecoder | None = None,
    ) -> SharedDecoding:
        """Rows that begin behind `prompts`, which can be gone on from again."""
        cache = SharedPrompt(prompts.cache, prompts.mask_BP, prompt_of_row)
        positions = prompts.mask_BP.sum(-1)[prompt_of_row]
        return cls(model, context_length, prompts.logits_BV[prompt_of_row], cache, positions, lean)

    def step(self, tokens_R: Tensor) -> None:
        # A row that has ended may stay for a while, beyond the end of the context.
        positions = self.positions_R.clamp_max(self.last_position)
        if self.lean:
            self.logits_RV = self.lean.next_logits(self.cache, tokens_R, positions)
        else:
            inputs = {"input_ids": tokens_R[:, None], "position_ids": positions[:, None]}
            self.logits_RV = go_on(self.model, self.cache, **inputs)[:, -1]
        self.positions_R = self.positions_R + 1

    def keep(self, rows: Tensor) -> None:
        self.cache.keep(rows)
        self.positions_R = self.positions_R[rows]


class PlainDecoding:
    """Rows that each have their prompt's keys and values, which grow by copying."""

    def __init__(
        self,
        model: PreTrainedModel,
        context_length: int,
        prompts: Prefilled,
        prompt_of_row: Tensor,
    ):
        self.model, self.cache = model, prompts.cache
        self.cache.batch_select_indices(prompt_of_row)
        self.logits_RV, self.mask = prompts.logits_BV[prompt_of_row], prompts.mask_BP[prompt_of_row]
        self.positions_R = self.mask.sum(-1)
        self.last_position = context_length - 1

    def step(self, tokens_R: Tensor) -> None:
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], 1)
        self.logits_RV = self.model(
            input_ids=tokens_R[:, None],
            attention_mask=self.mask,
            position_ids=self.positions_R.clamp_max(self.last_position)[:, None],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        self.positions_R = self.positions_R + 1

    def keep(self, rows: Tensor) -> None:
        self.cache.batch_select_indices(rows)
        self.mask, self.positions_R = self.mask[rows], self.positions_R[rows]
