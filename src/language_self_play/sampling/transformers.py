"""The in-process sampler: the policy's own weights, one prefill a prompt, decoding in one batch.

In a batch every distinct prompt is computed once, however many completions it gets: its keys and
values are repeated in the cache. A completion that has ended leaves the batch.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from language_self_play.chat import Chat
from language_self_play.config import Sampling
from language_self_play.errors import NonFiniteError
from language_self_play.logprobs import draw_tokens
from language_self_play.packing import pad_left
from language_self_play.pretrained import context_length
from language_self_play.randomness import stream_key, uniforms
from language_self_play.types import Completion, FinishReason, Group, Role


class TransformersSampler:
    """Samples from a transformers model. Row by row the draws depend on nothing but their indices."""

    def __init__(self, model: PreTrainedModel, chat: Chat, seed: int, batch_size: int):
        self.model = model
        self.chat = chat
        self.seed = seed
        self.batch_size = batch_size
        self.step = 0
        self.context_length = context_length(model.config)

    def sync(self, model: PreTrainedModel, step: int) -> None:
        """Sample version `step` from now on. The weights are the model's own: nothing moves."""
        self.model = model
        self.step = step

    @torch.inference_mode()
    def sample(
        self, prompts: list[list[int]], n: int, role: Role, settings: Sampling, max_tokens: int
    ) -> list[Group]:
        """One group of `n` completions of at most `max_tokens` tokens for each prompt, in order.

        Completions are shorter where the model's context ends. Raises NonFiniteError for
        log-probs that are not finite.
        """
        key = stream_key(self.seed, self.step, role)
        tokens: list[list[list[int]]] = [[[] for _ in range(n)] for _ in prompts]
        logprobs: list[list[list[float]]] = [[[] for _ in range(n)] for _ in prompts]
        for rows in self._batches(prompts, n):
            self._decode(prompts, rows, key, settings, max_tokens, tokens, logprobs)
        texts = self.chat.decode(
            [self._without_stop(t) for completions in tokens for t in completions]
        )
        return [
            Group(
                prompt,
                [
                    Completion(t, texts[i * n + j], logprobs[i][j], self._finish_reason(t))
                    for j, t in enumerate(tokens[i])
                ],
            )
            for i, prompt in enumerate(prompts)
        ]

    def _batches(self, prompts: list[list[int]], n: int) -> Iterator[dict[int, range]]:
        """Batches of at most batch_size completions: prompt index -> its completions' indices."""
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        if n >= self.batch_size:
            for i in by_length:
                for j in range(0, n, self.batch_size):
                    yield {i: range(j, min(n, j + self.batch_size))}
            return
        prompts_at_once = self.batch_size // n
        for start in range(0, len(prompts), prompts_at_once):
            yield {i: range(n) for i in by_length[start : start + prompts_at_once]}

    def _decode(
        self,
        prompts: list[list[int]],
        rows: dict[int, range],
        key: int,
        settings: Sampling,
        max_tokens: int,
        tokens: list[list[list[int]]],
        logprobs: list[list[list[float]]],
    ) -> None:
        """Decode one batch, appending to `tokens` and `logprobs`."""
        device = self.model.device
        where = [(i, j) for i, completions in rows.items() for j in completions]
        distinct = {prompt: b for b, prompt in enumerate({tuple(prompts[i]): None for i in rows})}
        prompt_of_row = torch.tensor([distinct[tuple(prompts[i])] for i, _ in where], device=device)
        ids_BP, mask_BP = pad_left(map(list, distinct), self.chat.pad_id, device)
        cache = DynamicCache(config=self.model.config)
        logits = self.model(
            input_ids=ids_BP,
            attention_mask=mask_BP,
            position_ids=(mask_BP.cumsum(-1) - 1).clamp_min(0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        cache.batch_select_indices(prompt_of_row)
        logits, mask = logits[prompt_of_row], mask_BP[prompt_of_row]
        positions = mask.sum(-1)  # where each row's next token stands
        index = torch.tensor(where)  # on the CPU, as the uniforms are: MPS has no float64
        eos = torch.tensor(self.chat.eos_ids, device=device)
        drawn: list[tuple[Tensor, Tensor, Tensor]] = []
        alive = torch.arange(len(where))
        for position in range(max_tokens):
            uniform = uniforms(key, index[alive, 0], index[alive, 1], position)
            token, logprob = draw_tokens(
                logits, uniform, settings.temperature, settings.top_p, settings.top_k
            )
            drawn.append((alive, token, logprob))
            going = ~torch.isin(token, eos) & (positions + 1 < self.context_length)
            if position + 1 == max_tokens or not going.any():
                break
            if not going.all():
                left = going.nonzero().squeeze(-1)
                cache.batch_select_indices(left)
                token, mask, positions = token[left], mask[left], positions[left]
                alive = alive[left.cpu()]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            logits = self.model(
                input_ids=token[:, None],
                attention_mask=mask,
                position_ids=positions[:, None],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            positions = positions + 1
        for alive, token, logprob in drawn:
            if not torch.isfinite(logprob).all():
                raise NonFiniteError(
                    f"step {self.step}: the policy's log-probs are not finite while sampling; the"
                    " weights are damaged or the learning rate is too high"
                )
            for row, t, p in zip(alive.tolist(), token.tolist(), logprob.tolist(), strict=True):
                i, j = where[row]
                tokens[i][j].append(t)
                logprobs[i][j].append(p)

    def _finish_reason(self, tokens: list[int]) -> FinishReason:
        return "stop" if tokens and tokens[-1] in self.chat.eos_ids else "length"

    def _without_stop(self, tokens: list[int]) -> list[int]:
        return tokens[:-1] if self._finish_reason(tokens) == "stop" else tokens
