"""What generates for an evaluation: transformers in this process, or a vLLM engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from language_self_play.config import Policy, Rollout
from language_self_play.fixed_model import FixedModel
from language_self_play.policy import load_chat_model
from language_self_play.pretrained import choose_dtype, context_length, load_model_config
from language_self_play.sampling import Sampler
from language_self_play.sampling.transformers import TransformersSampler
from language_self_play.sampling.vllm import VllmSampler
from language_self_play.sampling.vllm_server import check_server


class EngineSettings(NamedTuple):
    """What an engine takes of a run's configuration."""

    policy: Policy
    rollout: Rollout
    seed: int
    threads: int | None = None


@contextmanager
def generation(
    section: Policy, rollout: Rollout, device: torch.device, dtype: str, seed: int
) -> Iterator[tuple[Sampler, PreTrainedModel]]:
    """A sampler of the model, and what its `sync` takes; ended afterwards.

    With a `dtype` of "auto" a server computes in its own: no log-probs have to agree. With vLLM the weights
    are not loaded here. Raises ModelError, or ConfigError for a server that can't serve this model.
    """
    sampler: Sampler
    resolved = choose_dtype(dtype, device)
    if rollout.engine == "vllm":
        # An adapter is merged, so that the engine has none of its own.
        settings = EngineSettings(section.model_copy(update={"lora": None}), rollout, seed)
        if rollout.vllm.server is not None:
            found = load_model_config(section.path, section.trust_remote_code)
            wanted = None if dtype == "auto" else dtype
            check_server(settings, wanted, found.to_dict(), context_length(found))
        fixed = FixedModel(section, device, resolved)
        model = fixed.model
        sampler = VllmSampler(fixed, settings)
    else:
        chat, model = load_chat_model(section, device, resolved)
        sampler = TransformersSampler(model, chat, seed, rollout.batch_size)
    try:
        yield sampler, model
    finally:
        sampler.close()
