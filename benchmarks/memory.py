"""The memory estimate of `lsp train --dry-run` against what runs take: python benchmarks/memory.py

Each row is a run of two steps, in a process of its own, of a random Llama of 34 or 135 million
parameters whose queries and answers are as long as they may be. `measured` is the growth of the
process's peak resident memory over its value when everything is imported; the estimate should lie
within 20 % of it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

GIB = 2**30
MODELS = {
    "34M": {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "vocab_size": 8192,
    },
    "135M": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "vocab_size": 32768,
    },
}
NO_KL = {"solver": {"beta": 0.0}, "challenger": {"beta": 0.0}}
VARIANTS = {
    "float32": {},
    "float32, no reference": NO_KL,
    "float32, small micro-batches": {"learner": {"tokens_per_micro_batch": 512}},
    "float32, gradient checkpointing": {"learner": {"gradient_checkpointing": True}},
    "float32, 8-bit moments": {"learner": {"optimizer": "adamw_8bit"}},
    "bfloat16": {"dtype": "bfloat16"},
    "LoRA, bfloat16": {"dtype": "bfloat16", "policy": {"lora": {}}},
    "LoRA, float32": {"policy": {"lora": {}}},
}


def settings(folder: Path, variant: str) -> dict:
    from language_self_play.recipe_files import merge

    table = {
        "algorithm": "grpo",
        "steps": 2,
        "device": "cpu",
        "dtype": "float32",
        "threads": 2,
        "policy": {"path": str(folder / "model")},
        "data": {"path": str(folder / "queries.jsonl")},
        "challenger": {"num_queries": 4},
        "solver": {"group_size": 8, "max_tokens": 128},
        "learner": {"tokens_per_micro_batch": 2048},
        "reward": {"main": {"kind": "python", "function": "memory:length"}},
        "log": {"progress": "none"},
    }
    return merge(table, VARIANTS[variant])


def length(queries: list[str], answers: list[str]) -> list[float]:
    return [float(len(answer) % 7) for answer in answers]


def make_model(folder: Path, name: str) -> None:
    """A random model that never stops by itself, with the arena's tokenizer."""
    import torch
    import transformers

    from language_self_play.arena.tiny_model import build_tokenizer

    tokenizer = build_tokenizer()
    config = transformers.LlamaConfig(
        **MODELS[name],
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [json.dumps({"prompt": f"{i}" + "7" * 60}) for i in range(8)]
    (folder / "queries.jsonl").write_text("\n".join(rows))


def measure(folder: Path, variant: str) -> None:
    """Run in a process of its own: prints (estimate, measured growth) in bytes."""
    import resource
    import shutil

    import torch

    import language_self_play.train
    from language_self_play.config import Config
    from language_self_play.memory import memory_estimate
    from language_self_play.plan import longest_turns

    config = Config.from_table(settings(folder, variant))
    if config.policy.lora:
        import peft  # noqa: F401
    if config.learner.optimizer == "adamw_8bit":
        import bitsandbytes  # noqa: F401
    torch.set_num_threads(2)
    warm = torch.randn(64, 64, requires_grad=True)
    (warm @ warm).sum().backward()  # what the first product and its gradient load
    shutil.rmtree(folder / "run", ignore_errors=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    language_self_play.train.self_play(config, folder / "run")
    measured = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    estimate = memory_estimate(config, list(longest_turns(config).values()))
    print(json.dumps([estimate.peak, measured * 1024]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, action="append")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(Path(options.measure[0]), options.measure[1])
        return
    print(f"{'model':6} {'variant':34} {'estimate':>9} {'measured':>9}  GiB   ratio")
    for name in options.model or MODELS:
        with tempfile.TemporaryDirectory() as folder:
            make_model(Path(folder), name)
            for variant in VARIANTS:
                command = [sys.executable, __file__, "--measure", folder, variant]
                out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                estimate, measured = json.loads(out.splitlines()[-1])
                print(
                    f"{name:6} {variant:34} {estimate / GIB:9.3f} {measured / GIB:9.3f}"
                    f"       {estimate / measured:.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
