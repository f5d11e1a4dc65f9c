"""Optional libraries: each is imported in the one file that uses it, and named when it is missing."""

from __future__ import annotations

import logging
from importlib import import_module
from typing import Any

from language_self_play.errors import ConfigError


def require(module: str, extra: str, setting: str) -> Any:
    """Import `module` for `setting`. Raises ConfigError that names the extra to install."""
    # PEFT brings bitsandbytes along, which warns of a kernel for 4 bits that nothing here uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name.split(".")[0]):
            raise  # a part that an installed library misses is another matter
        raise ConfigError(
            f"{setting}: needs the library {module.split('.')[0]}, which is not installed;"
            f" pip install 'language-self-play[{extra}]'"
        ) from None
