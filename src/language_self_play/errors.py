"""What can go wrong, as one tree; each error is also its standard-library kin.

    LspError
    ├── ConfigError      (ValueError)       a setting or a command line            exit code 2
    ├── InputFileError   (OSError)          a file or folder that was pointed at   exit code 2
    ├── ModelError       (ValueError)       a checkpoint that can't play           exit code 2
    ├── RewardError      (ValueError)       a reward that raised or mis-shaped     exit code 2
    ├── RunFolderError   (OSError)          a run folder that can't be used        exit code 2
    ├── NonFiniteError   (ArithmeticError)  a NaN or infinity in the numbers       exit code 3
    ├── SamplerError     (ArithmeticError)  log-probs that are not the trainer's   exit code 3
    ├── MemoryLimitError (MemoryError)      no memory, in the smallest batches too exit code 2
    ├── ServiceError     (ConnectionError)  an endpoint that stays away            exit code 75
    ├── RankError        (ConnectionError)  another process of the run has gone    exit code 1
    └── Paused           (InterruptedError) stopped on request, resumable          exit code 75

A message names the field or file, shows the value, says why it is wrong and what to do.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast


class LspError(Exception):
    """The root of every error that this package raises on purpose."""

    exit_code = 2
    agreed = False  # whether all ranks of the run raise it


class ConfigError(LspError, ValueError):
    """One or more settings are wrong; one sentence a line."""


class InputFileError(LspError, OSError):
    """A file or folder that the user pointed at is missing, unreadable or malformed."""


class ModelError(LspError, ValueError):
    """A checkpoint can't be loaded or can't play the game."""


class RewardError(LspError, ValueError):
    """A reward raised, or returned something other than one number for each answer."""


class RunFolderError(LspError, OSError):
    """A run folder can't be created, written, or resumed from."""


class NonFiniteError(LspError, ArithmeticError):
    """A loss, gradient, reward or log-probability is NaN or infinite.

    `places` are the (role, group or completion) whose own loss or gradient it is, where known.
    """

    exit_code = 3

    def __init__(self, message: str, places: Sequence[tuple[str, int]] = ()):
        super().__init__(message)
        self.places = list(places)


class SamplerError(LspError, ArithmeticError):
    """The sampler's log-probs are too far from the trainer's of the same tokens."""

    exit_code = 3


class MemoryLimitError(LspError, MemoryError):
    """The device has no memory left, and no smaller batch is possible."""


class ServiceError(LspError, ConnectionError):
    """An outside service, such as a judge, gave no usable reply after all retries.

    A run that meets it saves its state and ends as Paused.
    """

    exit_code = 75


class RankError(LspError, ConnectionError):
    """Another rank of the run has ended or does not answer; that one says why."""

    exit_code = 1


class Paused(LspError, InterruptedError):
    """The run was asked to stop; it has checkpointed and can be resumed."""

    exit_code = 75


@contextmanager
def renaming(rename: Callable[[str], str]) -> Iterator[None]:
    """What is raised or warned of within says `rename` of what it says: settings as the user typed them."""
    show = warnings.showwarning

    def show_renamed(said: Warning | str, *rest: Any, **named: Any) -> None:
        if isinstance(said, Warning) and (other := rename(str(said))) != str(said):
            said.args = (other,)
        show(said, *rest, **named)

    warnings.showwarning = cast("Any", show_renamed)
    try:
        yield
    except LspError as error:
        error.args = (rename(str(error)),)
        raise
    finally:
        warnings.showwarning = show
