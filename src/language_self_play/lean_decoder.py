"""One decoding step of Llama-like models, written out: what transformers' modules compute, in fewer calls.

On small models a decoding step takes as long as its thousands of Python calls and small operations; on
large ones, as reading the weights. The architectures below differ only in a norm and in biases, so their
step is one function, over weights that are laid out for it once (linear.py); forward.py tries it out on
the model at hand. All other architectures go through transformers' modules.

Axes: R rows, D head size.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, rms_norm, silu
from transformers import PreTrainedModel

from language_self_play.linear import Product, lay_out
from language_self_play.shared_prompt import SharedPrompt

ARCHITECTURES = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
# Below this width a CPU is done sooner in float32 than in bfloat16, whose products have a higher price
# for being called (benchmarks/linear.py).
NARROWEST_BFLOAT16 = 256


def lean_decoder(model: PreTrainedModel) -> LeanDecoder | None:
    """The model's step written out; None if it isn't one of ARCHITECTURES with its layers as they were.

    Adapted layers are other modules, and what hooks do would be left out.
    """
    as_they_were = (
        type(model).__name__ in ARCHITECTURES
        and getattr(model.config, "hidden_act", None) == "silu"
        and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        and all(type(m) is nn.Linear for m in model.modules() if isinstance(m, nn.Linear))
        and not any("lora" in name for name, _ in model.named_modules())
    )
    return LeanDecoder(model) if as_they_were else None


class Layer(NamedTuple):
    """A decoder layer's products; on CPUs with the weights of the norms before them in theirs."""

    query_key_value: Product
    out: Product
    gate_up: Product
    down: Product


class LeanDecoder:
    """The step of one model with its weights as they are at the first call: on CPUs it keeps a copy."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        narrow = model.config.hidden_size < NARROWEST_BFLOAT16
        self.on_cpu = model.device.type == "cpu"
        self.dtype = torch.float32 if self.on_cpu and narrow else model.dtype

    @property
    def copied_bytes(self) -> int:
        """Size of the copy of the weights that it keeps."""
        layers = [m for m in self.model.modules() if isinstance(m, nn.Linear)]
        return self.on_cpu * self.dtype.itemsize * sum(layer.weight.numel() for layer in layers)

    @cached_property
    def layers(self) -> list[Layer]:
        decoder: Any = self.model.model
        return [
            Layer(
                self._behind(layer.input_layernorm, a.q_proj, a.k_proj, a.v_proj),
                lay_out([a.o_proj], self.dtype),
                self._behind(
                    layer.post_attention_layernorm, layer.mlp.gate_proj, layer.mlp.up_proj
                ),
                lay_out([layer.mlp.down_proj], self.dtype),
            )
            for layer in decoder.layers
            for a in [layer.self_attn]
        ]

    @cached_property
    def head(self) -> Product:
        model: Any = self.model
        return self._behind(model.model.norm, model.lm_head)

    def _behind(self, norm: Any, *layers: Any) -> Product:
        """Of layers whose input is the output of `norm`."""
        if not self.on_cpu:
            product = lay_out(layers, self.dtype)
            return lambda x: product(_norm(norm, x))
        epsilon = norm.variance_epsilon
        if self.dtype == torch.float32:
            product = lay_out(layers, self.dtype, scale=norm.weight)
            return lambda x: product(_unit(x, epsilon))
        # In bfloat16 the norm's weights would be rounded twice.
        product, weight = lay_out(layers, self.dtype), norm.weight.float()
        return lambda x: product((_unit(x, epsilon) * weight).to(self.dtype))

    def next_logits(self, cache: SharedPrompt, tokens_R: Tensor, positions_R: Tensor) -> Tensor:
        """Logits (R, V) after one more token of every row, which `cache` takes up."""
        decoder: Any = self.model.model
        hidden = embedding(tokens_R, decoder.embed_tokens.weight)
        if self.on_cpu:
            # Sums of all layers' outputs in float32; they lie as the outputs do.
            hidden = hidden.float()
            if self.dtype == torch.bfloat16:
                hidden = hidden.T.contiguous().T
        wide = hidden.dtype
        rotation = _rotation(*decoder.rotary_emb(hidden[:, None], positions_R[:, None]))
        for index, (layer, products) in enumerate(zip(decoder.layers, self.layers, strict=True)):
            attention = layer.self_attn
            query, key, value = (
                y.unflatten(-1, (-1, 1, attention.head_dim))
                for y in products.query_key_value(hidden)
            )
            query, key = _contiguous(query, wide), _contiguous(key, wide)
            if hasattr(attention, "q_norm"):
                query, key = _norm(attention.q_norm, query), _norm(attention.k_norm, key)
            query, key = _rotate(query, *rotation), _rotate(key, *rotation)
            keys, values = cache.of_layer[index].update(key, value)
            out = cache.attend(index, query.to(self.dtype), keys, values, attention.scaling, None)
            hidden = hidden + products.out(out.flatten(1))[0]
            gate, up = products.gate_up(hidden)
            hidden = hidden + products.down(silu(gate) * up)[0]
        return self.head(hidden)[0]


def _contiguous(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype, memory_format=torch.contiguous_format)


def _norm(module: Any, x: Tensor) -> Tensor:
    return rms_norm(x, x.shape[-1:], module.weight.to(x.dtype), module.variance_epsilon)


def _unit(x: Tensor, epsilon: float) -> Tensor:
    """x / √(mean x² + ε), of float32: rms_norm without weights, in fewer calls."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    mean_square = torch.addcmul(x.new_tensor(epsilon), norm, norm, value=1 / x.shape[-1])
    return x * mean_square.rsqrt_()


def _rotation(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """What `_rotate` takes, of rotary_emb's (R, 1, D)."""
    first, second = sin[:, None].chunk(2, -1)
    return cos[:, None], torch.cat([-first, second], -1)


def _rotate(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Rotary embedding (Su et al. 2021) of (R, heads, 1, D) by (R, 1, 1, D), halves apart."""
    first, second = x.chunk(2, -1)
    return torch.addcmul(x * cos, torch.cat([second, first], -1), signed_sin)
