"""The forward pass of a micro-batch: log-probs of completions, each prompt computed once."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from language_self_play.logprobs import shared_logprobs, token_logprobs
from language_self_play.packing import MicroBatch


def completion_logprobs(model: PreTrainedModel, batch: MicroBatch, temperature: float) -> Tensor:
    """log softmax(logits / τ) of every completion token, shape (B, K, T); garbage where masked.

    The prompts go through the model once; their keys and values are repeated for the K
    completions, with gradient through the repetition, and only completions have logits.
    """
    B, K, T = batch.completions_BKT.shape
    lengths_B = batch.prompt_mask_BP.sum(-1)
    cache = DynamicCache(config=model.config)
    first_BV = model(
        input_ids=batch.prompts_BP,
        attention_mask=batch.prompt_mask_BP,
        position_ids=(batch.prompt_mask_BP.cumsum(-1) - 1).clamp_min(0),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]
    # The token after the prompt is drawn from one distribution in all K completions.
    first_BK = shared_logprobs(first_BV, batch.completions_BKT[..., 0], temperature)
    if T == 1:
        return first_BK[..., None]
    cache.batch_repeat_interleave(K)
    tokens = batch.completions_BKT.flatten(0, 1)
    token_mask = batch.mask_BKT.flatten(0, 1).long()
    prompt_mask = batch.prompt_mask_BP.repeat_interleave(K, 0)
    steps = torch.arange(T - 1, device=tokens.device)
    positions = lengths_B.repeat_interleave(K)[:, None] + steps
    logits = model(
        input_ids=tokens[:, :-1],
        attention_mask=torch.cat([prompt_mask, token_mask[:, :-1]], 1),
        # Padding stands at position 0: beyond a row's own tokens the context may end.
        position_ids=positions * token_mask[:, :-1],
        past_key_values=cache,
        use_cache=True,
    ).logits
    rest = token_logprobs(logits, tokens[:, 1:], temperature).view(B, K, T - 1)
    return torch.cat([first_BK[..., None], rest], -1)
