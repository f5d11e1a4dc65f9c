"""Language Self-Play: improve a language model without training data (arXiv 2509.07414).

    from language_self_play import Config, self_play

    run = self_play(Config.from_recipe("arena"))
    print(run.folder)

Importing the package imports neither torch nor transformers; the names below load on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from language_self_play.config import Config as Config
    from language_self_play.errors import LspError as LspError
    from language_self_play.train import self_play as self_play

__version__ = "0.1.0"
__all__ = ["Config", "LspError", "__version__", "self_play"]

_HOMES = {"Config": "config", "LspError": "errors", "self_play": "train"}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
