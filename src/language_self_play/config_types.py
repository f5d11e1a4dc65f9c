"""What the tables of settings are made of: strict numbers, frozen sections, what several of them share."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

# Strict: true is no number, and "5" neither.
PositiveInt = Annotated[int, Field(strict=True, gt=0)]
NonNegativeInt = Annotated[int, Field(strict=True, ge=0)]
AtLeastTwo = Annotated[int, Field(strict=True, ge=2)]
Float = Annotated[float, Field(strict=True)]
PositiveFloat = Annotated[float, Field(strict=True, gt=0.0)]
NonNegativeFloat = Annotated[float, Field(strict=True, ge=0.0)]
Nucleus = Annotated[float, Field(strict=True, gt=0.0, le=1.0)]
Decay = Annotated[float, Field(strict=True, ge=0.0, lt=1.0)]
Flag = Annotated[bool, Field(strict=True)]
Name = Annotated[str, Field(min_length=1)]
Texts = str | Annotated[list[str], Field(min_length=1)]

DEVICE = r"^(auto|cpu|mps|cuda(:\d+)?)$"


class Section(BaseModel):
    """A frozen table of settings; unknown names are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Sampling(Section):
    """How one role's completions are drawn."""

    temperature: PositiveFloat = Field(
        1.0, description="Sampling temperature τ; log-probs are of softmax(logits / τ). Our choice."
    )
    top_p: Nucleus = Field(
        1.0,
        description="Nucleus of the distribution that is sampled from; below 1 biases the gradient.",
    )
    top_k: NonNegativeInt = Field(
        0, description="Tokens sampled from, 0 for all; above 0 biases the gradient."
    )


# With one token to draw from, the temperature is of no account.
GREEDY = Sampling(top_k=1)


class Table(Section):
    """Where rows come from, and which of their columns are read."""

    path: str | None = None
    subset: str | None = Field(None, description="Configuration of a hub data set, such as `main`.")
    split: str = Field("train", description="Split of a data set with several.")
    column: str | None = Field(
        None,
        description="Column that holds the query; by default the first of `prompt`, `query`,"
        " `question`, `instruction` (with Alpaca's `input`), `messages` and `problem`.",
    )
    answer_column: str | None = None
