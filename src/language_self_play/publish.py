"""A trained model on the Hugging Face hub: what of a run is sent, in one commit or not at all.

Sent are the files that loading needs and the card, and nothing else that may lie beside them. Weights
of an earlier push that this one doesn't bring are removed in the same commit, since loaders would mix
them up; other files of the repository stay.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from language_self_play import __version__
from language_self_play.errors import ConfigError, LspError, RunFolderError, ServiceError
from language_self_play.markdown import printable
from language_self_play.model_card import BUILT_IN, hub_id, model_card, with_hub_id
from language_self_play.run_folder import Part, RunFolder

DEFAULT_ENDPOINT = "https://huggingface.co"
# Of one exchange with the hub; a large file may take as long as it moves.
TIMEOUT_S = 120.0

CARD = "README.md"
ADAPTER_CONFIG = "adapter_config.json"
NEEDED = {
    "model": ["config.json", "*.safetensors"],
    "adapter": [ADAPTER_CONFIG, "adapter_model.safetensors"],
}
# Weights, configuration, tokenizer and the author's model code; no pickles, nothing hidden.
SENT_SUFFIXES = {".safetensors", ".json", ".jinja", ".model", ".txt", ".py"}
NEVER_SENT = {"optimizer.safetensors", "state.json"}
# With one of these left over, a loader would take it for a part of the model, or for all of it.
CONFUSING_SUFFIXES = (".safetensors", ".safetensors.index.json")

# How hf_xet, which uploads large files where it is installed, reports a status.
XET_STATUS = re.compile(r"HTTP status \w+ error \((\d{3})")

TOO_SLOW_OR_BUSY = {408, 425, 429}
CHANGED_MEANWHILE = {409, 412}


@dataclass(frozen=True)
class Upload:
    """What is sent of a run. `version` is the number of steps behind the weights."""

    run: RunFolder
    part: Part
    version: int
    folder: Path
    files: list[Path]  # without the card
    left_out: list[str]
    card: str


@dataclass(frozen=True)
class Pushed:
    """Where the model is now, and whether anything had changed since the last push."""

    url: str
    changed: bool


# ---------------------------------------------------------------- what is sent


def choose_upload(run: Path, adapter: bool = False, checkpoint: int | None = None) -> Upload:
    """The run's model/ or adapter/, or those of checkpoints/step-`checkpoint`.

    Raises RunFolderError where they aren't, ConfigError for an adapter that others can't load.
    """
    folder = RunFolder(_existing_run(run))
    steps = folder.config().get("steps", 0)
    part: Part = "adapter" if adapter else "model"
    above = folder.folder
    if checkpoint is not None:
        above = _checkpoint(folder, checkpoint)
    elif not folder.model_folder.is_dir():
        raise RunFolderError(f"{run}: the run has not finished; {_what_now(folder)}")
    source = above / part
    if not source.is_dir():
        other = "without --adapter" if adapter else "with --adapter"
        there = "a whole model" if adapter else "an adapter alone"
        raise RunFolderError(f"{source}: no such folder; {above} holds {there}, push it {other}")
    for pattern in NEEDED[part]:
        if not any(file.stat().st_size for file in source.glob(pattern)):
            raise RunFolderError(
                f"{source}: is not whole, it holds no {pattern}; finish the run again"
            )
    if adapter:
        _refuse_private_base(source / ADAPTER_CONFIG)
    inside = sorted(source.iterdir())
    files = [file for file in inside if _is_sent(file)]
    left_out = [file.name for file in inside if file not in files and file.name != CARD]
    version = steps if checkpoint is None else checkpoint
    card = _card(folder, part, source / CARD, checkpoint)
    return Upload(folder, part, version, source, files, left_out, card)


def _existing_run(run: Path) -> Path:
    if not os.path.isdir(run):
        what = "is a file" if os.path.exists(run) else "no such folder"
        raise RunFolderError(f"{run}: {what}; RUN is the folder of a run, such as runs/arena")
    within = None if (run / "config.toml").is_file() else RunFolder.holding(run)
    if within is not None:
        raise RunFolderError(
            f"{run}: is a part of the run {within.folder}; push that, with --adapter for its adapter"
            " or --checkpoint STEP for a checkpoint's model"
        )
    return run


def _steps_of_checkpoints(run: RunFolder) -> list[int]:
    names = (place.name.removeprefix("step-") for place in run.checkpoints_folder.glob("step-*"))
    return sorted(int(name) for name in names if name.isdecimal())


def _checkpoint(run: RunFolder, step: int) -> Path:
    steps = _steps_of_checkpoints(run)
    if step not in steps:
        there = f"there are {', '.join(map(str, steps))}" if steps else "there are none"
        raise RunFolderError(f"--checkpoint {step}: {run.folder} has no such checkpoint; {there}")
    return run.checkpoints_folder / f"step-{step:06d}"


def _what_now(run: RunFolder) -> str:
    resume = f"go on with it by {run.resume_command}"
    if not (steps := _steps_of_checkpoints(run)):
        return resume
    return f"{resume}, or push its newest checkpoint with --checkpoint {steps[-1]}"


def _is_sent(file: Path) -> bool:
    named = file.suffix in SENT_SUFFIXES and file.name not in NEVER_SENT
    return named and not file.name.startswith(".") and file.is_file()


def _refuse_private_base(file: Path) -> None:
    try:
        base = json.loads(file.read_text("utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, LookupError, TypeError):
        raise RunFolderError(f"{file}: is damaged, it names no base_model_name_or_path") from None
    if base != BUILT_IN and hub_id(str(base)) is None:
        raise ConfigError(
            f"{file}: names its base model as {str(base)!r}, a folder of this machine, so nobody else"
            " could load the adapter; push the whole model (without --adapter), or write the base's"
            " hub id there"
        )


def _card(run: RunFolder, part: Part, file: Path, checkpoint: int | None) -> str:
    """The card that lies there, as its author may have edited it; else a new one."""
    if not file.is_file():
        return model_card(run.folder, part, checkpoint)
    try:
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunFolderError(f"{file}: can't be read ({error})") from None


# ---------------------------------------------------------------- sending it


def push(
    upload: Upload,
    repo_id: str,
    private: bool = False,
    branch: str | None = None,
    message: str | None = None,
) -> Pushed:
    """Send `upload` to the hub's repository OWNER/NAME, which is made if it isn't there.

    Raises ConfigError for what the user can mend (the name, the token, its permissions), ServiceError
    for what running it again can: then what has arrived is not sent twice.
    """
    check_repo_id(repo_id)
    endpoint = hub_endpoint()
    with _sentences(repo_id, endpoint):
        import huggingface_hub as hub

        hub.utils.logging.set_verbosity_error()  # its warnings show addresses that are signed
        if not sys.stderr.isatty():
            hub.utils.disable_progress_bars()
        hub.get_session().timeout = TIMEOUT_S
        if (token := hub.get_token()) is None:
            raise ConfigError(
                "no token for the Hugging Face hub is here; log in with `hf auth login`, or set HF_TOKEN"
            )
        api = hub.HfApi(endpoint, token, "language-self-play", __version__)
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        if branch is not None:
            api.create_branch(repo_id, branch=branch, exist_ok=True)
        there = api.model_info(repo_id, revision=branch)
        if private and not there.private:
            raise ConfigError(
                f"{repo_id}: exists and is public, and --private does not change that; make it private"
                " in its settings on the hub first, or leave --private out"
            )
        card = with_hub_id(upload.card, repo_id).encode()
        operations: list[hub.CommitOperationAdd | hub.CommitOperationDelete] = [
            hub.CommitOperationAdd(CARD, card),
            *(hub.CommitOperationAdd(file.name, file) for file in upload.files),
        ]
        operations += [
            hub.CommitOperationDelete(name)
            for name in _left_over([s.rfilename for s in there.siblings or []], upload)
        ]
        commit = api.create_commit(
            repo_id,
            operations,
            commit_message=message or _message(upload),
            revision=branch,
        )
    url = f"{endpoint}/{repo_id}" + (f"/tree/{branch}" if branch else "")
    return Pushed(url, changed=commit.oid != there.sha)


def check_repo_id(repo_id: str) -> None:
    """Raises ConfigError unless `repo_id` is OWNER/NAME as the hub allows it."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
        reason = "" if "/" in repo_id else "the owner is missing"
    except HFValidationError:
        reason = (
            "names are of at most 96 letters, digits, -, _ and ., don't begin or end with - or .,"
            " hold neither -- nor .., and don't end with .git"
        )
    if reason:
        raise ConfigError(f"REPO_ID = {repo_id!r}: must be OWNER/NAME, and {reason}")


def hub_endpoint() -> str:
    """The hub's address: HF_ENDPOINT, or huggingface.co. Raises ConfigError."""
    endpoint = os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT
    if not endpoint.startswith(("http://", "https://")):
        raise ConfigError(
            f"HF_ENDPOINT = {endpoint!r}: must begin with https:// or http://; unset it"
        )
    return endpoint.rstrip("/")


def _message(upload: Upload) -> str:
    return f"Upload {upload.part} after {upload.version} steps (language-self-play {__version__})"


def _left_over(names: list[str], upload: Upload) -> list[str]:
    """Weights of an earlier push at the repository's root that would be taken for this model's."""
    sent = {file.name for file in upload.files}
    return [
        name
        for name in names
        if "/" not in name
        and name not in sent
        and (name.endswith(CONFUSING_SUFFIXES) or name == ADAPTER_CONFIG)
    ]


# ---------------------------------------------------------------- what can go wrong


@contextmanager
def _sentences(repo_id: str, endpoint: str) -> Iterator[None]:
    """Turns whatever the hub's client raises into one sentence."""
    try:
        yield
    except LspError:
        raise
    except Exception as error:
        # Errors of the client, of its HTTP library, of its uploader in Rust, and of replies that are
        # not the hub's have no common kin.
        _raise_sentence(error, repo_id, endpoint)


def _raise_sentence(error: Exception, repo_id: str, endpoint: str) -> NoReturn:
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    again = "run the same command again, what has arrived is not sent twice"
    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, OfflineModeIsEnabled):
            raise ConfigError("HF_HUB_OFFLINE is set, so nothing can be sent; unset it") from None
        if isinstance(cause, HfHubHTTPError):
            said = _first_line(cause.server_message or "")
            _raise_for_status(cause.response.status_code, said, repo_id, again)
    if refused := XET_STATUS.search(str(error)):
        _raise_for_status(int(refused[1]), "from its storage", repo_id, again)
    names = " ".join(type(cause).__name__ for cause in causes)
    # The uploader's own "while uploading FILE" says less than what it was caused by.
    cause = next((c for c in causes if not isinstance(c, RuntimeError)), error)
    reason = _first_line(str(cause)) or type(cause).__name__
    if "Timeout" in names:
        raise ServiceError(
            f"{endpoint}: did not answer within {TIMEOUT_S:g} seconds; {again}"
        ) from None
    if "ConnectError" in names:
        raise ServiceError(
            f"{endpoint}: can't be reached ({_first_line(str(causes[-1]))}); check the network and"
            " HF_ENDPOINT, then run the same command again"
        ) from None
    if isinstance(error, FileNotFoundError):
        raise RunFolderError(f"{error.filename}: was there a moment ago and is gone") from None
    raise ServiceError(f"{endpoint}: the upload broke off ({reason}); {again}") from None


def _raise_for_status(status: int, said: str, repo_id: str, again: str) -> NoReturn:
    shown = f"{status}: {said}" if said else f"{status}"
    if status in TOO_SLOW_OR_BUSY or status >= 500:
        raise ServiceError(f"{repo_id}: the hub could not take it now ({shown}); {again}") from None
    if status in CHANGED_MEANWHILE:
        raise ServiceError(
            f"{repo_id}: was changed by someone else at the same moment ({shown}); {again}"
        ) from None
    sentence = {
        401: f"{repo_id}: the hub does not accept your token ({shown}); log in again with"
        " `hf auth login`, or set HF_TOKEN to one that is valid",
        403: f"{repo_id}: your token may not write there ({shown}); take a token with write"
        " permission, or a REPO_ID of your own",
        404: f"{repo_id}: the hub knows no such owner, repository or branch, or does not show it to"
        f" your token ({shown}); check REPO_ID",
    }.get(status, f"{repo_id}: the hub refuses it ({shown})")
    raise ConfigError(sentence) from None


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _first_line(text: str, limit: int = 200) -> str:
    line = next((line.strip() for line in printable(text).split("\n") if line.strip()), "")
    return line[:limit].rstrip(".")
