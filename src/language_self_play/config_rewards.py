"""The settings of rewards: one section for each `kind` of [reward.NAME]."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

import pydantic
from pydantic import Field

from language_self_play.config_types import (
    DEVICE,
    Flag,
    Float,
    Name,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
)


class RewardSection(Section):
    weight: Float = Field(1.0, description="Weight of this reward in the sum R(q, a).")


class ArenaReward(RewardSection):
    """1 for the one right answer to an arena query, 0 otherwise."""

    kind: Literal["arena"]


class PythonReward(RewardSection):
    """A function of yours: `def reward(queries: list[str], answers: list[str]) -> list[float]`."""

    kind: Literal["python"]
    function: str = Field(
        description="`module:function`; one number for each (query, answer) pair. A function with a"
        " third parameter `keys` also gets data.answer_column's values."
    )


class RewardModelReward(RewardSection):
    """The score of a sequence-classification model, such as Skywork-Reward or OpenAssistant's."""

    kind: Literal["reward_model"]
    path: Name = Field(description="The reward model: a folder or a hub id.")
    format: Literal["auto", "chat", "pair"] = Field(
        "auto",
        description="How (query, answer) is read: through the chat template, or as a pair of texts;"
        " auto is chat where the tokenizer has a template.",
    )
    bound: Literal["none", "sigmoid", "standardize"] = Field(
        "none",
        description="The score as it is (the paper's), its sigmoid, or less the step's mean and over"
        " its standard deviation.",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Type of its weights; auto is that of the run."
    )
    device: str = Field(
        "auto", pattern=DEVICE, description="Where it runs; auto is the device of the run."
    )
    max_tokens: PositiveInt = Field(
        4096, description="Longest pair in tokens; of a longer one the query's beginning is cut."
    )
    tokens_per_batch: PositiveInt = Field(
        16_384, description="Tokens of one forward pass; changes memory, not results."
    )
    trust_remote_code: Flag = Field(
        False, description="Run the Python code that the model's authors ship with its weights."
    )


class Verifier(Section):
    method: Literal["math", "exact", "regex", "code"] = Field(
        description="math: equal as mathematics (math-verify); exact: equal texts; regex: `pattern`'s"
        " first group equals the key, or without keys `pattern` is found; code: the key's unit tests"
        " pass in a sandbox."
    )
    pattern: str | None = Field(None, description="Python regular expression of method `regex`.")
    timeout_s: PositiveFloat = Field(
        10.0, description="Seconds after which a check is killed and counts as failed."
    )
    workers: PositiveInt | None = Field(
        None, description="Checks that run at once; by default one for each CPU core."
    )
    memory_mib: PositiveInt = Field(
        1024, description="Address space of each process of a program in method `code`, in MiB."
    )

    @pydantic.model_validator(mode="after")
    def _agree(self) -> Self:
        _check_pattern(self.method, self.pattern)
        return self


class VerifierReward(Verifier, RewardSection):
    """1 for an answer that agrees with the key of its query (data.answer_column), 0 otherwise."""

    kind: Literal["verifier"]


class MajorityReward(RewardSection):
    """1 for an answer that agrees with most answers to its query, 0 otherwise; needs no key."""

    kind: Literal["majority"]
    method: Literal["math", "exact", "regex"] = Field(
        "math",
        description="What of an answer is compared: its last mathematical expression (math-verify),"
        " all of it, or the first group of `pattern`.",
    )
    pattern: str | None = Field(None, description="Python regular expression of method `regex`.")
    timeout_s: PositiveFloat = Field(
        10.0, description="Seconds after which a comparison is killed and counts as unequal."
    )
    workers: PositiveInt | None = Field(
        None, description="Comparisons that run at once; by default one for each CPU core."
    )

    @pydantic.model_validator(mode="after")
    def _agree(self) -> MajorityReward:
        _check_pattern(self.method, self.pattern)
        return self


class JudgeReward(RewardSection):
    """A language model's score over an OpenAI-compatible endpoint, divided by `max_score`."""

    kind: Literal["judge"]
    base_url: Name = Field(description="The endpoint, such as https://api.openai.com/v1.")
    model: Name = Field(description="The judge's name at the endpoint.")
    api_key_env: Name = Field(
        "OPENAI_API_KEY",
        description="Environment variable that holds the key; the key itself is never written.",
    )
    prompt: str = Field(
        "default",
        description="`default`, or a text file in which {query}, {answer} and {max_score} are"
        ' replaced; it asks for a reply with {"score": NUMBER}.',
    )
    max_score: PositiveFloat = Field(10.0, description="Highest score; the lowest is 0.")
    temperature: NonNegativeFloat = Field(0.0, description="The judge's temperature.")
    max_tokens: PositiveInt = Field(512, description="Longest reply of the judge.")
    concurrency: PositiveInt = Field(16, description="Requests in flight at once.")
    timeout_s: PositiveFloat = Field(60.0, description="Seconds after which a request is given up.")
    retries: NonNegativeInt = Field(
        6,
        description="Times a request is repeated, with growing pauses, after 408, 429, 5xx, a time-out,"
        " a lost connection, broken JSON or a reply without a score; after the last one the run"
        " pauses, resumable, or if it is the reply of one pair alone that pair takes a mean.",
    )
    cache: str | None = Field(
        None,
        description="File that keeps replies, so that none is paid for twice; by default in the"
        " user's cache folder.",
    )
    usd_per_million_input_tokens: NonNegativeFloat = Field(0.0, description="Price, for the count.")
    usd_per_million_output_tokens: NonNegativeFloat = Field(
        0.0, description="Price, for the count."
    )


Reward = Annotated[
    ArenaReward | PythonReward | RewardModelReward | VerifierReward | MajorityReward | JudgeReward,
    Field(discriminator="kind"),
]


def _check_pattern(method: str, pattern: str | None) -> None:
    if (method == "regex") != (pattern is not None):
        wanted = "needs a pattern" if pattern is None else "reads no pattern; leave it out"
        raise ValueError(f'method = "{method}" {wanted}')
    try:
        compiled = re.compile(pattern or "")
    except re.error as error:
        raise ValueError(f"pattern = {pattern!r}: no regular expression ({error})") from None
    if pattern is not None and compiled.groups < 1:
        raise ValueError(f"pattern = {pattern!r}: has no group; put what is compared in (…)")
