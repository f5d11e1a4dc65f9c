"""TRL's GRPOTrainer on the same prompts, the Challenger's group given to it as one more prompt.

Its settings, each the fastest there is on a CPU:

- rows of a micro-batch and kind of key-value cache as measured best (`Settings`); as many micro-batches
  in a generation as in a step, so that it computes no old log-probs (it needs none on-policy). Its
  continuous batching took 2.6 times as long as its plain generation (1M, float32), eager attention
  1.35 times;
- no gradient checkpointing (its default has it), no dropout, no logging, saving or evaluation;
- weights in the type of the comparison, without autocast: in bfloat16 it keeps no float32 copy of the
  weights, which ours does;
- AdamW fused, its default; gradients clipped to 1, as ours;
- the loss that ours is up to a factor (`dr_grpo`, rewards centred and not scaled), k3 at β > 0;
- no stop token that could be drawn, so that nothing has to be masked in each step of `generate`.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from speed.models import Work, as_text, build_tokenizer, prompts
from speed.ours import LEARNING_RATE, token_reward
from speed.timing import Seconds

# More than are ever played; the trainer asks for a number.
MANY_STEPS = 1_000_000


class Settings(NamedTuple):
    """What is tried out: completions of a micro-batch, and `generate`'s cache (None: it grows)."""

    rows: int
    cache: str | None = None

    def __str__(self) -> str:
        return f"{self.rows} rows, {self.cache or 'growing'} cache"


def to_try(work: Work, with_challenger: bool = True) -> list[Settings]:
    """Everything at once, about a third or a quarter, one group, and two of them with both caches.

    Settings of the same place in the list correspond, whatever the number of rows.
    """
    all_rows = (with_challenger + work.num_queries) * work.group_size
    part = next(n for n in (3, 4, 2, 1) if all_rows % (n * work.group_size) == 0)
    parts = (all_rows, all_rows // part, work.group_size)
    return [
        Settings(parts[0]),
        Settings(parts[1]),
        Settings(parts[2]),
        Settings(parts[1], "static"),
        Settings(parts[2], "static"),
    ]


class Trl:
    """A trainer that has yet to begin."""

    def __init__(
        self,
        work: Work,
        folder: Path,
        settings: Settings | None = None,
        with_challenger: bool = True,
    ):
        if work.num_queries != work.group_size and with_challenger:
            raise ValueError(
                f"TRL has one group size: N = {work.num_queries} must be G = {work.group_size}"
            )
        logging.getLogger("transformers").setLevel(logging.ERROR)
        warnings.simplefilter("ignore")
        self.work = work
        self.all_rows = (work.num_queries + with_challenger) * work.group_size
        self.settings = settings or to_try(work, with_challenger)[0]
        rows = self.settings.rows
        challenger, solver = prompts(work, 0)
        texts = [as_text(p) for p in ([challenger, *solver] if with_challenger else solver)]
        self.scratch = tempfile.TemporaryDirectory()
        arguments = GRPOConfig(
            output_dir=self.scratch.name,
            model_init_kwargs={"dtype": work.dtype},
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_dropout=True,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=self.all_rows // rows,
            steps_per_generation=self.all_rows // rows,
            num_generations=work.group_size,
            num_iterations=1,
            max_completion_length=work.length,
            temperature=1.0,
            generation_kwargs={"eos_token_id": None},
            cache_implementation=self.settings.cache,
            beta=work.beta,
            loss_type="dr_grpo",
            scale_rewards="none",
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            max_grad_norm=1.0,
            max_steps=MANY_STEPS,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        self.trainer = GRPOTrainer(
            model=str(folder),
            reward_funcs=[_reward],
            args=arguments,
            train_dataset=Dataset.from_dict({"prompt": texts}),
            processing_class=build_tokenizer(work.vocab_size),
        )
        self.trainer.remove_callback(PrinterCallback)

    def train(self, clock: Seconds, after_step: Callable[[float], bool]) -> None:
        """TRL's own loop. After each step `after_step(seconds)` is called, and True ends it.

        A step is everything from its first prompt to its update: generation, rewards, reference,
        loss, gradient, optimizer.
        """
        self.trainer.add_callback(_Watch(clock, after_step, self._check))
        self.trainer.train()

    def _check(self) -> None:
        """Completions have full length, or the comparison is none."""
        metrics: Any = self.trainer._metrics["train"]
        shortest = metrics["completions/min_length"][-1]
        assert shortest == self.work.length, f"TRL made a completion of {shortest} tokens"


class _Watch(TrainerCallback):
    def __init__(
        self, clock: Seconds, after_step: Callable[[float], bool], check: Callable[[], None]
    ):
        self.clock, self.after_step, self.check = clock, after_step, check
        self.start = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = self.clock()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        seconds = self.clock() - self.start
        self.check()
        control.should_training_stop = self.after_step(seconds)


def _reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [token_reward(tokens) for tokens in completion_ids]
