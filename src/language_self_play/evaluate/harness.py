"""lm-eval, EleutherAI's harness, on a model as this package loads it: safetensors, adapters merged."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from language_self_play.config import Policy
from language_self_play.errors import ConfigError, InputFileError
from language_self_play.extras import require
from language_self_play.policy import load_chat_model
from language_self_play.pretrained import choose_device, choose_dtype


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
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    for task in tasks:
        if not manager.match_tasks([task]):
            near = difflib.get_close_matches(task, manager.all_tasks, n=1)
            hint = f"did you mean {near[0]}?" if near else "--include-path names a folder of tasks"
            raise ConfigError(f"--tasks {task}: lm-eval has no such task; {hint}")
    where = choose_device(device)
    chat, model = load_chat_model(section, where, choose_dtype("auto", where))
    try:
        results = simple_evaluate(
            HFLM(pretrained=model, tokenizer=chat.tokenizer, batch_size=batch_size),
            tasks=tasks,
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=manager,
            apply_chat_template=chat_template,
            system_instruction=system_prompt,
            log_samples=False,
        )
    except Exception as error:
        # Tasks are programs and data of others, mostly from the hub: anything can be what is wrong.
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise InputFileError(f"--tasks {','.join(tasks)}: lm-eval stopped: {reason}") from None
    assert results is not None, "only other ranks than the first get nothing"
    return dict(results)
