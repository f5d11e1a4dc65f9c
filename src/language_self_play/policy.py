"""The policy π_θ that plays both roles, and the reference π_Ref: loaded, adapted and saved.

Without LoRA the reference is a second, frozen copy of the model. With LoRA it is the policy with its
adapter off: one copy of the weights serves Challenger, Solver, reference and judge.
"""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from language_self_play.chat import Chat, load_chat
from language_self_play.config import Config, Lora
from language_self_play.config import Policy as PolicySection
from language_self_play.distributed import ALONE, Ranks
from language_self_play.errors import ConfigError, ModelError
from language_self_play.extras import require
from language_self_play.pretrained import (
    adapter_base,
    choose_dtype,
    hollow_model,
    load_model,
    read,
    vocabulary_size,
)
from language_self_play.sharding import ShardedModel, hollow

ADAPTER_WEIGHTS = "adapter_model.safetensors"
# PEFT puts an adapted layer's own weights one level down.
BASE_LAYER = ".base_layer"

T = TypeVar("T")


class Policy:
    """π_θ and its reference. `adapter` is the PEFT model around π_θ, None in full fine-tuning."""

    folder: Path | None = None  # its weights change, so they lie in none

    def __init__(
        self,
        model: PreTrainedModel,
        chat: Chat,
        reference: PreTrainedModel | None = None,
        adapter: Any = None,
    ):
        self.model = model
        self.chat = chat
        self.adapter = adapter
        self._reference = reference
        self.sharded: ShardedModel | None = None
        self._sharded_reference: ShardedModel | None = None

    def shard(
        self,
        ranks: Ranks,
        device: torch.device,
        dtype: torch.dtype,
        cpu_offload: bool,
        with_reference: bool,
    ) -> None:
        """From here on π_θ, and `with_reference` π_Ref, lie in pieces on all ranks; they compute in `dtype`.

        Other ranks than the first may have models without weights: they get theirs from there.
        """
        hashed = None  # the first rank compares
        if ranks.is_first and (with_reference or self.adapter is not None):
            hashed = _hash(self._base_weights(), dtype)  # while it is whole
        vars(self)["reference_hash"] = hashed
        trained: list[str] = []
        if self.adapter is not None:
            trained = [name for name, p in self.model.named_parameters() if p.requires_grad]
        place = (ranks, device, dtype, cpu_offload)
        self.sharded = ShardedModel(self.model, *place, everywhere=trained)
        if with_reference:
            self._reference = hollow(self.sharded.whole, device, dtype)
            self._sharded_reference = ShardedModel(self._reference, *place, like=self.sharded)

    @property
    def trains_shards(self) -> bool:
        """Whether what is trained lies in pieces; an adapter lies on every rank."""
        return self.sharded is not None and self.adapter is None

    def compute(self, function: Callable[..., T], *args: Any) -> T:
        """`function(π_θ, *args)`; with a gradient, of all ranks together where it is sharded."""
        if self.sharded is not None:
            return self.sharded(function, *args)
        return function(self.model, *args)

    @property
    def abandoned(self) -> bool:
        """Whether all ranks gave up the newest pass of either model, as one had no memory for it."""
        models = (self.sharded, self._sharded_reference)
        return any(model is not None and model.abandoned for model in models)

    def compute_reference(self, function: Callable[..., T], *args: Any) -> T:
        """`function(π_Ref, *args)`, without a gradient."""
        with torch.no_grad():
            if self._sharded_reference is not None:
                return self._sharded_reference(function, *args)
            if self.sharded is not None:
                with _adapter_off(self.model):
                    return self.sharded(function, *args)
            with self.as_reference() as reference:
                return function(reference, *args)

    @property
    def whole(self) -> PreTrainedModel:
        """π_θ as it can be sampled from; where it is sharded, between `gather` and `release`."""
        return self.model if self.sharded is None else self.sharded.whole

    def gather(self) -> None:
        """Give `whole` its weights. All ranks do it together. Raises MemoryLimitError."""
        if self.sharded is not None:
            self.sharded.gather()

    def release(self) -> None:
        """Let go of the weights of `whole`, where they are a copy."""
        if self.sharded is not None:
            self.sharded.release()

    @contextmanager
    def as_whole_reference(self) -> Iterator[PreTrainedModel]:
        """π_Ref as it can be sampled from. Where it is a model of its own in pieces, `whole` is released."""
        if self._sharded_reference is None:
            with self.as_reference() as reference:
                yield reference
            return
        self.release()
        self._sharded_reference.gather()
        try:
            yield self._sharded_reference.whole
        finally:
            self._sharded_reference.release()

    @property
    def device(self) -> torch.device:
        return self.model.device if self.sharded is None else self.sharded.device

    @property
    def has_reference(self) -> bool:
        return self.adapter is not None or self._reference is not None

    @contextmanager
    def as_reference(self) -> Iterator[PreTrainedModel]:
        """π_Ref, a model whose outputs are this stage's initial model's; for use without gradient."""
        if self.adapter is not None:
            with _adapter_off(self.whole):
                yield self.whole
            return
        assert self._reference is not None, "no reference was asked for"
        yield self._reference

    @cached_property
    def reference_hash(self) -> str | None:
        """SHA-256 over the reference's weights, which never change; None without a reference."""
        if not self.has_reference:
            return None
        return _hash(
            self._base_weights() if self._reference is None else self._reference.state_dict()
        )

    def save(self, folder: Path) -> None:
        """Write the whole model, an adapter merged, where AutoModelForCausalLM finds it."""
        self.save_weights(folder)
        self.chat.tokenizer.save_pretrained(folder)

    def save_weights(self, folder: Path, with_adapter: bool = True) -> None:
        """Write the model without its tokenizer, an adapter merged or left out; whichever rank asks."""
        weights = self._merged_weights() if with_adapter else self._base_weights()
        # transformers would write nothing on other ranks than the first, whatever they are told.
        vars(self.whole)["should_save_on_this_rank"] = lambda is_main_process: True
        try:
            self.whole.save_pretrained(folder, state_dict=weights)
        finally:
            del vars(self.whole)["should_save_on_this_rank"]

    def save_without_weights(self, folder: Path) -> None:
        """Write what a model's folder holds beside its weights."""
        self.model.config.save_pretrained(folder)
        if self.model.can_generate() and self.model.generation_config is not None:
            self.model.generation_config.save_pretrained(folder)
        self.chat.tokenizer.save_pretrained(folder)

    def saved_buffers(self) -> dict[str, Tensor]:
        """The buffers that a model's folder holds with its weights; most are computed from its config."""
        saved = self.model.state_dict().keys()
        return {name: b for name, b in self.model.named_buffers() if name in saved}

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter alone, where PEFT finds it. Its base is the stage's initial model."""
        import peft

        folder.mkdir(parents=True, exist_ok=True)
        weights = peft.get_peft_model_state_dict(self.adapter, save_embedding_layers=False)
        save_file({k: v.contiguous() for k, v in weights.items()}, folder / ADAPTER_WEIGHTS)
        self.adapter.peft_config["default"].save_pretrained(folder)
        self.chat.tokenizer.save_pretrained(folder)

    def save_trained(self, folder: Path) -> None:
        """Write what training changes, for `load_trained`: the adapter, or the whole model."""
        save = self.save if self.adapter is None else self.save_adapter
        save(folder)

    def load_trained(self, folder: Path) -> None:
        """Overwrite π_θ with what `save_trained` wrote. Raises ModelError."""
        if self.adapter is not None:
            import peft

            weights = read(str(folder), lambda: load_file(folder / ADAPTER_WEIGHTS))
            peft.set_peft_model_state_dict(self.adapter, weights)
            return
        saved = read(
            str(folder),
            # The class itself, which may be the authors' own code, has been loaded before.
            lambda: type(self.model).from_pretrained(
                folder, dtype=self.model.dtype, use_safetensors=True
            ),
        )
        self.model.load_state_dict(saved.state_dict())

    def _base_weights(self) -> dict[str, Tensor]:
        """The weights without the adapter's, under the names that they have without one."""
        return {
            name.replace(BASE_LAYER, ""): weight
            for name, weight in self.whole.state_dict().items()
            if ".lora_" not in name
        }

    def _merged_weights(self) -> dict[str, Tensor]:
        """θ as one model: W + (α/r) B A for every adapted layer (Hu et al. 2021, Eq. 3)."""
        if self.adapter is None:
            return self.whole.state_dict()
        from peft.tuners.lora import LoraLayer

        weights = self._base_weights()
        for name, layer in self.whole.named_modules():
            if isinstance(layer, LoraLayer):
                # Of experts the adapted weight is a parameter, of linear layers `weight`.
                parameter = getattr(layer, "parameter_name", "weight")
                key = f"{name}.".replace(BASE_LAYER, "") + parameter
                weight = weights[key]
                change: Tensor = layer.get_delta_weight("default")  # type: ignore[attr-defined]
                merged = weight.float() + change.to(weight.device).float()
                weights[key] = merged.to("cpu", weight.dtype)
        return weights


def load_policy(config: Config, device: torch.device, ranks: Ranks = ALONE) -> Policy:
    """The model of config.policy, with an adapter or with a frozen copy where one is needed.

    Raises ModelError or ConfigError.
    """
    if ranks.size > 1 and config.distributed.parallel == "fsdp":
        return _load_sharded(config, device, ranks)
    chat, model = load_chat_model(config.policy, device, choose_dtype(config.dtype, device))
    if config.policy.lora is not None:
        adapter = add_adapter(model, config.policy.path, config.policy.lora, config.seed)
        return Policy(model, chat, adapter=adapter)
    reference = copy.deepcopy(model).requires_grad_(False) if config.needs_reference else None
    return Policy(model, chat, reference)


def _load_sharded(config: Config, device: torch.device, ranks: Ranks) -> Policy:
    """The first rank reads the model into its host's memory, and the others get their rows from it.

    The pieces that are trained are float32 whatever the type of computing: AdamW needs them so.
    """
    section, dtype = config.policy, choose_dtype(config.dtype, device)
    of_weights = torch.float32 if section.lora is None else dtype
    loaded: list[tuple[Chat, PreTrainedModel]] = []

    def load() -> None:
        loaded.append(load_chat_model(section, torch.device("cpu"), of_weights))

    ranks.once(load)
    if not loaded:
        model = hollow_model(section.path, of_weights, section.trust_remote_code)
        loaded.append((load_chat(section), model))
    [(chat, model)] = loaded
    adapter = None
    if section.lora is not None:
        adapter = add_adapter(model, section.path, section.lora, config.seed)
    policy = Policy(model, chat, adapter=adapter)
    has_reference = config.needs_reference and adapter is None
    policy.shard(ranks, device, dtype, config.distributed.cpu_offload, has_reference)
    return policy


@contextmanager
def _adapter_off(model: PreTrainedModel) -> Iterator[None]:
    """While active, the adapter in `model` adds nothing."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in adapted:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in adapted:
            layer.enable_adapters(True)


def _hash(weights: dict[str, Tensor], dtype: torch.dtype | None = None) -> str:
    """SHA-256 over names and numbers, those that are no integers in `dtype`, by default their own."""
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        digest.update(name.encode())
        converted = weight.detach().cpu()
        if dtype is not None and converted.is_floating_point():
            converted = converted.to(dtype)
        digest.update(converted.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_chat_model(
    section: PolicySection, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Chat, PreTrainedModel]:
    """The tokenizer with its chat template, checked first, then the weights. Raises ModelError."""
    chat = load_chat(section)
    model = load_model(section.path, dtype, device, section.trust_remote_code)
    check_vocabulary(section.path, chat, model)
    return chat, model


def check_vocabulary(path: str, chat: Chat, model: PreTrainedModel) -> None:
    """Raises ModelError if the tokenizer has tokens that the model has no embedding of."""
    vocabulary = vocabulary_size(model)
    if len(chat.tokenizer) > vocabulary:
        raise ModelError(
            f"policy.path = {path!r}: the tokenizer has {len(chat.tokenizer)} tokens but the"
            f" model's vocabulary only {vocabulary}; they don't belong together"
        )


def add_adapter(model: PreTrainedModel, path: str, settings: Lora, seed: int) -> Any:
    """A new LoRA adapter in `model` (Hu et al. 2021), in float32; only it has gradients from now on.

    B begins as 0, so the policy begins as its reference; A is drawn from `seed`.
    """
    peft = require("peft", "lora", "policy.lora")
    lora = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=settings.targets,
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in model.modules()),  # GPT-2's layout
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings")  # refused below
        # peft 0.21's own, of experts, whose weights are parameters and no modules.
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys")
        torch.manual_seed(seed)
        try:
            adapter = peft.get_peft_model(model, lora)
        except ValueError as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"policy.lora.targets = {settings.targets!r}: do not fit the model: {reason}"
            ) from None
    adapted = (model.get_input_embeddings(), model.get_output_embeddings())
    if model.config.tie_word_embeddings and any(hasattr(m, "lora_A") for m in adapted):
        raise ConfigError(
            f"policy.lora.targets = {settings.targets!r}: adapts an embedding that is both the first and"
            " the last layer's, and the merged model could not be saved; leave it out"
        )
    # Where the adapter's user finds its base: a folder wherever they start from, a hub id as it is.
    local = Path(path).is_dir() or adapter_base(path) is not None
    lora.base_model_name_or_path = str(Path(path).resolve()) if local else path
    adapter.peft_config["default"].base_model_name_or_path = lora.base_model_name_or_path
    return adapter
