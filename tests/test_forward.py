"""Shared prompts, padding and micro-batches change neither log-probs nor gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from language_self_play import forward
from language_self_play.forward import (
    PLAIN,
    ForwardPath,
    checkpointed_layers,
    choose_path,
    completion_logprobs,
    goes_on_from_shared_prompts,
    saves_tokens,
)
from language_self_play.packing import MicroBatch, micro_batches
from language_self_play.pretrained import attention_kernel, load_model
from language_self_play.types import Completion, Group, Groups

CPU = torch.device("cpu")
TEMPERATURE = 0.7
LOGPROB_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-5
PROMPT_LENGTHS = (2, 9, 6)
# With windows of 5 tokens: completions that end inside, at and beyond a window.
COMPLETION_LENGTHS = ((1, 4, 11), (3, 3, 3), (7, 2, 1))


LEAN = ForwardPath()
PATHS = [ForwardPath(p, h) for p in (True, False) for h in (True, False)]


@pytest.fixture
def groups(tokenizer: Any) -> Groups:
    """Random tokens, pad tokens among them; every completion weighs differently in the loss."""
    generator = torch.Generator().manual_seed(0)

    def random_tokens(length: int) -> list[int]:
        return torch.randint(len(tokenizer), (length,), generator=generator).tolist()

    played = [
        Group(
            random_tokens(prompt),
            [Completion(random_tokens(n), "", [0.0] * n, "stop") for n in lengths],
        )
        for prompt, lengths in zip(PROMPT_LENGTHS, COMPLETION_LENGTHS, strict=True)
    ]
    advantages = torch.randn(3, 3, generator=generator)
    return Groups("solver", played, TEMPERATURE, advantages)


def unpacked(batch: MicroBatch, logprobs_BKT: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(index, log-probs of its tokens) of each completion in the batch."""
    for b, k in torch.cartesian_prod(*map(torch.arange, batch.index_BK.shape)).tolist():
        yield batch.index_BK[b, k].item(), logprobs_BKT[b, k][batch.mask_BKT[b, k]]


def packed_logprobs(
    model: Any, groups: Groups, budget: int, pad_id: int = 0, path: ForwardPath = LEAN
) -> list[Tensor]:
    found = {}
    for batch in micro_batches(groups, budget, pad_id, CPU, path.shared_prompt):
        found.update(unpacked(batch, completion_logprobs(model, batch, groups.temperature, path)))
    return [found[i] for i in range(len(found))]


def gradient(model: Any, groups: Groups, logprobs: list[Tensor]) -> Tensor:
    """Gradient of Σ_k w_k Σ_t (log p_kt)², all weights in one vector."""
    weights = groups.advantages.flatten()
    loss = sum(w * p.square().sum() for w, p in zip(weights, logprobs, strict=True))
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat(
        [
            (torch.zeros_like(p) if g is None else g).flatten()
            for p, g in zip(parameters, found, strict=True)
        ]
    )


def assert_same(model: Any, groups: Groups, found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, rtol=0, atol=LOGPROB_TOLERANCE)
    assert torch.cat(expected).std() > 0.3  # otherwise any model would do
    wanted = gradient(model, groups, expected)
    difference = gradient(model, groups, found) - wanted
    assert difference.norm() <= GRADIENT_TOLERANCE * wanted.norm()


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_every_path_gives_what_one_sequence_at_a_time_gives(
    any_model: Any, groups: Groups, plain_logprobs: Callable[..., Tensor], path: ForwardPath
):
    expected = [
        plain_logprobs(any_model, group.prompt, completion.tokens, TEMPERATURE)
        for group in groups.groups
        for completion in group.completions
    ]
    found = packed_logprobs(any_model, groups, 10_000, path=path)
    assert_same(any_model, groups, found, expected)


def test_every_architecture_takes_the_leanest_path_without_a_warning(any_model: Any):
    assert choose_path(any_model) == ForwardPath(shared_prompt=True, separate_head=True)


def test_a_model_whose_logits_need_more_than_hidden_states_keeps_its_own(tiny_llama: Any):
    # Its logits depend on the tokens, too: a head alone can't know them.
    plain = type(tiny_llama).forward

    def forward(self, input_ids=None, **inputs):
        output = plain(self, input_ids=input_ids, **inputs)
        keep = output.logits.shape[1]
        output.logits = output.logits * (1 + 0.1 * input_ids[:, -keep:, None])
        return output

    tiny_llama.forward = forward.__get__(tiny_llama)
    with pytest.warns(UserWarning, match="gives no logits for hidden states alone"):
        path = choose_path(tiny_llama)
    assert path == ForwardPath(shared_prompt=True, separate_head=False)


def test_a_model_of_another_kind_of_attention_gets_whole_sequences():
    import transformers

    # Bloom biases scores by distance in the sequence, of which a packed group knows nothing.
    torch.manual_seed(0)
    config = transformers.BloomConfig(
        vocab_size=107, hidden_size=16, n_layer=2, n_head=2, initializer_range=0.2
    )
    with pytest.warns(UserWarning, match="knows no shared prompts, so in learning"):
        path = choose_path(transformers.BloomForCausalLM(config).eval())
    assert path == ForwardPath(shared_prompt=False, separate_head=True)


@pytest.mark.parametrize(
    ("P", "K", "T", "saves"),
    [
        (400, 8, 128, True),  # 8 · 528 = 4,224 tokens against 400 + 1,024 = 1,424
        (8, 8, 128, False),  # 8 · 136 = 1,088 against 8 + 1,024 = 1,032, a twentieth less
        (40, 8, 128, True),  # 8 · 168 = 1,344 against 1,064, a quarter more
        (400, 1, 128, False),
    ],
)
def test_a_prompt_stands_apart_where_that_saves_tokens(P: int, K: int, T: int, saves: bool):
    nothing = torch.zeros(1, K)
    batch = MicroBatch(torch.zeros(1, P), torch.ones(1, P), torch.zeros(1, K, T), *[nothing] * 4)
    assert saves_tokens(batch) is saves


@pytest.mark.parametrize("logits_at_once", [1, 5 * 86, 10**9])
def test_logits_in_pieces_are_the_logits(
    any_model: Any, groups: Groups, monkeypatch: pytest.MonkeyPatch, logits_at_once: int
):
    whole = packed_logprobs(any_model, groups, 10_000, path=PLAIN)
    monkeypatch.setattr(forward, "LOGITS_AT_ONCE", logits_at_once)
    assert_same(any_model, groups, packed_logprobs(any_model, groups, 10_000), whole)


def test_no_more_logits_exist_at_once_than_allowed(
    tiny_llama: Any, groups: Groups, monkeypatch: pytest.MonkeyPatch
):
    vocabulary = tiny_llama.config.vocab_size
    monkeypatch.setattr(forward, "LOGITS_AT_ONCE", 4 * vocabulary)
    rows = []
    tiny_llama.lm_head.register_forward_hook(lambda *call: rows.append(call[2].shape[-2]))
    packed_logprobs(tiny_llama, groups, 10_000)
    # 35 completion tokens, none of the 17 prompt tokens and none of the padding.
    assert (max(rows), sum(rows)) == (4, 35)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_checkpointed_layers_change_neither_log_probs_nor_gradients(
    any_model: Any, groups: Groups, path: ForwardPath
):
    expected = packed_logprobs(any_model, groups, 10_000, path=PLAIN)
    with checkpointed_layers(any_model, True):
        found = packed_logprobs(any_model, groups, 10_000, path=path)
    assert not any(module.training for module in any_model.modules())
    assert_same(any_model, groups, found, expected)


@pytest.mark.parametrize("path", [LEAN, ForwardPath(shared_prompt=False)], ids=str)
def test_checkpointed_layers_are_computed_again_for_the_gradient(
    tiny_llama: Any, groups: Groups, path: ForwardPath
):
    calls = []
    norm = tiny_llama.model.layers[0].input_layernorm
    norm.register_forward_hook(lambda *call: calls.append(1))
    for active, expected in ((False, 1), (True, 2)):
        calls.clear()
        with checkpointed_layers(tiny_llama, active):
            found = packed_logprobs(tiny_llama, groups, 10_000, path=path)
        torch.cat(found).sum().backward()
        assert len(calls) == expected


# 1 is a completion at a time; 30 cuts groups; 80 joins some.
@pytest.mark.parametrize("budget", [1, 30, 80])
def test_the_size_of_micro_batches_changes_nothing(any_model: Any, groups: Groups, budget: int):
    whole = packed_logprobs(any_model, groups, 10_000)
    assert_same(any_model, groups, packed_logprobs(any_model, groups, budget), whole)


def test_what_stands_in_the_padding_changes_nothing(any_model: Any, groups: Groups):
    zeros = packed_logprobs(any_model, groups, 10_000, pad_id=0)
    sevens = packed_logprobs(any_model, groups, 10_000, pad_id=7)
    assert_same(any_model, groups, sevens, zeros)


def test_completions_of_one_token_need_no_second_pass(
    tiny_llama: Any, plain_logprobs: Callable[..., Tensor]
):
    prompt = [5, 6, 7]
    group = Group(prompt, [Completion([t], "", [0.0], "stop") for t in (10, 11)])
    groups = Groups("solver", [group], TEMPERATURE, torch.tensor([[1.0, -1.0]]))
    expected = [plain_logprobs(tiny_llama, prompt, [t], TEMPERATURE) for t in (10, 11)]
    assert_same(tiny_llama, groups, packed_logprobs(tiny_llama, groups, 100), expected)


def test_completions_of_a_group_do_not_see_each_other(tiny_llama: Any, groups: Groups):
    before = packed_logprobs(tiny_llama, groups, 10_000)
    first, second, *others = groups.groups[0].completions
    changed = second._replace(tokens=[t + 1 for t in second.tokens])
    groups.groups[0] = groups.groups[0]._replace(completions=[first, changed, *others])
    after = packed_logprobs(tiny_llama, groups, 10_000)
    differences = [(a - b).abs().max().item() for a, b in zip(after, before, strict=True)]
    assert differences[1] > 0.1
    assert max(differences[:1] + differences[2:]) <= LOGPROB_TOLERANCE


def test_the_models_attention_is_its_own_again_after_the_gradient(tiny_llama: Any, groups: Groups):
    before = tiny_llama.config._attn_implementation
    with checkpointed_layers(tiny_llama, True):
        found = packed_logprobs(tiny_llama, groups, 10_000)
        assert tiny_llama.config._attn_implementation == before
        torch.cat(found).sum().backward()
    assert tiny_llama.config._attn_implementation == before


def test_rows_of_every_architecture_go_on_from_shared_prompts_without_a_warning(any_model: Any):
    assert goes_on_from_shared_prompts(any_model)


def test_rows_of_an_architecture_that_goes_on_otherwise_are_found_out():
    import transformers

    # Bloom biases scores by distance, and gets no attention of ours in whatever layer.
    torch.manual_seed(0)
    config = transformers.BloomConfig(
        vocab_size=107, hidden_size=16, n_layer=2, n_head=2, initializer_range=0.2
    )
    with pytest.warns(UserWarning, match="its own copy of its prompt's keys and values"):
        assert not goes_on_from_shared_prompts(transformers.BloomForCausalLM(config).eval())


def test_a_wrong_step_of_decoding_is_found_out(tiny_llama: Any, monkeypatch: pytest.MonkeyPatch):
    # The step written out gives something else on this model, though only a little.
    from language_self_play.lean_decoder import LeanDecoder

    step = LeanDecoder.next_logits
    monkeypatch.setattr(LeanDecoder, "next_logits", lambda *args: 1.01 * step(*args))
    with pytest.warns(UserWarning, match="knows no shared prompts"):
        assert not goes_on_from_shared_prompts(tiny_llama)


@pytest.mark.parametrize("name", ["gemma2", "llama", "gemma3"])
def test_only_capped_scores_change_the_kernel_that_is_asked_for(
    name: str, make_model: Callable[..., Any]
):
    assert attention_kernel(make_model(name).config) == ("eager" if name == "gemma2" else None)


def test_a_gemma_2_from_a_folder_has_its_cap(
    make_model: Callable[..., Any], tmp_path: Path, groups: Groups
):
    model = make_model("gemma2")
    assert model.config.attn_logit_softcapping == 50.0
    model.config.attn_logit_softcapping = 0.5  # in reach of the scores of random weights
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), torch.float32, CPU)
    assert loaded.config._attn_implementation == "eager"
    # Without a cap, as transformers' usual kernel computes it, the log-probs are others.
    plain = packed_logprobs(loaded, groups, 10_000, path=PLAIN)
    lean = packed_logprobs(loaded, groups, 10_000)
    loaded.config._attn_implementation = "sdpa"
    uncapped = packed_logprobs(loaded, groups, 10_000, path=PLAIN)
    assert (torch.cat(plain) - torch.cat(uncapped)).abs().max() > 0.1
    assert_close(torch.cat(lean), torch.cat(plain), rtol=0, atol=LOGPROB_TOLERANCE)


def test_other_models_from_a_folder_keep_the_usual_kernel(
    make_model: Callable[..., Any], tmp_path: Path
):
    make_model("llama").save_pretrained(tmp_path)
    assert load_model(str(tmp_path), torch.float32, CPU).config._attn_implementation == "sdpa"


# ---------------------------------------------------------------- what no short text shows


CHUNK = 12  # more than the tokens with which a model is tried out


def chunked_llama() -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.Llama4TextConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=64,
        intermediate_size_mlp=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        attention_chunk_size=CHUNK,
        max_position_embeddings=64,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    assert "chunked_attention" in config.layer_types
    return transformers.Llama4ForCausalLM(config).eval()


@pytest.mark.filterwarnings("ignore:.* gives no logits for hidden states alone")
def test_chunked_attention_is_no_sliding_window_and_gets_whole_sequences(endless_chat: Any):
    from language_self_play.config import Sampling
    from language_self_play.sampling.transformers import TransformersSampler

    model = chunked_llama()
    with pytest.warns(UserWarning, match="knows no shared prompts, so in learning"):
        path = choose_path(model)
    assert not path.shared_prompt
    with pytest.warns(UserWarning, match="its own copy of its prompt's keys and values"):
        sampler = TransformersSampler(model, endless_chat, seed=0, batch_size=8)
    assert not sampler.shares_prompts
    # Two prompts that end in their second chunk, completions that end in their third.
    prompts = [[3 + i % 50 for i in range(CHUNK + 3)], [9 + i % 40 for i in range(CHUNK + 1)]]
    with torch.no_grad():
        for group in sampler.sample(prompts, 2, "solver", Sampling(), CHUNK + 2):
            for completion in group.completions:
                whole = torch.tensor([[*group.prompt, *completion.tokens]])
                alone = model(input_ids=whole).logits[0].log_softmax(-1)
                expected = [
                    alone[len(group.prompt) - 1 + t, token].item()
                    for t, token in enumerate(completion.tokens)
                ]
                assert completion.logprobs == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("config", "unknown"),
    [
        ({"layer_types": ["full_attention", "sliding_attention"]}, False),
        ({"layer_types": ["full_attention", "chunked_attention"]}, True),
        ({"layer_types": ["indexed_attention"]}, True),
        ({"layer_types": None, "attention_chunk_size": 8192}, True),
        ({"layer_types": None, "attention_chunk_size": None}, False),
        ({}, False),
    ],
)
def test_only_full_and_sliding_attention_are_known(config: dict[str, Any], unknown: bool):
    from types import SimpleNamespace

    from language_self_play.shared_prompt import has_unknown_layers

    text = SimpleNamespace(**config)
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text))
    assert has_unknown_layers(model) is unknown  # type: ignore[arg-type]


ORIGINAL = 16


def longrope_phi(tokenizer: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.Phi3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        original_max_position_embeddings=ORIGINAL,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10_000.0,
            "short_factor": [1.0, 1.0, 1.0, 1.0],
            "long_factor": [2.0, 4.0, 8.0, 16.0],
        },
        initializer_range=0.2,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return transformers.Phi3ForCausalLM(config).eval()


def test_longrope_ends_the_context_where_its_factors_change(endless_chat: Any, tokenizer: Any):
    from language_self_play.config import Sampling
    from language_self_play.pretrained import context_length, stated_context
    from language_self_play.sampling.transformers import TransformersSampler

    model = longrope_phi(tokenizer)
    assert (context_length(model.config), stated_context(model.config)) == (ORIGINAL, 64)
    prompt = list(range(3, 3 + ORIGINAL - 6))

    def worst_difference() -> float:
        """Of the sampler's log-probs from those of one pass over the whole text."""
        sampler = TransformersSampler(model, endless_chat, seed=0, batch_size=8)
        sampler.context_length = limit
        worst = 0.0
        [group] = sampler.sample([prompt], 2, "solver", Sampling(), 20)
        for completion in group.completions:
            whole = torch.tensor([[*prompt, *completion.tokens]])
            alone = model(input_ids=whole).logits[0].log_softmax(-1)
            for t, token in enumerate(completion.tokens):
                expected = alone[len(prompt) - 1 + t, token].item()
                worst = max(worst, abs(expected - completion.logprobs[t]))
        lengths.append(len(completion.tokens))
        return worst

    lengths: list[int] = []
    with torch.no_grad():
        limit = context_length(model.config)
        assert worst_difference() < 1e-5
        limit = stated_context(model.config)
        assert worst_difference() > 0.01  # why it ends there
    assert lengths == [6, 20]


def test_a_run_of_a_longrope_model_says_how_much_of_its_context_it_uses(
    tokenizer: Any, make_config: Callable[..., Any], tmp_path: Path
):
    from language_self_play.game import warn_of_context

    longrope_phi(tokenizer).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="of its context of 64 tokens the run uses 16, beyond"):
        warn_of_context(make_config(policy={"path": str(tmp_path)}))
    warn_of_context(make_config())  # warnings are errors


def test_longrope_is_found_under_its_older_names_and_in_tables_of_several_kinds():
    import transformers

    from language_self_play.pretrained import context_length

    def context(**settings: Any) -> int:
        config = transformers.PreTrainedConfig()
        for name, value in {"max_position_embeddings": 100, **settings}.items():
            setattr(config, name, value)
        return context_length(config)

    su = {"type": "su", "short_factor": [1.0], "long_factor": [2.0]}
    assert context(rope_scaling=su, original_max_position_embeddings=10) == 10
    longrope = {"rope_type": "longrope", "original_max_position_embeddings": 20}
    plain = {"rope_type": "default"}
    assert context(rope_parameters={"full_attention": longrope, "sliding_attention": plain}) == 20
    assert context(rope_parameters=plain) == 100
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 25}
    assert context(rope_parameters=yarn) == 100  # its factors are the same in every pass
