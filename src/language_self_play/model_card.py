"""The README.md of a trained model, made from its run."""

from __future__ import annotations

from pathlib import Path


def model_card(run: Path) -> str:
    """What the model in `run` is and how to load it."""
    return f"# {run.name}\n\nTrained with Language Self-Play (arXiv 2509.07414).\n"
