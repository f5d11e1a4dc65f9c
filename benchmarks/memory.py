"""The memory estimate of `lsp train --dry-run` against what runs take: python benchmarks/memory.py

Each row is a run of two steps, in a process of its own, of a random model that never stops by itself,
so that its answers are as long as they may be. In a game its queries are replaced by valid ones of full
length: a random model poses none. `measured` is the growth of the process's peak resident memory over
its value when everything is imported; the estimate should lie within 20 % of it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

GIB = 2**30
MODELS: dict[str, dict[str, Any]] = {
    "34M": {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 8192,
        "tie_word_embeddings": False,
    },
    "30M, tiny vocabulary": {
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 9,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": 512,
        "tie_word_embeddings": False,
    },
    # SmolLM-135M's shape.
    "135M, tied": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49_152,
        "tie_word_embeddings": True,
    },
}
GAME = {
    "data": {},
    "challenger": {"num_queries": 8, "prompt": "arena", "template": "{query}", "max_tokens": 64},
    "self_reward": {"mode": "expected", "rubric": "arena"},
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "float32": ("34M", {}),
    "no reference": ("34M", {"solver": {"beta": 0.0}}),
    "small micro-batches": ("34M", {"learner": {"tokens_per_micro_batch": 256}}),
    "gradient checkpointing": ("34M", {"learner": {"gradient_checkpointing": True}}),
    "8-bit moments": ("34M", {"learner": {"optimizer": "adamw_8bit"}}),
    "bfloat16": ("34M", {"dtype": "bfloat16"}),
    "LoRA, bfloat16": ("34M", {"dtype": "bfloat16", "policy": {"lora": {}}}),
    "LoRA, float32": ("34M", {"policy": {"lora": {}}}),
    "G = 16": ("34M", {"solver": {"group_size": 16}, "learner": {"tokens_per_micro_batch": 4096}}),
    "prompts of 1,000 tokens": ("34M", {"prompt": 1000}),
    "lsp-zero": ("34M", {"algorithm": "lsp-zero", **GAME}),
    "lsp, judge reads": ("34M", {"algorithm": "lsp", **GAME}),
    "reward model": ("34M", {"reward": {"main": {"kind": "reward_model", "format": "pair"}}}),
    "long answers compared": (
        "34M",
        {
            "learner": {"tokens_per_micro_batch": 256},
            "eval": {"win_rate": {"long": {"max_tokens": 400, "judge": {"kind": "local"}}}},
        },
    ),
    "tiny vocabulary": ("30M, tiny vocabulary", {}),
    "float32, tied": ("135M, tied", {}),
    "bfloat16, tied": ("135M, tied", {"dtype": "bfloat16"}),
}


def settings(folder: Path, case: str) -> dict[str, Any]:
    from language_self_play.recipe_files import merge

    changes = dict(CASES[case][1])
    changes.pop("prompt", None)
    table = {
        "algorithm": "grpo",
        "steps": 2,
        "device": "cpu",
        "dtype": "float32",
        "policy": {"path": str(folder / "model")},
        "challenger": {"num_queries": 4},
        "solver": {"group_size": 8, "max_tokens": 96},
        "learner": {"tokens_per_micro_batch": 2048},
        "reward": {"main": {"kind": "python", "function": "memory:length"}},
        "log": {"progress": "none"},
    }
    if "algorithm" not in changes:
        table["data"] = {"path": str(folder / "queries.jsonl")}
    if "reward" in changes:
        table["reward"] = {"main": {"path": str(folder / "reward"), "max_tokens": 512}}
    if "eval" in changes:
        long = {"path": str(folder / "prompts.jsonl"), "judge": {"path": str(folder / "model")}}
        table["eval"] = {"win_rate": {"long": long}}
    return merge(table, changes)


def length(queries: list[str], answers: list[str]) -> list[float]:
    return [float(len(answer) % 7) for answer in answers]


def make_models(folder: Path, case: str) -> None:
    """A random model with the arena's tokenizer, a reward model of the same shape, and queries."""
    import torch
    import transformers

    from language_self_play.arena.tiny_model import build_tokenizer

    tokenizer = build_tokenizer()
    name, changes = CASES[case]
    config = transformers.LlamaConfig(
        **MODELS[name],
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        num_labels=1,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    if "reward" in changes:
        config.architectures = None
        transformers.LlamaForSequenceClassification(config).save_pretrained(folder / "reward")
        tokenizer.save_pretrained(folder / "reward")
    rows = [json.dumps({"prompt": f"{i}" + "7" * changes.get("prompt", 60)}) for i in range(64)]
    (folder / "queries.jsonl").write_text("\n".join(rows[:8]))
    (folder / "prompts.jsonl").write_text("\n".join(rows))


def measure(folder: Path, case: str) -> None:
    """Run in a process of its own: prints (estimate, measured growth) in bytes."""
    import torch

    import language_self_play.game
    import language_self_play.train
    from language_self_play.config import Config
    from language_self_play.memory import memory_estimate
    from language_self_play.metrics import peak_resident_bytes
    from language_self_play.plan import checked, judge_turn, longest_turns

    config = Config.from_table(settings(folder, case))
    if config.policy.lora:
        import peft  # noqa: F401
    if config.learner.optimizer == "adamw_8bit":
        import bitsandbytes  # noqa: F401
    language_self_play.game.pose_queries = of_full_length
    warm = torch.randn(64, 64, requires_grad=True)
    (warm @ warm).sum().backward()  # what the first product and its gradient load
    before = peak_resident_bytes()
    language_self_play.train.self_play(config, folder / "run")
    measured = peak_resident_bytes() - before
    found = checked(config)
    turns = list(longest_turns(config, found.questions).values())
    estimate = memory_estimate(config, turns, judge_turn(config), found.evaluated, found.compared)
    print(json.dumps([estimate.peak, measured]))


def of_full_length(sampler: Any, prompt: Any, settings: Any, *rest: Any) -> Any:
    """The Challenger's turn, its queries valid and as long as they may be."""
    from language_self_play.players import pose_queries

    posed = pose_queries(sampler, prompt, settings, *rest)
    text = "7" * (settings.max_tokens - 1)
    posed.all_queries = [q._replace(text=text, valid=True, reason=None) for q in posed.all_queries]
    return posed


def run(case: str) -> tuple[int, int]:
    """(estimate, measured growth) in bytes of one case, run in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        make_models(Path(folder), case)
        command = [sys.executable, __file__, "--measure", folder, case]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{case}: {done.stderr}")
        estimate, measured = json.loads(done.stdout.splitlines()[-1])
        return estimate, measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", default=list(CASES))
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(Path(options.measure[0]), options.measure[1])
        return
    print("| case | model | estimate, GiB | measured, GiB | ratio |\n|---|---|---|---|---|")
    for case in options.cases:
        estimate, measured = run(case)
        print(
            f"| {case} | {CASES[case][0]} | {estimate / GIB:.3f} | {measured / GIB:.3f} |"
            f" {estimate / measured:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
