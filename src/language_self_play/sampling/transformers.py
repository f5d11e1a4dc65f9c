"""The in-process sampler: the policy's own weights, one prefill a prompt, decoding in one batch.

In a batch every distinct prompt is computed once, however many completions it gets. Completions that
have ended leave the batch as soon as there are enough of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from transformers import PreTrainedModel

from language_self_play.chat import Chat
from language_self_play.config import Sampling
from language_self_play.decoding import Decoding, PlainDecoding, SharedDecoding
from language_self_play.distributed import ALONE, Ranks
from language_self_play.errors import MemoryLimitError
from language_self_play.forward import goes_on_from_shared_prompts
from language_self_play.lean_decoder import LeanDecoder, lean_decoder
from language_self_play.linear import linears_for_few_rows
from language_self_play.logprobs import draw_tokens
from language_self_play.out_of_memory import unless_out_of_memory
from language_self_play.packing import batches
from language_self_play.prefill import Beginning, prefill
from language_self_play.pretrained import context_length
from language_self_play.randomness import stream_key, uniforms
from language_self_play.types import Completion, FinishReason, Group, Role

# Ended rows leave when they are one in so many: closing the gaps copies the others' keys and values.
LEAVE_AT = 8

# Where the length of a role's completions is set, if not in a section of its own name.
SECTIONS = {"judge": "self_reward", "evaluation": "eval.….NAME"}

Row = tuple[int, int]  # (prompt, completion)
Drawn = tuple[list[int], list[float]]  # tokens, log-probs


class TransformersSampler:
    """Samples from a transformers model. Row by row the draws depend on nothing but their indices.

    Of several ranks each draws its share, and all get all.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        chat: Chat,
        seed: int,
        batch_size: int,
        prompt_tokens: float = math.inf,
        ranks: Ranks = ALONE,
    ):
        self.ranks = ranks
        self.model = model
        self.chat = chat
        self.seed = seed
        self.batch_size = batch_size
        self.prompt_tokens = (
            prompt_tokens  # of one batch, padding included, if it has several prompts
        )
        self.step = 0
        self.trouble: list[str] = []
        self.context_length = context_length(model.config)
        self.shares_prompts = goes_on_from_shared_prompts(model)

    def sync(self, model: PreTrainedModel, step: int) -> None:
        """Sample version `step` from now on. The weights are the model's own: nothing moves."""
        self.model = model
        self.step = step

    @property
    def version(self) -> int:
        """The weights are the policy's own, so they are of the step that is played."""
        return self.step

    def rest(self) -> None:
        """Nothing: it has no memory of its own."""

    def close(self) -> None:
        """Nothing: it has started nothing."""

    @torch.inference_mode()
    def sample(
        self, prompts: list[list[int]], n: int, role: Role, settings: Sampling, max_tokens: int
    ) -> list[Group]:
        """One group of `n` completions of at most `max_tokens` tokens for each prompt, in order.

        Completions are shorter where the model's context ends. Where memory does not suffice, batches
        are halved from here on, which changes no draw. Raises MemoryLimitError if one row is too much.
        """
        if not prompts:
            return []
        groups, completions = self.ranks.share_of_completions(len(prompts), n)
        first = (groups.start, completions.start)
        own = prompts[groups.start : groups.stop]
        drawn = self._sample(own, len(completions), first, role, settings, max_tokens)
        return self.ranks.join(prompts, n, drawn)

    def _sample(
        self,
        prompts: list[list[int]],
        n: int,
        first: Row,
        role: Role,
        settings: Sampling,
        max_tokens: int,
    ) -> list[Group]:
        """The groups of `prompts`, of which `first` is the place among all prompts and completions."""
        if not prompts or not n:
            return []
        key = stream_key(self.seed, self.step, role)
        draw = partial(self._draw, prompts, n, first, key, settings, max_tokens)
        while (drawn := unless_out_of_memory(draw)) is None:
            self._halve_batches(n * len(prompts), role)
        order = [(i, j) for i in range(len(prompts)) for j in range(n)]
        texts = self.chat.decode([self._without_stop(drawn[row][0]) for row in order])
        played = [
            Completion(tokens, text, logprobs, self._finish_reason(tokens))
            for text, (tokens, logprobs) in zip(texts, (drawn[row] for row in order), strict=True)
        ]
        return [Group(p, played[i * n : (i + 1) * n]) for i, p in enumerate(prompts)]

    def _draw(
        self,
        prompts: list[list[int]],
        n: int,
        first: Row,
        key: int,
        settings: Sampling,
        max_tokens: int,
    ) -> dict[Row, Drawn]:
        """Tokens and log-probs of every row."""
        drawn: dict[Row, Drawn] = {}
        lean = lean_decoder(self.model) if self.shares_prompts else None
        with linears_for_few_rows(self.model):
            for rows, decoding in self._batches(prompts, n, max_tokens, lean):
                where = [(first[0] + i, first[1] + j) for i, j in rows]
                completions = self._decode(decoding, where, key, settings, max_tokens)
                drawn |= zip(rows, completions, strict=True)
        return drawn

    def _halve_batches(self, rows: int, role: Role) -> None:
        if (now := min(self.batch_size, rows)) == 1:
            longest = SECTIONS.get(role, role)
            raise MemoryLimitError(
                f"{self.model.device} has no memory left to sample one completion; lower"
                f" {longest}.max_tokens, or use a smaller model"
            )
        self.batch_size = now // 2

    def _batches(
        self, prompts: list[list[int]], n: int, max_tokens: int, lean: LeanDecoder | None
    ) -> Iterator[tuple[list[Row], Decoding]]:
        """Rows of at most batch_size completions, prompts of similar lengths together, prefilled."""
        lengths = list(map(len, prompts))
        if n == 1 and self.shares_prompts:
            beginning = Beginning(self.model, prompts, self.chat.pad_id, max_tokens)
            if beginning.length:
                rests = [length - beginning.length for length in lengths]
                for some in batches(rests, self.prompt_tokens, self.batch_size):
                    behind = beginning.before([prompts[i] for i in some])
                    yield (
                        [(i, 0) for i in some],
                        SharedDecoding(self.model, self.context_length, *behind, lean),
                    )
                return
        for some in batches(lengths, self.prompt_tokens, self.batch_size // n):
            rows = [(i, j) for i in some for j in range(n)]
            yield from self._behind_prompts(prompts, rows, lean)

    def _behind_prompts(
        self, prompts: list[list[int]], rows: list[Row], lean: LeanDecoder | None
    ) -> Iterator[tuple[list[Row], Decoding]]:
        """The rows, in slices of at most batch_size, behind their distinct prompts."""
        distinct = {p: b for b, p in enumerate({tuple(prompts[i]): None for i, _ in rows})}
        of_row = torch.tensor([distinct[tuple(prompts[i])] for i, _ in rows])
        start_behind = (
            partial(SharedDecoding.behind, lean=lean) if self.shares_prompts else PlainDecoding
        )
        prefilled = None
        for start in range(0, len(rows), self.batch_size):
            if prefilled is None or not self.shares_prompts:
                prefilled = prefill(self.model, list(map(list, distinct)), self.chat.pad_id)
            some = slice(start, start + self.batch_size)
            prompt_of_row = of_row[some].to(self.model.device)
            yield (
                rows[some],
                start_behind(self.model, self.context_length, prefilled, prompt_of_row),
            )

    def _decode(
        self, decoding: Decoding, where: list[Row], key: int, settings: Sampling, max_tokens: int
    ) -> list[Drawn]:
        """The completions of one batch."""
        limits = (self.context_length - decoding.positions_R).clamp_max(max_tokens)
        length = int(limits.max())
        index = torch.tensor(where)  # on the CPU, as the uniforms are: MPS has no float64
        uniforms_RT = uniforms(key, index[:, :1], index[:, 1:], torch.arange(length))
        tokens_RT = limits.new_zeros(len(where), length)
        logprobs_RT = torch.zeros(len(where), length, device=limits.device)
        stops = limits.new_tensor(self.chat.eos_ids)
        rows, ended = torch.arange(len(where), device=limits.device), limits < 1
        for t in range(length):
            uniform = uniforms_RT[rows.cpu(), t]
            tokens, logprobs = draw_tokens(
                decoding.logits_RV, uniform, settings.temperature, settings.top_p, settings.top_k
            )
            tokens_RT[rows, t], logprobs_RT[rows, t] = tokens, logprobs
            ended |= torch.isin(tokens, stops) | (limits[rows] <= t + 1)
            num_ended = int(ended.sum())
            if num_ended == len(rows):
                break
            if num_ended * LEAVE_AT >= len(rows):
                left = (~ended).nonzero().squeeze(-1)
                decoding.keep(left)
                rows, tokens, ended = rows[left], tokens[left], ended[left]
            decoding.step(tokens)
        stopped = torch.isin(tokens_RT, stops)
        first_stop = torch.where(stopped.any(-1), stopped.int().argmax(-1), length)
        lengths = torch.minimum(first_stop + 1, limits).tolist()
        return [
            (tokens[:n], logprobs[:n])
            for n, tokens, logprobs in zip(
                lengths, tokens_RT.tolist(), logprobs_RT.tolist(), strict=True
            )
        ]

    def _finish_reason(self, tokens: list[int]) -> FinishReason:
        return "stop" if tokens and tokens[-1] in self.chat.eos_ids else "length"

    def _without_stop(self, tokens: list[int]) -> list[int]:
        return tokens[:-1] if self._finish_reason(tokens) == "stop" else tokens
