"""One decoding step of Llama-like models, written out: what transformers' modules compute, in fewer calls.

On small models a decoding step takes as long as its thousands of Python calls and small operations. The
architectures below differ only in a norm and in biases, so their step is one function over the modules'
own weights; forward.py tries it out on the model at hand. All other architectures go through
transformers' modules.

Axes: R rows, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, rms_norm, silu
from transformers import PreTrainedModel

from language_self_play.linear import linear
from language_self_play.shared_prompt import SharedPrompt

ARCHITECTURES = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}


def has_lean_step(model: PreTrainedModel) -> bool:
    """Whether `next_logits` is this model's step: one of ARCHITECTURES, with its layers as they were.

    Adapted layers are other modules, and what hooks do would be left out.
    """
    return (
        type(model).__name__ in ARCHITECTURES
        and getattr(model.config, "hidden_act", None) == "silu"
        and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        and all(type(m) is nn.Linear for m in model.modules() if isinstance(m, nn.Linear))
        and not any("lora" in name for name, _ in model.named_modules())
    )


def next_logits(
    model: PreTrainedModel, cache: SharedPrompt, tokens_R: Tensor, positions_R: Tensor
) -> Tensor:
    """Logits (R, V) after one more token of every row, which `cache` takes up."""
    decoder: Any = model.model
    hidden = embedding(tokens_R, decoder.embed_tokens.weight)
    cos, sin = decoder.rotary_emb(hidden[:, None], positions_R[:, None])
    for index, layer in enumerate(decoder.layers):
        attention = layer.self_attn
        x = _norm(layer.input_layernorm, hidden)
        heads = (len(x), -1, 1, attention.head_dim)
        query = linear(x, attention.q_proj).reshape(heads)
        key = linear(x, attention.k_proj).reshape(heads)
        value = linear(x, attention.v_proj).reshape(heads)
        if hasattr(attention, "q_norm"):
            query, key = _norm(attention.q_norm, query), _norm(attention.k_norm, key)
        query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
        keys, values = cache.of_layer[index].update(key, value)
        out = cache.attend(index, query, keys, values, attention.scaling, None)
        hidden = hidden + linear(out.reshape(len(x), -1), attention.o_proj)
        x = _norm(layer.post_attention_layernorm, hidden)
        gate, up = linear(x, layer.mlp.gate_proj), linear(x, layer.mlp.up_proj)
        hidden = hidden + linear(silu(gate) * up, layer.mlp.down_proj)
    return linear(_norm(decoder.norm, hidden), model.lm_head)


def _norm(module: Any, x: Tensor) -> Tensor:
    return rms_norm(x, x.shape[-1:], module.weight, module.variance_epsilon)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (Su et al. 2021) of (R, heads, 1, D) by (R, 1, D), halves apart."""
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]
