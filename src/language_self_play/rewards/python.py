"""A Python function of the user's as a reward, named `module:function`."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING

from language_self_play.errors import RewardError

if TYPE_CHECKING:
    from language_self_play.rewards import RewardFunction


def load_function(name: str, target: str) -> RewardFunction:
    """Import `module:function`, also from the current folder. Raises RewardError."""
    module_name, _, function_name = target.partition(":")
    if not module_name or not function_name:
        raise RewardError(
            f"reward.{name}.function = {target!r}: must be of the form module:function"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        raise RewardError(f"reward.{name}.function = {target!r}: {error}") from None
    except Exception as error:
        # Importing runs the user's module; whatever it raises is reported under its name.
        raise RewardError(
            f"reward.{name}.function = {target!r}: importing {module_name} raised"
            f" {type(error).__name__}: {error}"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise RewardError(
            f"reward.{name}.function = {target!r}: {module_name} has no function {function_name}"
        )
    return function
