"""lm-eval, EleutherAI's harness, on a model as this package loads it: safetensors, adapters merged."""

from __future__ import annotations

import copy
import difflib
import io
import logging
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from language_self_play.chat import Chat
from language_self_play.config import Harness, Policy
from language_self_play.errors import ConfigError, InputFileError, MemoryLimitError
from language_self_play.evaluate.outcomes import Record
from language_self_play.extras import require
from language_self_play.out_of_memory import is_out_of_memory
from language_self_play.policy import load_chat_model
from language_self_play.pretrained import choose_device, choose_dtype

# Standard errors in half of a 95 % interval.
Z_95 = NormalDist().inv_cdf(0.975)
# lm-eval's warnings that are no concern of whoever measures a model, by its logger. All others are shown.
UNCONCERNING = {
    # It is given a loaded model, as adapters and shards have to be; what it says is about loading one itself.
    "lm_eval.models.huggingface": (
        "`pretrained` model kwarg is not of type `str`",
        "Passed an already-initialized model through `pretrained`",
    ),
    # What a task's file leaves open has a default, which is the usual one.
    "lm_eval.api.task": (
        "is defined, but aggregation is not",
        "is defined, but higher_is_better is not",
    ),
    # As --num-fewshot or eval.harness.num_fewshot says.
    "lm_eval.evaluator": ("Overwriting default num_fewshot",),
}


def run_harness(
    section: Policy,
    tasks: list[str],
    *,
    include_path: Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    device: str = "auto",
    chat_template: bool = False,
    system_prompt: str | None = None,
) -> dict[str, Any]:
    """lm-eval's own results: `results` and `n-shot` by task, `versions`, `config`, …

    Raises ConfigError without lm-eval or for a task that it doesn't know, ModelError, and
    InputFileError for whatever a task fails with.
    """
    require("lm_eval", "harness", "lsp eval harness")
    manager = _manager(tasks, include_path, "--tasks", "--include-path")
    where = choose_device(device)
    chat, model = load_chat_model(section, where, choose_dtype("auto", where))
    asked = {
        "num_fewshot": num_fewshot,
        "limit": limit,
        "apply_chat_template": chat_template,
        "system_instruction": system_prompt,
    }
    with _without_what_concerns_nobody():
        return _run(model, chat, manager, tasks, batch_size, "--tasks", asked)


class HarnessTasks:
    """Tasks of lm-eval, ready to be given to the policy while it trains."""

    setting = "eval.harness"

    def __init__(self, section: Harness):
        """Find the tasks; their data is read when they are first given.

        Raises ConfigError without lm-eval or for a task that it doesn't know, or InputFileError.
        """
        require("lm_eval", "harness", self.setting)
        self.section = section
        folder = None if section.include_path is None else Path(section.include_path)
        if folder is not None and not os.path.isdir(folder):
            raise InputFileError(f"{self.setting}.include_path = {str(folder)!r}: no such folder")
        settings = (f"{self.setting}.tasks", f"{self.setting}.include_path")
        self._manager = _manager(section.tasks, folder, *settings)

    def metrics(self, model: PreTrainedModel, chat: Chat, system_prompt: str | None) -> Record:
        """eval/harness/TASK/METRIC of the model as it is, with half-widths of 95 % intervals.

        Whatever draws random numbers afterwards draws what it would have without. Raises InputFileError
        for what a task fails with, MemoryLimitError.
        """
        section = self.section
        asked = {
            "num_fewshot": section.num_fewshot,
            "limit": section.limit or None,
            "apply_chat_template": section.chat,
            "system_instruction": system_prompt if section.chat else None,
        }
        was_training = model.training
        try:
            with torch.no_grad(), _own_random_numbers(), _quiet():
                results = _run(
                    model,
                    chat,
                    self._manager,
                    section.tasks,
                    section.batch_size,
                    f"{self.setting}.tasks =",
                    asked,
                )
        finally:
            model.train(was_training)
        return harness_metrics(results)

    def plan(self, times: int) -> str:
        """One sentence: what is asked of the policy."""
        section = self.section
        each = f"{section.limit:,} questions" if section.limit else "all questions"
        return f"{self.setting}: {each} of {', '.join(section.tasks)}, {times} times."


def harness_metrics(results: dict[str, Any]) -> Record:
    """lm-eval's `acc,none` of a task as eval/harness/TASK/acc, of another filter as …/acc/FILTER."""
    metrics: Record = {}
    for task, values in results["results"].items():
        for name, value in values.items():
            measure, _, of = name.partition(",")
            if measure.endswith("_stderr") or not isinstance(value, int | float) or not of:
                continue
            of_filter = "" if of == "none" else f"/{of}"
            metrics[f"eval/harness/{task}/{measure}{of_filter}"] = float(value)
            error = values.get(f"{measure}_stderr,{of}")
            if isinstance(error, int | float):
                metrics[f"eval/harness/{task}/{measure}_ci95{of_filter}"] = Z_95 * error
    return metrics


def _manager(tasks: list[str], folder: Path | None, setting: str, folder_setting: str) -> Any:
    """lm-eval's index of tasks. Raises ConfigError for one that is not in it."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if folder is None else str(folder))
    for task in tasks:
        if not manager.match_tasks([task]):
            near = difflib.get_close_matches(task, manager.all_tasks, n=1)
            hint = (
                f"did you mean {near[0]}?" if near else f"{folder_setting} names a folder of tasks"
            )
            raise ConfigError(f"{setting} {task}: lm-eval has no such task; {hint}")
    return manager


def _run(
    model: PreTrainedModel,
    chat: Chat,
    manager: Any,
    tasks: list[str],
    batch_size: int,
    setting: str,
    asked: dict[str, Any],
) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    # It gives the tokenizer another padding token.
    tokenizer = copy.deepcopy(chat.tokenizer)
    try:
        results = simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=tasks,
            task_manager=manager,
            log_samples=False,
            **asked,
        )
    except Exception as error:
        if is_out_of_memory(error):
            raise MemoryLimitError(
                f"{setting} {','.join(tasks)}: {model.device} has no memory left for lm-eval's batches of"
                f" {batch_size}; lower the batch size, or use another device"
            ) from None
        # Tasks are programs and data of others, mostly from the hub: anything can be what is wrong.
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise InputFileError(f"{setting} {','.join(tasks)}: lm-eval stopped: {reason}") from None
    assert results is not None, "only other ranks than the first get nothing"
    return dict(results)


@contextmanager
def _own_random_numbers() -> Iterator[None]:
    """lm-eval seeds the process's generators; afterwards they are as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def _without_what_concerns_nobody() -> Iterator[None]:
    """lm-eval without the warnings of UNCONCERNING, and without git's complaint outside a repository."""
    from lm_eval import evaluator

    def concerns(record: logging.LogRecord) -> bool:
        return not any(said in record.getMessage() for said in UNCONCERNING[record.name])

    loggers, ask_git = [*map(logging.getLogger, UNCONCERNING)], evaluator.get_git_commit_hash
    for logger in loggers:
        logger.addFilter(concerns)
    # git itself complains, past sys.stderr.
    evaluator.get_git_commit_hash = lambda: None
    try:
        yield
    finally:
        evaluator.get_git_commit_hash = ask_git
        for logger in loggers:
            logger.removeFilter(concerns)


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval without its bars and remarks, which would tear a run's own."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with _without_what_concerns_nobody(), redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
