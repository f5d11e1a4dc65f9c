"""Policies of every architecture: one LSP step, saved and loaded; adapters, bfloat16, references."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from language_self_play.advantages import challenger_advantages, solver_advantages
from language_self_play.chat import load_chat
from language_self_play.config import Config
from language_self_play.config import Policy as PolicySection
from language_self_play.errors import ConfigError, ModelError
from language_self_play.learner import Learner
from language_self_play.policy import Policy, load_chat_model, load_policy
from language_self_play.pretrained import (
    attention_kernel,
    choose_dtype,
    load_model,
    load_model_config,
)
from language_self_play.sampling.transformers import TransformersSampler
from language_self_play.types import Posed, Query, Solved

CPU = torch.device("cpu")
ALPHA, BETA, LR = 0.5, 0.3, 1e-3
# Weights with smaller gradients than this move by less than a learning rate in AdamW's first step.
CLEAR_GRADIENT = 1e-4
PROMPT = [5, 9, 30, 31, 2]

pytestmark = [
    # The adapter's base is a folder, so PEFT can't ask the hub for its config; nothing depends on it.
    pytest.mark.filterwarnings("ignore:Could not find a config file in"),
]


@pytest.fixture
def save_model(make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path):
    """save_model("qwen2"): a random model of that architecture in a folder, with its tokenizer."""

    def save(architecture: str = "llama", name: str = "model", seed: int = 0) -> Path:
        folder = tmp_path / name
        model = make_model(architecture, seed)
        # More embeddings than tokens, as many published models have.
        model.resize_token_embeddings(len(tokenizer) + 5, mean_resizing=False)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def settings(make_config: Callable[..., Config]):
    def make(folder: Path, lora: bool = False, **overrides: Any) -> Config:
        policy = {"path": str(folder)} | ({"lora": {"rank": 4, "alpha": 8.0}} if lora else {})
        learner = {"lr": LR, "max_grad_norm": 1e9} | overrides.pop("learner", {})
        tables = {"algorithm": "lsp", "policy": policy, "learner": learner} | overrides
        return make_config(
            **tables,
            solver={"beta": BETA, "group_size": 3, "max_tokens": 6},
            challenger={"beta": BETA, "max_tokens": 5},
        )

    return make


class Round:
    """One step's play: 4 queries to a prompt, 3 answers to each of 2, and made-up rewards."""

    def __init__(self, policy: Policy, config: Config):
        sampler = TransformersSampler(policy.model, policy.chat, config.seed, 64)
        self.posed = Posed(
            "challenger",
            sampler.sample([PROMPT], 4, "challenger", config.challenger, 5),
            1.0,
            all_queries=[Query("a"), Query("b"), Query("", False, "empty"), Query("c", False, "x")],
        )
        prompts = [[1, 7, 8, 2], [1, 40, 2]]
        self.solved = Solved("solver", sampler.sample(prompts, 3, "solver", config.solver, 6), 1.0)
        R, R_Q = torch.tensor([[1.0, 0, 0], [0, 1, 1]]), torch.tensor([[3.0, 4, 1], [2, 2, 5]])
        self.solved.advantages = solver_advantages(R, R_Q)
        self.posed.advantages = challenger_advantages(R, R_Q, self.posed.valid)

    def naive_loss(self, model: Any, reference: Any, plain_logprobs: Any) -> Tensor:
        """Equations 4 and 5 with k3, one whole sequence at a time."""
        total = torch.zeros(())
        for groups, weight in ((self.solved, 1.0), (self.posed, ALPHA)):
            advantages = groups.advantages.flatten().tolist()
            rows = [(g.prompt, c.tokens) for g in groups.groups for c in g.completions]
            for (prompt, tokens), advantage in zip(rows, advantages, strict=True):
                logprobs = plain_logprobs(model, prompt, tokens, 1.0)
                with torch.no_grad():
                    r = plain_logprobs(reference, prompt, tokens, 1.0)
                r = r - logprobs
                terms = advantage * logprobs - BETA * (r.exp() - r - 1)
                total = total - weight * terms.sum() / len(rows)
        return total


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([PROMPT])).logits


def gradient_of(loss: Tensor, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g
        for (name, p), g in zip(parameters.items(), found, strict=True)
    }


def gradients_of(learner: Learner) -> dict[str, Tensor]:
    """A table that the learner's next step fills with the gradient that it takes."""
    found: dict[str, Tensor] = {}

    def keep(*_: Any) -> None:
        for name, weight in learner.optimizer.weights.items():
            found[name] = torch.zeros_like(weight) if weight.grad is None else weight.grad.clone()

    learner.optimizer.adamw.register_step_pre_hook(keep)
    return found


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].detach().flatten() for name in sorted(tensors)])


# ---------------------------------------------------------------- every architecture


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_step_of_lsp_changes_the_weights_as_the_equations_say(
    architecture, lora, save_model, settings, plain_logprobs
):
    config = settings(save_model(architecture), lora)
    policy = load_policy(config, CPU)
    with torch.no_grad():  # away from the reference
        for name, weight in policy.model.named_parameters():
            if weight.requires_grad:
                noise = torch.Generator().manual_seed(len(name))
                weight += 0.05 * torch.randn(weight.shape, generator=noise)
    played = Round(policy, config)
    reference = load_model(config.policy.path, torch.float32, CPU)
    learner = Learner(policy, config)
    weights = learner.optimizer.weights
    expected = gradient_of(played.naive_loss(policy.model, reference, plain_logprobs), weights)
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    found = gradients_of(learner)
    learner.step(played.solved, played.posed, ALPHA)

    assert (flat(found) - flat(expected)).norm() <= 1e-5 * flat(expected).norm()
    # AdamW's first step: each weight moves a learning rate against the sign of its gradient.
    clear = flat(expected).abs() > CLEAR_GRADIENT
    assert clear.sum() > 100
    moved = (flat(weights) - flat(before))[clear]
    assert_close(moved, -LR * flat(expected)[clear].sign(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_saved_model_loads_in_transformers_and_gives_the_same_logits(
    architecture, lora, save_model, settings, tmp_path
):
    from transformers import AutoModelForCausalLM

    config = settings(save_model(architecture), lora)
    policy = load_policy(config, CPU)
    before = logits(policy.model)
    played = Round(policy, config)
    Learner(policy, config).step(played.solved, played.posed, ALPHA)
    trained = logits(policy.model)
    assert (trained - before).abs().max() > 1e-3
    policy.save(tmp_path / "saved")
    # Gemma 2's capped scores have to be asked for; transformers' usual kernel leaves the cap out.
    saved = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved",
        dtype=torch.float32,
        attn_implementation=attention_kernel(policy.model.config),
    ).eval()
    assert_close(logits(saved), trained, rtol=0, atol=1e-4 if lora else 0)
    assert not list((tmp_path / "saved").glob("*adapter*"))
    assert load_chat(PolicySection(path=str(tmp_path / "saved"))).encode("hi") == (
        policy.chat.encode("hi")
    )


# ---------------------------------------------------------------- adapters


@pytest.fixture
def adapted(save_model, settings):
    """A policy with a LoRA adapter that has learned a step, and its configuration."""
    config = settings(save_model(), lora=True)
    policy = load_policy(config, CPU)
    played = Round(policy, config)
    Learner(policy, config).step(played.solved, played.posed, ALPHA)
    return policy, config


def test_with_an_adapter_one_copy_of_the_weights_is_policy_and_reference(adapted):
    policy, config = adapted
    initial = load_model(config.policy.path, torch.float32, CPU)
    with policy.as_reference() as reference:
        assert reference is policy.model
        assert torch.equal(logits(reference), logits(initial))
    assert (logits(policy.model) - logits(initial)).abs().max() > 1e-3
    trained = [name for name, p in policy.model.named_parameters() if p.requires_grad]
    assert trained
    assert all(".lora_" in name for name in trained)


def test_a_new_adapter_changes_nothing_and_is_a_function_of_the_seed(save_model, settings):
    folder = save_model()
    one, same, other = (
        load_policy(settings(folder, lora=True, seed=seed), CPU) for seed in (3, 3, 4)
    )
    assert torch.equal(logits(one.model), logits(load_model(str(folder), torch.float32, CPU)))
    weights = [flat({n: w for n, w in p.model.named_parameters()}) for p in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_an_adapter_alone_loads_in_peft_and_as_a_policy(adapted, tmp_path):
    from peft import AutoPeftModelForCausalLM

    policy, _ = adapted
    policy.save_adapter(tmp_path / "adapter")
    peft = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32)
    assert_close(logits(peft.eval()), logits(policy.model), rtol=0, atol=1e-5)
    chat, merged = load_chat_model(PolicySection(path=str(tmp_path / "adapter")), CPU)
    assert_close(logits(merged), logits(policy.model), rtol=0, atol=1e-4)
    assert chat.encode("hi") == policy.chat.encode("hi")
    assert sum(f.stat().st_size for f in (tmp_path / "adapter").glob("*.safetensors")) < 40_000


def test_an_incoming_adapter_is_merged_first_and_then_the_reference(adapted, settings, tmp_path):
    policy, _ = adapted
    policy.save_adapter(tmp_path / "first")
    config = settings(tmp_path / "first", lora=True)
    second = load_policy(config, CPU)
    with second.as_reference() as reference:
        assert_close(logits(reference), logits(policy.model), rtol=0, atol=1e-4)
    played = Round(second, config)
    Learner(second, config).step(played.solved, played.posed, ALPHA)
    with second.as_reference() as reference:
        assert_close(logits(reference), logits(policy.model), rtol=0, atol=1e-4)
    # Its own adapter stands on the first one, and is found through it.
    second.save_adapter(tmp_path / "second")
    whole = load_model(str(tmp_path / "second"), torch.float32, CPU)
    assert_close(logits(whole), logits(second.model), rtol=0, atol=1e-4)
    assert load_model_config(str(tmp_path / "second")).model_type == "llama"


def test_an_adapter_without_tokenizer_takes_its_bases(adapted, tmp_path):
    policy, _ = adapted
    policy.save_adapter(tmp_path / "adapter")
    for file in (tmp_path / "adapter").iterdir():
        if not file.name.startswith("adapter_"):
            file.unlink()
    chat = load_chat(PolicySection(path=str(tmp_path / "adapter")))
    assert chat.encode("hi") == policy.chat.encode("hi")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_model_name_or_path": None}, "names no base_model_name_or_path"),
        ({"base_model_name_or_path": "./gone"}, "./gone: no such folder"),
        (None, "has no adapter_model.safetensors"),
        ("{", "can't be loaded"),
    ],
    ids=["no base", "lost base", "no weights", "broken"],
)
def test_a_damaged_adapter_is_refused_in_one_sentence(adapted, tmp_path, change, message):
    policy, _ = adapted
    folder = tmp_path / "adapter"
    policy.save_adapter(folder)
    file = folder / "adapter_config.json"
    if change is None:
        (folder / "adapter_model.safetensors").unlink()
    elif isinstance(change, str):
        file.write_text(change)
    else:
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ModelError, match=message) as error:
        load_model(str(folder), torch.float32, CPU)
    assert "\n" not in str(error.value)


def test_targets_that_the_model_does_not_have_are_refused(save_model, settings):
    config = settings(save_model(), policy={"lora": {"targets": ["no_such_layer"]}, "path": "x"})
    config = config.model_copy(
        update={"policy": config.policy.model_copy(update={"path": str(save_model())})}
    )
    with pytest.raises(ConfigError, match=r"policy\.lora\.targets = \['no_such_layer'\]"):
        load_policy(config, CPU)


def test_an_adapter_of_one_of_two_tied_embeddings_is_refused(save_model, settings, make_model):
    folder = save_model("gemma2")  # ties them
    lora = {"rank": 2, "targets": ["lm_head"]}
    config = settings(folder, policy={"path": str(folder), "lora": lora})
    with pytest.raises(ConfigError, match=r"policy\.lora\.targets = \['lm_head'\]: adapts"):
        load_policy(config, CPU)


def test_named_targets_get_adapters_and_others_none(save_model, settings):
    folder = save_model()
    lora = {"rank": 2, "targets": ["q_proj"]}
    config = settings(folder, policy={"path": str(folder), "lora": lora})
    trained = [n for n, p in load_policy(config, CPU).model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 2  # A and B in each of two layers
    assert all(".q_proj." in name for name in trained)


# ---------------------------------------------------------------- bfloat16


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_bfloat16_computes_in_bfloat16_and_optimizes_in_float32(lora, save_model, settings):
    config = settings(save_model(), lora, dtype="bfloat16", learner={"lr": 1e-5})
    policy = load_policy(config, CPU)
    assert policy.model.dtype == torch.bfloat16
    assert logits(policy.model).dtype == torch.bfloat16
    learner = Learner(policy, config)
    assert {w.dtype for w in learner.optimizer.weights.values()} == {torch.float32}
    before = flat(learner.optimizer.weights).clone()
    played = Round(policy, config)
    learner.step(played.solved, played.posed, ALPHA)
    # 1e-5 is far below bfloat16's spacing at these weights (0.2 / 256), and still counts.
    moved = (flat(learner.optimizer.weights) - before).abs()
    assert moved.max() == pytest.approx(1e-5, rel=0.05)
    assert (moved > 5e-6).float().mean() > (0.2 if lora else 0.5)
    for name, weight in learner.optimizer.weights.items():
        parameter = learner.optimizer.parameters[name]
        assert torch.equal(parameter, weight.to(parameter.dtype))
        assert parameter is weight or parameter.grad is None


def test_the_gradient_in_bfloat16_is_that_in_float32_but_for_rounding(save_model, settings):
    folder = save_model()
    gradients = []
    full = settings(folder)
    played = Round(load_policy(full, CPU), full)
    for dtype in ("float32", "bfloat16"):
        config = settings(folder, dtype=dtype, learner={"tokens_per_micro_batch": 20})
        learner = Learner(load_policy(config, CPU), config)
        found = gradients_of(learner)
        learner.step(played.solved, played.posed, ALPHA)
        gradients.append(flat(found))
    exact, rounded = gradients
    assert (rounded - exact).norm() < 0.1 * exact.norm()


def test_auto_is_float32_on_the_cpu():
    assert choose_dtype("auto", CPU) == torch.float32
    assert choose_dtype("bfloat16", CPU) == torch.bfloat16


# ---------------------------------------------------------------- what goes wrong


def test_a_model_without_chat_template_is_refused_or_given_one(save_model, settings, tmp_path):
    folder = save_model("gpt2")
    for file in (folder / "tokenizer_config.json", folder / "chat_template.jinja"):
        if file.suffix == ".jinja":
            file.unlink(missing_ok=True)
        else:
            table = json.loads(file.read_text())
            table.pop("chat_template", None)
            file.write_text(json.dumps(table))
    with pytest.raises(ModelError, match=r"no chat template.*policy\.chat_template a Jinja file"):
        load_chat(PolicySection(path=str(folder)))
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }}?{% endfor %}")
    section = PolicySection(path=str(folder), chat_template=str(template))
    chat, model = load_chat_model(section, CPU)
    assert chat.decode([chat.encode("hi")]) == ["hi?"]
    assert logits(model).shape[1] == len(PROMPT)


def test_weights_that_would_have_to_be_unpickled_are_refused(save_model):
    folder = save_model()
    weights = load_model(str(folder), torch.float32, CPU).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        load_model(str(folder), torch.float32, CPU)


def test_code_in_a_models_folder_is_not_run_unless_asked_for(save_model):
    folder = save_model()
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.MyConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    witness = folder / "witness"
    (folder / "mine.py").write_text(
        f"open({str(witness)!r}, 'w').close()\n"
        "from transformers import LlamaConfig\n"
        "class MyConfig(LlamaConfig):\n    model_type = 'mine'\n"
    )
    with pytest.raises(ModelError, match="trust_remote_code"):
        load_model_config(str(folder))
    assert not witness.exists()
    assert load_model_config(str(folder), trust_remote_code=True).model_type == "mine"
    assert witness.exists()


def test_dropout_is_off_while_layers_are_in_training_mode(tokenizer, save_model, make_model):
    import transformers

    folder = save_model("opt")
    config = transformers.OPTConfig.from_pretrained(folder, dropout=0.5, attention_dropout=0.5)
    torch.manual_seed(0)
    transformers.OPTForCausalLM(config).save_pretrained(folder)
    model = load_model(str(folder), torch.float32, CPU)
    calm = logits(model)
    model.train()
    assert torch.equal(logits(model), calm)
    assert model.config.dropout == 0.5  # and what is saved has it still


def test_a_policy_without_reference_has_none(save_model, make_config):
    config = make_config(
        algorithm="lsp-zero",
        policy={"path": str(save_model())},
        solver={"beta": 0.0},
        challenger={"beta": 0.0},
    )
    policy = load_policy(config, CPU)
    assert (policy.has_reference, policy.reference_hash) == (False, None)


def test_the_hash_of_the_reference_is_that_of_its_weights_with_or_without_adapter(
    save_model, settings
):
    folder, other = save_model(), save_model(name="other", seed=1)
    hashes = [
        load_policy(settings(path, lora), CPU).reference_hash
        for path in (folder, other)
        for lora in (False, True)
    ]
    assert hashes[0] == hashes[1] != hashes[2] == hashes[3]
