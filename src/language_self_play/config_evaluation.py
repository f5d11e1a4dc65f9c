"""The settings of evaluations while a run trains: [eval] and what is below it."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

import pydantic
from pydantic import Field

from language_self_play.config_rewards import Verifier
from language_self_play.config_types import (
    Flag,
    Name,
    NonNegativeFloat,
    NonNegativeInt,
    Nucleus,
    PositiveInt,
    Sampling,
    Section,
    Table,
)

# The name of a question set is part of metrics' names.
SetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$")]

# Below it several answers to one question tell hardly more than one.
SPREADING_TEMPERATURE = 0.1

STEP_0 = "step-0"
# Instructions and baseline of AlpacaEval 2.0, which the hub has.
ALPACA_EVAL = "alpaca_eval"
# Where names of sets stand, lm-eval and the arena have these.
TAKEN = ("harness", "arena")


class QuestionSet(Verifier, Sampling, Table):
    """Questions with keys, on which the policy's accuracy is measured while it trains."""

    path: Name = Field(
        description="The questions: a JSONL file, a file or folder that `datasets` reads, or a hub id."
    )
    split: str = Field("test", description="Split of a data set with several.")
    answer_column: str | None = Field(
        None,
        description="Column that holds the keys; by default the first of `answer`, `test`, `test_list`"
        " and `solution`.",
    )
    method: Literal["auto", "math", "exact", "regex", "code"] = Field(  # type: ignore[assignment]
        "auto",
        description="How answers are checked, as a verifier does: math, exact, regex, code; auto is"
        " code for keys in `test` and `test_list`, and math for others.",
    )
    prompt: str = Field(
        "{query}", description="What is asked, with {query} where the question stands."
    )
    limit: NonNegativeInt = Field(
        200, description="Questions asked, the same ones in every run; 0 for all."
    )
    num_answers: PositiveInt = Field(1, description="Answers to each question.")
    pass_at: list[PositiveInt] = Field(
        default_factory=lambda: [1],
        min_length=1,
        description="Each k of pass@k: the chance that one of k answers is right.",
    )
    temperature: NonNegativeFloat = Field(
        0.01,
        description="Sampling temperature, 0 for greedy answers; the default is the paper's at"
        " evaluation.",
    )
    top_p: Nucleus = Field(1.0, description="Nucleus of the distribution that is sampled from.")
    top_k: NonNegativeInt = Field(0, description="Tokens sampled from, 0 for all.")
    max_tokens: PositiveInt = Field(1024, description="Longest answer, in tokens.")

    @pydantic.model_validator(mode="after")
    def _can_measure(self) -> Self:
        if "{query}" not in self.prompt:
            raise ValueError(f"prompt = {self.prompt!r}: needs {{query}} where the question stands")
        if max(self.pass_at) > self.num_answers:
            raise ValueError(
                f"pass_at = {self.pass_at}: pass@{max(self.pass_at)} takes as many answers to each"
                f" question, and num_answers = {self.num_answers}"
            )
        if self.num_answers > 1 and self.temperature < SPREADING_TEMPERATURE:
            raise ValueError(
                f"num_answers = {self.num_answers}: at temperature = {self.temperature} all answers to"
                " a question are nearly the same; set a higher one, such as 0.8"
            )
        return self


class WinRateSet(Sampling):
    """Prompts on which a judge compares the policy's answers with the baseline's while it trains."""

    path: Name = Field(
        description="The prompts: a JSON or JSONL file with `instruction` (or `prompt`, `query`,"
        " `question`) and, for subsets, `dataset`; or `alpaca_eval`, the hub's 805 instructions."
    )
    limit: NonNegativeInt = Field(
        200, description="Prompts answered, the same ones in every run; 0 for all."
    )
    baseline: Name = Field(
        STEP_0,
        description="Whose answers are to be beaten: `step-0`, the model that the run begins with, a"
        " file of answers as alpaca_eval's `model_outputs`, or `alpaca_eval`, the hub's baseline.",
    )
    judge: dict[str, Any] = Field(
        min_length=1,
        description="Who compares: the fields of a [reward.NAME] of kind judge (the default),"
        " reward_model, python or arena, or kind local with a path and the fields of [self_reward].",
    )
    every: PositiveInt | None = Field(
        None, description="Steps between its evaluations; unset, as eval.every says."
    )
    temperature: NonNegativeFloat = Field(
        0.01,
        description="Sampling temperature, 0 for greedy answers; the default is the paper's at"
        " evaluation.",
    )
    top_p: Nucleus = Field(1.0, description="Nucleus of the distribution that is sampled from.")
    top_k: NonNegativeInt = Field(0, description="Tokens sampled from, 0 for all.")
    max_tokens: PositiveInt = Field(1024, description="Longest answer, in tokens.")


class Harness(Section):
    """Tasks of lm-eval, on the policy itself while it trains."""

    tasks: list[Name] = Field(
        min_length=1, description="lm-eval's names, such as `hellaswag` or `gsm8k`."
    )
    include_path: Name | None = Field(None, description="A folder with tasks of your own.")
    num_fewshot: NonNegativeInt | None = Field(
        None, description="Examples before each question; unset, as many as the task says."
    )
    limit: NonNegativeInt = Field(
        100, description="Questions of each task, its first ones; 0 for all."
    )
    batch_size: PositiveInt = Field(
        1, description="Questions at once; changes memory and speed, results in their last bits."
    )
    chat: Flag = Field(
        False,
        description="Whether questions go through the chat template, with solver.system_prompt.",
    )
    every: PositiveInt | None = Field(
        None, description="Steps between its evaluations; unset, as eval.every says."
    )


class Eval(Section):
    tasks: list[Literal["arena"]] = Field(
        default_factory=list,
        description="What to evaluate while training: held-out arena questions.",
    )
    every: PositiveInt = Field(50, description="Steps between evaluations; first and last always.")
    accuracy: dict[SetName, QuestionSet] = Field(
        default_factory=dict,
        description="Question sets by name, each evaluated beside `eval.tasks`.",
    )
    win_rate: dict[SetName, WinRateSet] = Field(
        default_factory=dict,
        description="Sets of prompts by name, on which a judge compares answers.",
    )
    harness: Harness | None = Field(None, description="Tasks of lm-eval.")

    @pydantic.model_validator(mode="after")
    def _names_differ(self) -> Self:
        for name in self.win_rate:
            if name in self.accuracy or name in TAKEN:
                other = (
                    "a set of eval.accuracy" if name in self.accuracy else "a measure of its own"
                )
                raise ValueError(
                    f"eval.win_rate.{name}: is the name of {other}, and metrics would be mixed up;"
                    " choose another"
                )
        return self
