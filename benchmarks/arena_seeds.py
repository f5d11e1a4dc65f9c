"""LSP, LSP-Zero and GRPO in the arena, same budget, several seeds: what happens, tier by tier.

    python benchmarks/arena_seeds.py [--seeds 3] [--out runs/seeds] [--steps N]

Runs that have finished are not run again. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from statistics import mean

from language_self_play.run_folder import RunFolder

RECIPES = {"LSP": "arena", "LSP-Zero": "arena-zero", "GRPO": "arena-grpo"}
TIERS = ("", "/easy", "/medium", "/hard")
LAST_STEPS = 20


def play(recipe: str, seed: int, out: Path, flags: list[str]) -> RunFolder:
    """The finished run of a recipe and seed."""
    run = RunFolder(out / f"{recipe}-seed{seed}")
    if not run.model_folder.is_dir():
        where = (
            ["--resume", run.folder] if run.config_file.exists() else [recipe, "--run", run.folder]
        )
        if recipe in where:
            flags = ["--seed", str(seed), *flags]
        command = [sys.executable, "-m", "language_self_play", "train", *map(str, where), *flags]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return run


def row(run: RunFolder) -> str:
    """One line of the table."""
    records = list(run.metrics())
    evaluations = [r for r in records if "eval/sampled_accuracy" in r]
    first, last = evaluations[0], evaluations[-1]
    cells = []
    for kind in ("sampled", "greedy"):
        for tier in TIERS:
            key = f"eval/{kind}_accuracy{tier}"
            cells.append(f"{100 * first[key]:.1f} → {100 * last[key]:.1f}")
    tail = [r for r in records if "loss" in r][-LAST_STEPS:]
    for key in ("queries/unsolvable_fraction", "kl/solver"):
        cells.append(f"{mean(r[key] for r in tail if key in r):.3f}")
    minutes = sum(r.get("time/step_s", 0.0) for r in records) / 60
    return " | ".join([*cells, f"{minutes:.1f}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/seeds"))
    options, flags = parser.parse_known_args()
    names = [t.strip("/") or "all" for t in TIERS]
    header = [
        "algorithm",
        "seed",
        *(f"sampled, {n}" for n in names),
        *(f"greedy, {n}" for n in names),
    ]
    header += ["unsolvable", "KL Solver", "minutes"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for seed in range(options.seeds):
        for algorithm, recipe in RECIPES.items():
            cells = row(play(recipe, seed, options.out, flags))
            lines.append(f"| {algorithm} | {seed} | {cells} |")
    order = sorted(
        lines[2:], key=lambda line: list(RECIPES).index(line.split(" | ")[0].strip("| "))
    )
    print("\n".join([*lines[:2], *order]))


if __name__ == "__main__":
    main()
