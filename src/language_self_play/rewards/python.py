"""A Python function of the user's as a reward, named `module:function`."""

from __future__ import annotations

import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any

from language_self_play.config import Config, PythonReward
from language_self_play.errors import RewardError
from language_self_play.rewards import Reward, checked, shown
from language_self_play.signals import Abandoned
from language_self_play.wording import counted

# Ctrl-C, and a step that is given up: whatever else ends a function, sys.exit too, is the function's.
RUNS_OWN = (KeyboardInterrupt, Abandoned)


class PythonFunction(Reward):
    """Calls the function with flat lists, one (query, answer) pair after the other."""

    def __init__(self, setting: str, function: Callable[..., Any]):
        """`setting` is what errors name, such as `reward.main.function = 'module:function'`."""
        self.setting = setting
        self.function = function
        self.takes_keys = _takes_keys(function)

    def __call__(
        self, queries: list[str], answers: list[list[str]], keys: list[str | None]
    ) -> list[list[float]]:
        flat_queries = [q for q, group in zip(queries, answers, strict=True) for _ in group]
        flat_answers = [a for group in answers for a in group]
        arguments: list[list[Any]] = [flat_queries, flat_answers]
        if self.takes_keys:
            arguments.append([k for k, group in zip(keys, answers, strict=True) for _ in group])
        try:
            returned = self.function(*arguments)
            values = list(returned) if isinstance(returned, Iterable) else [returned]
        except RUNS_OWN:
            raise
        except BaseException as error:
            # A reward is the user's code; whatever it raises is reported under its name.
            where = traceback.extract_tb(error.__traceback__)[-1]
            raise RewardError(
                f"{self.setting}: raised {type(error).__name__}: {error}"
                f" ({where.filename}:{where.lineno})"
            ) from error
        if not isinstance(returned, Iterable) or any(isinstance(v, str) for v in values):
            raise RewardError(
                f"{self.setting}: returned {shown(returned)}; it must return a list of numbers"
            )
        if len(values) != len(flat_answers):
            raise RewardError(
                f"{self.setting}: returned {counted(len(values), 'number')} for"
                f" {counted(len(flat_answers), 'answer')}; it must return one for each, in their order"
            )
        rows = iter(values)
        return [[next(rows) for _ in group] for group in answers]


def build(name: str, section: PythonReward, config: Config) -> PythonFunction:
    """Import the function, also from the current folder, and call it once. Raises RewardError."""
    function = load_function(name, section.function)
    reward = PythonFunction(f"reward.{name}.function = {section.function!r}", function)
    # Two of each: what is wrong with it shows now, also a list of a fixed length.
    trial = ["a query", "another"], [["an answer", "a second"], ["a third", "a fourth"]]
    checked(reward.setting, reward(*trial, [None, None]), *trial)
    return reward


def load_function(name: str, target: str) -> Callable[..., Any]:
    """The function named `module:function`. Raises RewardError."""
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
    except RUNS_OWN:
        raise
    except BaseException as error:
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


def _takes_keys(function: Callable[..., Any]) -> bool:
    try:
        return "keys" in inspect.signature(function).parameters
    except ValueError:  # of a built-in that does not tell
        return False
