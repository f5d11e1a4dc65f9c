"""transformers' `generate`, one call a role, at its best: no stop token to look for, no scores kept."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from speed.models import PAD_ID, Work, prompts


class Generate:
    """The same prompts, numbers and lengths as ours. It returns no log-probs, ours does."""

    def __init__(self, work: Work, folder: Path, cache: str = "growing"):
        self.work = work
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=work.torch_dtype).eval()
        self.model.generation_config = GenerationConfig(
            pad_token_id=PAD_ID,
            cache_implementation="static" if cache == "static" else None,
            disable_compile=True,
        )
        self.calls = 0

    @torch.inference_mode()
    def sample(self) -> list[torch.Tensor]:
        """Completions of the Challenger and of the Solver, (K, length) and (N · G, length)."""
        self.calls += 1
        work = self.work
        prompt, their_prompts = prompts(work, self.calls)
        return [
            self._sample([prompt], work.num_queries),
            self._sample(their_prompts, work.group_size),
        ]

    def _sample(self, rows: list[list[int]], n: int) -> torch.Tensor:
        tokens = torch.tensor(rows)
        out = self.model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=n,
            max_new_tokens=self.work.length,
        )
        completions = out[:, tokens.shape[1] :]
        assert completions.shape == (n * len(rows), self.work.length)
        return completions
