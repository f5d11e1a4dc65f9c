"""Every setting, as one frozen tree: `Config.from_recipe`, `Config.from_table`, `config.to_toml()`.

A configuration is read from TOML, merged with command-line overrides as a plain table, and
validated once, as a whole. Each mistake is reported as one sentence that names the field, and an
unknown name with the nearest known one. Defaults are the paper's (arXiv 2509.07414, Appendix C)
where it gives them; "our choice" marks what it does not say.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pydantic
import tomli_w
from pydantic import BaseModel, ConfigDict, Field

from language_self_play.errors import ConfigError, InputFileError

# Strict: true is no number, and "5" neither.
PositiveInt = Annotated[int, Field(strict=True, gt=0)]
NonNegativeInt = Annotated[int, Field(strict=True, ge=0)]
AtLeastTwo = Annotated[int, Field(strict=True, ge=2)]
Float = Annotated[float, Field(strict=True)]
PositiveFloat = Annotated[float, Field(strict=True, gt=0.0)]
NonNegativeFloat = Annotated[float, Field(strict=True, ge=0.0)]
Nucleus = Annotated[float, Field(strict=True, gt=0.0, le=1.0)]
Decay = Annotated[float, Field(strict=True, ge=0.0, lt=1.0)]
Name = Annotated[str, Field(min_length=1)]
Texts = str | Annotated[list[str], Field(min_length=1)]


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


class Policy(Section):
    path: Name = Field(
        description="The model: a folder, a hub id, or `arena` for the built-in tiny model."
    )
    chat_template: str | None = Field(
        None, description="A Jinja file to use in place of the tokenizer's chat template."
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Extra variables for the chat template."
    )


class Challenger(Sampling):
    prompt: str = Field(
        "default",
        description="The challenger prompt: `default` (the paper's structure, our wording), `arena`,"
        " or a text file in which {task} and {template} are replaced.",
    )
    task: Texts = Field(
        "", description="Name of the task to pose; of several, one (task, template) pair a step."
    )
    template: Texts = Field(
        "", description="Output template with {placeholders} that a valid query fills."
    )
    num_queries: AtLeastTwo = Field(
        8, description="N, queries a step: posed, or in GRPO from the file."
    )
    alpha: NonNegativeFloat = Field(
        1.0, description="α_Ch, weight of the Challenger's loss. Our choice."
    )
    max_tokens: PositiveInt = Field(256, description="Longest query, in tokens. Our choice.")
    beta: NonNegativeFloat = Field(0.05, description="β, weight of the KL to the reference.")


class Solver(Sampling):
    group_size: AtLeastTwo = Field(8, description="G, answers to each query. Our choice.")
    system_prompt: str | None = Field(
        None, description="System message before the query; the paper has none."
    )
    max_tokens: PositiveInt = Field(1024, description="Longest answer, in tokens. Our choice.")
    beta: NonNegativeFloat = Field(0.05, description="β, weight of the KL to the reference.")
    truncated: Literal["keep", "mask", "penalize"] = Field(
        "keep",
        description="Answers cut off by max_tokens: learned from like others, left out of the loss,"
        " or learned from with truncation_penalty subtracted from their reward. Our choice.",
    )
    truncation_penalty: NonNegativeFloat = Field(
        1.0,
        description="What `penalize` subtracts; it moves the Solver's advantage only, not V(q).",
    )


class SelfReward(Section):
    mode: Literal["generate", "expected", "criteria"] = Field(
        "generate",
        description="How the reference scores quality 0 to 7: by writing (the paper's way), by the"
        " expected score in one forward pass, or by the sum of seven probabilities of yes.",
    )
    weight: NonNegativeFloat = Field(
        1.0, description="What R_Q is multiplied with; the paper adds it unscaled."
    )
    rubric: str = Field(
        "default",
        description="The judge's instructions: `default` (the paper's structure, our wording),"
        " `arena`, or a text file in which {query} and {answer} are replaced.",
    )
    max_tokens: PositiveInt = Field(
        300, description="Longest reply of the judge in mode `generate`. Our choice."
    )
    temperature: PositiveFloat = Field(
        1.0, description="Temperature of the judge in mode `generate`. Our choice."
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
        description="`module:function`; one number for each (query, answer) pair."
    )


Reward = Annotated[ArenaReward | PythonReward, Field(discriminator="kind")]


class Learner(Section):
    lr: PositiveFloat | None = Field(
        None,
        description="Learning rate of AdamW; unset it is the paper's, 3e-6 for lsp and lsp-zero and"
        " 1e-6 for grpo.",
    )
    betas: tuple[Decay, Decay] = Field(
        (0.9, 0.999), description="AdamW's moment decays. Our choice."
    )
    weight_decay: NonNegativeFloat = Field(0.0, description="AdamW's weight decay. Our choice.")
    max_grad_norm: PositiveFloat = Field(
        1.0, description="Gradients are clipped to this norm. Our choice."
    )
    kl: Literal["k1", "k2", "k3", "reward"] = Field(
        "k3",
        description="KL term: k3 (GRPO's), k2, k1 (as printed in the paper; no pull on average), or"
        " `reward` (folded into the reward).",
    )
    aggregation: Literal["sequence", "sequence_mean", "token_mean"] = Field(
        "sequence",
        description="Token terms: summed over a completion (the paper), averaged over it, or"
        " averaged over all tokens.",
    )
    tokens_per_micro_batch: PositiveInt = Field(
        16_384, description="Tokens of one forward and backward pass; changes memory, not results."
    )


class Rollout(Section):
    batch_size: PositiveInt = Field(
        256, description="Completions decoded at once; changes memory and speed, not results."
    )


class Data(Section):
    path: str | None = Field(
        None,
        description="JSONL file of queries for `grpo`, or `arena` for the built-in 1,000 human ones.",
    )
    column: str = Field("prompt", description="Name of the column that holds the query.")


class Eval(Section):
    tasks: list[Literal["arena"]] = Field(
        default_factory=list,
        description="What to evaluate while training: held-out arena questions.",
    )
    every: PositiveInt = Field(50, description="Steps between evaluations; first and last always.")


class Checkpoint(Section):
    every: PositiveInt = Field(100, description="Steps between checkpoints; the last step always.")
    keep_last: PositiveInt = Field(2, description="Checkpoints kept; older ones are removed.")


class Log(Section):
    progress: Literal["auto", "bar", "plain", "none"] = Field(
        "auto", description="A live bar on a terminal, plain lines elsewhere, or nothing."
    )
    game_every_s: NonNegativeFloat = Field(
        5.0, description="Seconds between games shown while it runs; 0 shows none."
    )


class Config(Section):
    """A whole run."""

    algorithm: Literal["lsp", "lsp-zero", "grpo"] = Field(
        "lsp",
        description="The game with quality self-reward, the zero-sum game without it, or its"
        " Solver's half on a fixed set of queries.",
    )
    steps: PositiveInt = Field(1500, description="Optimizer steps S.")
    seed: NonNegativeInt = Field(
        0, lt=2**31, description="Every random draw is a function of it and the step."
    )
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$",
        description="`auto`, `cpu`, `cuda`, `cuda:N` or `mps`.",
    )
    threads: PositiveInt | None = Field(
        None, description="CPU threads; by default what torch chooses, then kept for the run."
    )
    policy: Policy
    challenger: Challenger = Challenger()
    solver: Solver = Solver()
    self_reward: SelfReward = SelfReward()
    reward: dict[str, Reward] = Field(
        default_factory=dict, description="Rewards by name; R(q, a) is their weighted sum."
    )
    learner: Learner = Learner()
    rollout: Rollout = Rollout()
    data: Data = Data()
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()

    @pydantic.model_validator(mode="after")
    def _agree(self) -> Config:
        if not self.reward:
            raise ValueError(
                "reward: no reward is configured; add a table such as [reward.main] with"
                ' kind = "python" and function = "module:function"'
            )
        if self.algorithm == "grpo" and self.data.path is None:
            raise ValueError(
                'data.path: algorithm = "grpo" learns from a fixed set of queries; name a JSONL'
                ' file, or use "lsp", which poses its own'
            )
        if self.algorithm != "grpo" and self.data.path is not None:
            raise ValueError(
                f'data.path = {self.data.path!r}: only algorithm = "grpo" learns from a file of'
                f' queries; "{self.algorithm}" poses its own, so leave it out'
            )
        tasks, templates = as_list(self.challenger.task), as_list(self.challenger.template)
        if len(tasks) != len(templates):
            raise ValueError(
                f"challenger.template: {len(templates)} given for {len(tasks)} challenger.task;"
                " give one template for each task"
            )
        return self

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> Config:
        """Validate a nested table of settings. Raises ConfigError with one sentence a mistake."""
        try:
            return cls.model_validate(table)
        except pydantic.ValidationError as error:
            raise ConfigError("\n".join(_sentences(error))) from None

    @classmethod
    def from_recipe(cls, recipe: str | os.PathLike[str], **overrides: Any) -> Config:
        """Read a TOML file or a shipped recipe; `overrides` are nested tables merged into it.

        Raises InputFileError for a file that can't be read, ConfigError for what it says.
        """
        return cls.from_table(merge(load_recipe(recipe), overrides))

    def to_toml(self) -> str:
        """This configuration as TOML, every field written out, unset optionals left out."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))

    @property
    def lr(self) -> float:
        """learner.lr, or the paper's for the algorithm (Appendix C)."""
        return self.learner.lr or (1e-6 if self.algorithm == "grpo" else 3e-6)

    @property
    def needs_reference(self) -> bool:
        """Whether the frozen initial model is used: for a KL term or for the self-reward."""
        betas = [self.solver.beta]
        if self.algorithm != "grpo":
            betas.append(self.challenger.beta)
        return any(betas) or self.algorithm == "lsp"


def as_list(value: Texts) -> list[str]:
    return [value] if isinstance(value, str) else value


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package."""
    folder = resources.files("language_self_play") / "recipes"
    return sorted(
        f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml")
    )


def recipe_text(recipe: str | os.PathLike[str]) -> str:
    """The TOML text of a shipped recipe or of a file. Raises InputFileError."""
    path = Path(recipe)
    if os.fspath(recipe) in recipe_names():
        shipped = resources.files("language_self_play") / "recipes" / f"{recipe}.toml"
        return shipped.read_text("utf-8")
    if path.suffix != ".toml" and not os.path.lexists(path):
        raise InputFileError(
            f"{recipe}: no such recipe or file; shipped recipes are {', '.join(recipe_names())}"
        )
    return read_text(path)


def load_recipe(recipe: str | os.PathLike[str]) -> dict[str, Any]:
    """The table of a recipe. Raises InputFileError."""
    text = recipe_text(recipe)
    if not text.strip():
        raise InputFileError(
            f"{recipe}: the file is empty; `lsp recipes show arena` shows a whole one"
        )
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputFileError(f"{recipe}: not valid TOML: {error}") from None


def read_text(path: Path, setting: str | None = None) -> str:
    """The text of a file that the user named, in `setting`. Raises InputFileError."""
    named = f"{setting} = {os.fspath(path)!r}" if setting else f"{path}"
    try:
        return path.read_text("utf-8")
    except FileNotFoundError:
        raise InputFileError(f"{named}: no such file") from None
    except IsADirectoryError:
        raise InputFileError(f"{named}: is a folder; a file is needed") from None
    except UnicodeDecodeError:
        raise InputFileError(f"{named}: not a text file in UTF-8") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputFileError(f"{named}: can't be read ({reason})") from None


def merge(table: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`table` with the leaves of `overrides` laid over it."""
    merged = dict(table)
    for key, value in overrides.items():
        below = merged.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            value = merge(below, value)
        merged[key] = value
    return merged


def parse_override(name: str, value: str) -> dict[str, Any]:
    """The nested table for a flag `--name value`: a TOML value, or text where text is wanted."""
    *sections, leaf = name.split(".")
    as_text = _wants_text(name) and not value.startswith("[")
    table: dict[str, Any] = {leaf: value if as_text else _toml_value(value)}
    for section in reversed(sections):
        table = {section: table}
    return table


def _toml_value(value: str) -> Any:
    try:
        return tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return value


def _wants_text(name: str) -> bool:
    for field in fields():
        if field.name == name:
            return field.type.split(" | ")[0] == "text"
    return False


class FieldInfo(pydantic.BaseModel):
    """One setting as `lsp config` lists it."""

    name: str
    annotation: Any
    type: str
    default: Any
    required: bool
    description: str


def fields(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[FieldInfo]:
    """Every setting, in order, with dotted names; rewards as `reward.NAME.field`."""
    for name, field in section.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, Section):
            yield from fields(annotation, f"{prefix}{name}.")
        elif name == "reward":
            seen: set[str] = set()
            for kind in get_args(get_args(Reward)[0]):
                for info in fields(kind, "reward.NAME."):
                    if info.name == "reward.NAME.kind":
                        continue
                    if info.name not in seen:
                        seen.add(info.name)
                        yield info
        else:
            yield FieldInfo(
                name=prefix + name,
                annotation=annotation,
                type=type_name(annotation),
                default=None
                if field.is_required()
                else field.get_default(call_default_factory=True),
                required=field.is_required(),
                description=field.description or "",
            )


def reward_kinds() -> dict[str, str]:
    """Kind -> what it is, for every reward that can be configured."""
    kinds = get_args(get_args(Reward)[0])
    return {
        get_args(k.model_fields["kind"].annotation)[0]: (k.__doc__ or "").strip() for k in kinds
    }


def type_name(annotation: Any) -> str:
    """A type as a person would write it: `float`, `text`, `"a" | "b"`, `list of text`."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(f'"{a}"' for a in args)
    if origin is Annotated:
        return type_name(args[0])
    if origin in (Union, UnionType):
        return " | ".join(type_name(a) for a in args if a is not NoneType)
    if origin in (list, tuple):
        return f"list of {type_name(args[0])}"
    if origin is dict:
        return "table"
    return {str: "text", int: "int", float: "float", bool: "true | false"}.get(
        annotation, str(annotation)
    )


# ---------------------------------------------------------------- error sentences


def _sentences(error: pydantic.ValidationError) -> list[str]:
    """One sentence for each mistake; the branches of a union are one mistake."""
    by_name: dict[str, str] = {}
    for problem in error.errors(include_url=False):
        name, sentence = _sentence(problem)
        by_name.setdefault(name or sentence, sentence)
    return list(by_name.values())


def _sentence(problem: Mapping[str, Any]) -> tuple[str, str]:
    """(name of the setting, what is wrong with it)."""
    # Unions put their branch into the location (a kind, or a type); the user never typed it there.
    location = [str(part) for part in problem["loc"]]
    if location[:1] == ["reward"] and len(location) > 2:
        del location[2]
    branches = [part for part in location if part == "str" or part.startswith("list[")]
    if branches:
        location = location[: location.index(branches[0])]
    name = ".".join(location)
    given = repr(problem["input"])
    match problem["type"]:
        case "extra_forbidden":
            sentence = _unknown_name(name, location)
        case "missing":
            sentence = f"{name}: missing; it has no default ({_description(location)})"
        case "value_error":
            sentence = str(problem["ctx"]["error"])
        case "union_tag_invalid" | "union_tag_not_found":
            kind = problem["input"].get("kind") if isinstance(problem["input"], dict) else None
            shown = f"{kind!r} is unknown" if kind else "missing"
            sentence = f"{name}.kind: {shown}; one of {', '.join(reward_kinds())}"
        case "model_type" | "dict_type" | "model_attributes_type":
            sentence = f"{name} = {given}: must be a table, such as [{name}]"
        case "string_type" | "list_type" | "too_short" if branches:
            sentence = f"{name} = {given}: must be text or a list of at least one text"
        case "string_pattern_mismatch":
            sentence = f"{name} = {given}: must be one of: {_description(location)}"
        case _:
            reason = problem["msg"].removeprefix("Input ").replace("should", "must")
            sentence = f"{name} = {given}: {reason}"
    return name, sentence


def _unknown_name(name: str, location: list[str]) -> str:
    *sections, leaf = location
    if location[0] == "reward":
        sections = ["reward", "NAME"]
    prefix = "".join(f"{s}." for s in sections)
    known = {
        f.name.removeprefix(prefix).split(".")[0] for f in fields() if f.name.startswith(prefix)
    }
    if not sections:
        known |= set(Config.model_fields)
    if near := difflib.get_close_matches(leaf, sorted(known), n=1):
        hint = f"did you mean {'.'.join([*location[:-1], near[0]])}?"
    elif elsewhere := difflib.get_close_matches(
        leaf, [f.name.rsplit(".", 1)[-1] for f in fields()], n=1
    ):
        full = next(f.name for f in fields() if f.name.rsplit(".", 1)[-1] == elsewhere[0])
        hint = f"did you mean {full}?"
    else:
        hint = "`lsp config` lists every setting"
    return f"{name}: no such setting; {hint}"


def _description(location: list[str]) -> str:
    if location[0] == "reward":
        location = ["reward", "NAME", *location[2:]]
    known = {f.name: f.description for f in fields()}
    return known.get(".".join(location), "`lsp config` lists every setting").rstrip(".")
