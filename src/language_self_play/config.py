"""Every setting, as one frozen tree: `Config.from_recipe`, `Config.from_table`, `config.to_toml()`.

A configuration is read from TOML (recipe_files.py), merged with command-line overrides as a plain
table, and validated once, as a whole. Each mistake is reported as one sentence that names the field,
and an unknown name with the nearest known one (settings.py). Defaults are the paper's
(arXiv 2509.07414, Appendix C) where it gives them; "our choice" marks what it does not say.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal
from urllib.parse import urlsplit

import pydantic
import tomli_w
from pydantic import Field

from language_self_play.config_evaluation import Eval as Eval
from language_self_play.config_evaluation import Harness as Harness
from language_self_play.config_evaluation import QuestionSet as QuestionSet
from language_self_play.config_evaluation import WinRateSet as WinRateSet
from language_self_play.config_rewards import ArenaReward as ArenaReward
from language_self_play.config_rewards import JudgeReward as JudgeReward
from language_self_play.config_rewards import MajorityReward as MajorityReward
from language_self_play.config_rewards import PythonReward as PythonReward
from language_self_play.config_rewards import Reward as Reward
from language_self_play.config_rewards import RewardModelReward as RewardModelReward
from language_self_play.config_rewards import Verifier as Verifier
from language_self_play.config_rewards import VerifierReward as VerifierReward
from language_self_play.config_types import (
    DEVICE,
    AtLeastTwo,
    Decay,
    Flag,
    Name,
    NonNegativeFloat,
    NonNegativeInt,
    Nucleus,
    PositiveFloat,
    PositiveInt,
    Sampling,
    Section,
    Table,
    Texts,
)
from language_self_play.config_types import GREEDY as GREEDY
from language_self_play.errors import ConfigError
from language_self_play.recipe_files import load_recipe, merge, recipe_names
from language_self_play.settings import sentences

IMPORTANCE_CAP = 2.0
# Of adapters, as vLLM 0.32 may be told of the largest.
VLLM_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# Of [rollout.vllm], what a server that runs already has been given at its own start.
OF_OWN_ENGINE = (
    *("python", "devices", "tensor_parallel", "kv_cache_gib", "eager", "memory_fraction", "sleep"),
)
# Below, vLLM 0.32 samples at the lowest without saying so; above, it refuses.
VLLM_TEMPERATURES = (0.01, 2.0)


class Lora(Section):
    """Low-rank adapters: only they are trained, and with them off the model is the reference."""

    rank: PositiveInt = Field(16, description="Rank r of each adapter. Our choice.")
    alpha: PositiveFloat = Field(
        32.0, description="Scale α: an adapter's output is multiplied with α / r. Our choice."
    )
    targets: Texts = Field(
        "all-linear",
        description="Modules that get an adapter: names or endings of names, or `all-linear`, every"
        " linear layer but the output embedding.",
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
    trust_remote_code: Flag = Field(
        False, description="Run the Python code that the model's authors ship with its weights."
    )
    lora: Lora | None = Field(None, description="Train low-rank adapters instead of all weights.")


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
    objective: Literal["hardness", "learnability", "spread", "uncertainty"] = Field(
        "hardness",
        description="What a query earns beside V_Q: -V (the paper's), 4p(1-p), the standard deviation"
        " of its answers' R, or 1-2|p-1/2|, p = V; the second and fourth need R from 0 to 1.",
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
    optimizer: Literal["adamw", "adamw_fused", "adamw_8bit"] = Field(
        "adamw",
        description="AdamW of torch, its fused form (one kernel for all weights), or with moments of 8"
        " bits (bitsandbytes). Our choice.",
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant",
        description="Learning rate after the warm-up: as it is, or falling to 0 where the run ends, in"
        " a line or half a cosine. Our choice.",
    )
    warmup_steps: NonNegativeInt = Field(
        0, description="Steps over which the learning rate rises from 0 in a line. Our choice."
    )
    gradient_checkpointing: Flag = Field(
        False,
        description="Keep only the layers' inputs for the backward pass and compute the rest again:"
        " less memory, more time, same results.",
    )
    kl: Literal["k1", "k2", "k3", "reward"] = Field(
        "k3",
        description="KL term: k3 (GRPO's), k2, k1 (as printed in the paper; no pull on average), or"
        " `reward` (folded into the reward).",
    )
    importance_cap: NonNegativeFloat | None = Field(
        None,
        description="Token terms are weighted by min(π_trainer / π_sampler, this cap), for a sampler"
        " whose log-probs are not quite the trainer's; 0 weights nothing. Unset, 2 with vLLM and 0 with"
        " transformers, whose ratio is 1. Our choice.",
    )
    aggregation: Literal["sequence", "sequence_mean", "token_mean"] = Field(
        "sequence",
        description="Token terms: summed over a completion (the paper), averaged over it, or"
        " averaged over all tokens.",
    )
    tokens_per_micro_batch: PositiveInt = Field(
        16_384,
        description="Tokens of one forward and backward pass; changes memory and speed, not results.",
    )


class Vllm(Section):
    """The vLLM engine; docs/vllm.md says how it is installed and what it was tested with."""

    server: Name | None = Field(
        None,
        description="Address of a server that `lsp vllm-serve` has started, such as http://host:8000; unset,"
        " each rank of the run starts an engine of its own.",
    )
    api_key_env: Name = Field(
        "VLLM_API_KEY",
        description="Environment variable that holds the server's key; the key itself is never written.",
    )
    server_wait_s: NonNegativeFloat = Field(
        300.0,
        description="Seconds that a server which goes away while the run plays is waited for, once a step.",
    )
    python: Name | None = Field(
        None, description="The Python that has vLLM; unset, the one that plays the run."
    )
    devices: str | None = Field(
        None,
        description="The engine's CUDA_VISIBLE_DEVICES, such as `1` or `2,3`; unset, it sees the GPUs"
        " that the run sees.",
    )
    tensor_parallel: PositiveInt = Field(1, description="GPUs that share the engine's weights.")
    context: PositiveInt | None = Field(
        None,
        description="Longest prompt with its completion, in tokens; unset, the model's context, for"
        " which the engine must have room.",
    )
    memory_fraction: Nucleus = Field(
        0.4,
        description="Share of the memory of its device, a GPU or the host, that the engine may take."
        " Our choice.",
    )
    kv_cache_gib: PositiveFloat | None = Field(
        None,
        description="Memory for keys and values, in GiB; unset, what memory_fraction leaves for them.",
    )
    sleep: Flag = Field(
        True,
        description="Whether the engine gives its GPU memory back while the policy learns; false where"
        " it has GPUs of its own.",
    )
    eager: Flag | None = Field(
        None, description="No compilation and no CUDA graphs; unset, so on CPUs and not on GPUs."
    )
    transfer_folder: Name | None = Field(
        None,
        description="Where weights lie on their way to the engine; unset, /dev/shm if it exists.",
    )
    timeout_s: PositiveFloat = Field(
        900.0, description="Seconds after which an engine that does not reply counts as dead."
    )
    max_logprob_difference: PositiveFloat = Field(
        0.1,
        description="Mean difference, in nats a token, between the sampler's and the trainer's"
        " log-probs past which the run stops: well above bfloat16's rounding, well below what wrong"
        " weights do (docs/vllm.md). Our choice.",
    )


class Rollout(Section):
    engine: Literal["transformers", "vllm"] = Field(
        "transformers",
        description="What samples: the policy itself, in this process, or vLLM in one of its own.",
    )
    batch_size: PositiveInt = Field(
        256, description="Completions decoded at once; changes memory and speed, not results."
    )
    vllm: Vllm = Vllm()


class Data(Table):
    path: str | None = Field(
        None,
        description="Queries for `grpo`: a JSONL file, a file or folder that `datasets` reads, a hub"
        " id, or `arena` for the built-in 1,000 human ones.",
    )
    answer_column: str | None = Field(
        None, description="Column that holds the key by which a verifier checks answers."
    )


class Checkpoint(Section):
    every: PositiveInt = Field(100, description="Steps between checkpoints; the last step always.")
    keep_last: PositiveInt = Field(2, description="Checkpoints kept; older ones are removed.")
    keep_every: PositiveInt | None = Field(
        None, description="Checkpoints whose step is a multiple of it are never removed."
    )


class Guard(Section):
    """When a run that goes wrong stops, and how fast one that is asked to."""

    max_skipped: PositiveInt = Field(
        3,
        description="Updates in a row that are skipped, because a number in them is not finite, before"
        " the run stops. Our choice.",
    )
    stop_within_s: NonNegativeFloat = Field(
        0.0,
        description="Seconds after Ctrl-C or SIGTERM at which the step that is played is abandoned, to"
        " be played again on resume; 0 finishes it, however long it takes.",
    )


class Distributed(Section):
    """How the processes that torchrun starts share a run; of no effect on one process."""

    parallel: Literal["replicate", "fsdp"] = Field(
        "replicate",
        description="Each rank holds the whole model, its reference and optimizer, or a shard of them"
        " (FSDP2), gathered layer by layer in learning and as a whole once a step for sampling.",
    )
    cpu_offload: Flag = Field(
        False,
        description="With `fsdp`, shards and optimizer lie in the host's memory, and what computes comes"
        " to the GPU: less GPU memory, more time.",
    )
    timeout_s: PositiveFloat = Field(
        1800.0,
        description="Seconds that a rank waits for the others, such as while the first asks a judge,"
        " before it gives the run up.",
    )


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
        pattern=DEVICE,
        description="`auto`, `cpu`, `cuda`, `cuda:N` or `mps`; auto is CUDA, else MPS, else the CPU, and is"
        " then kept for the run.",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Type in which the model computes; auto is bfloat16 on GPUs that have it, else"
        " float32. Weights that are trained keep a float32 copy.",
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
    guard: Guard = Guard()
    distributed: Distributed = Distributed()
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
        for name, reward in self.reward.items():
            if not isinstance(reward, VerifierReward) or reward.method == "regex":
                continue
            if self.data.answer_column is None:
                raise ValueError(
                    f'reward.{name}: method = "{reward.method}" compares with a key; name the column'
                    " that holds it in data.answer_column (self-posed queries have no key:"
                    ' kind = "majority" does without)'
                )
        if self.distributed.parallel == "fsdp":
            for setting, conflicts, instead in (
                (
                    'learner.optimizer = "adamw_8bit"',
                    self.learner.optimizer == "adamw_8bit",
                    'use "adamw" or "adamw_fused"',
                ),
                (
                    "guard.stop_within_s",
                    self.guard.stop_within_s > 0,
                    "leave it at 0: a checkpoint takes all ranks, so no rank can abandon a step alone",
                ),
            ):
                if conflicts:
                    raise ValueError(
                        f'distributed.parallel = "fsdp": does not go together with {setting}; {instead}'
                    )
        elif self.distributed.cpu_offload:
            raise ValueError(
                'distributed.cpu_offload: is for shards; set distributed.parallel = "fsdp", or leave it'
                " out"
            )
        if self.learner.warmup_steps >= self.steps > 1:
            raise ValueError(
                f"learner.warmup_steps = {self.learner.warmup_steps}: the run has only {self.steps}"
                " steps, so it would be over before the learning rate is reached"
            )
        if self.algorithm != "grpo" and self.data.path is not None:
            raise ValueError(
                f'data.path = {self.data.path!r}: only algorithm = "grpo" learns from a file of'
                f' queries; "{self.algorithm}" poses its own, so leave it out'
            )
        if self.rollout.engine == "vllm":
            self._agree_with_vllm()
        tasks, templates = as_list(self.challenger.task), as_list(self.challenger.template)
        if len(tasks) != len(templates):
            raise ValueError(
                f"challenger.template: {len(templates)} given for {len(tasks)} challenger.task;"
                " give one template for each task"
            )
        return self

    def _agree_with_vllm(self) -> None:
        vllm = self.rollout.vllm
        if vllm.server is not None:
            _check_address(vllm.server)
            if given := [n for n in OF_OWN_ENGINE if getattr(vllm, n) != getattr(Vllm(), n)]:
                raise ValueError(
                    f"rollout.vllm.{given[0]}: is for an engine that the run starts, and rollout.vllm.server"
                    f" = {vllm.server!r} runs already; give it to `lsp vllm-serve`, and leave it out here"
                )
        named = vllm.tensor_parallel if vllm.devices is None else len(vllm.devices.split(","))
        if named < vllm.tensor_parallel:
            raise ValueError(
                f"rollout.vllm.tensor_parallel = {vllm.tensor_parallel}: more than rollout.vllm.devices ="
                f" {vllm.devices!r} names; name as many for each rank, or lower it"
            )
        if self.policy.lora is not None and self.policy.lora.rank > VLLM_LORA_RANKS[-1]:
            raise ValueError(
                f"policy.lora.rank = {self.policy.lora.rank}: vLLM takes at most {VLLM_LORA_RANKS[-1]}; lower"
                ' it, or use rollout.engine = "transformers"'
            )
        sampled: dict[str, Sampling | SelfReward] = {"solver": self.solver}
        if self.algorithm != "grpo":
            sampled["challenger"] = self.challenger
        if self.algorithm == "lsp" and self.policy.lora is not None:
            sampled["self_reward"] = self.self_reward
        low, high = VLLM_TEMPERATURES
        asked: dict[str, Sampling] = {
            **{f"eval.accuracy.{n}": questions for n, questions in self.eval.accuracy.items()},
            **{f"eval.win_rate.{n}": prompts for n, prompts in self.eval.win_rate.items()},
        }
        for name, drawn in asked.items():
            if drawn.temperature and not low <= drawn.temperature <= high:
                raise ValueError(
                    f"{name}.temperature = {drawn.temperature}: vLLM samples at {low} to {high}, or"
                    ' greedily at 0; choose one of those, or rollout.engine = "transformers"'
                )
        for name, section in sampled.items():
            if not low <= section.temperature <= high:
                raise ValueError(
                    f"{name}.temperature = {section.temperature}: vLLM samples at {low} to {high} only;"
                    ' choose one of those, or rollout.engine = "transformers"'
                )
            if isinstance(section, Sampling) and (section.top_p < 1 or section.top_k > 0):
                raise ValueError(
                    f"{name}.top_p = {section.top_p}, {name}.top_k = {section.top_k}: vLLM gives"
                    " log-probs of the distribution that they cut, and the trainer needs those of the"
                    ' whole one; use top_p = 1 and top_k = 0, or rollout.engine = "transformers"'
                )

    @classmethod
    def from_table(
        cls,
        table: Mapping[str, Any],
        overrides: Mapping[str, Any] | None = None,
        file: str | os.PathLike[str] | None = None,
    ) -> Config:
        """Validate a nested table of settings, with `overrides` laid over it.

        Raises ConfigError with one sentence a mistake, which names `file`, where the table comes from,
        if the mistake is the table's own.
        """
        try:
            return cls.model_validate(merge(table, overrides or {}))
        except pydantic.ValidationError as error:
            mistakes = sentences(error, cls)
        if file is not None:
            try:
                cls.model_validate(table)
            except pydantic.ValidationError as error:
                its_own = sentences(error, cls)
                mistakes = [f"{m} (in {os.fspath(file)})" if m in its_own else m for m in mistakes]
        raise ConfigError("\n".join(mistakes))

    @classmethod
    def from_recipe(cls, recipe: str | os.PathLike[str], /, **overrides: Any) -> Config:
        """Read a TOML file or a shipped recipe; `overrides` are nested tables merged into it.

        Raises InputFileError for a file that can't be read, ConfigError for what it says.
        """
        file = None if os.fspath(recipe) in recipe_names() else recipe
        return cls.from_table(load_recipe(recipe), overrides, file)

    def to_toml(self) -> str:
        """This configuration as TOML, every field written out, unset optionals left out."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))

    @property
    def lr(self) -> float:
        """learner.lr, or the paper's for the algorithm (Appendix C)."""
        return self.learner.lr or (1e-6 if self.algorithm == "grpo" else 3e-6)

    @property
    def importance_cap(self) -> float:
        """learner.importance_cap, or the engine's default; 0 for no weights."""
        if self.learner.importance_cap is not None:
            return self.learner.importance_cap
        return IMPORTANCE_CAP if self.rollout.engine == "vllm" else 0.0

    @property
    def needs_reference(self) -> bool:
        """Whether the frozen initial model is used: for a KL term or for the self-reward."""
        betas = [self.solver.beta]
        if self.algorithm != "grpo":
            betas.append(self.challenger.beta)
        return any(betas) or self.algorithm == "lsp"


def _check_address(address: str) -> None:
    try:
        parts = urlsplit(address)
        host = parts.hostname if parts.port != 0 else None  # reading the port checks it
    except ValueError:
        parts, host = urlsplit(""), None
    if parts.username is not None:
        raise ValueError(
            "rollout.vllm.server: holds a user name or password, which would be written to the run's"
            " config.toml; give the key in the environment, by api_key_env"
        )
    if parts.scheme not in ("http", "https") or not host or parts.path.strip("/") or parts.query:
        raise ValueError(
            f"rollout.vllm.server = {address!r}: must be an address without a path, such as"
            " http://host:8000"
        )


def as_list(value: Texts) -> list[str]:
    return [value] if isinstance(value, str) else value


def with_other_engine(table: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`table`, whose run had another engine, without what does not go with the one that `overrides` name.

    Settings of an engine of its own, where a server is named; the server, where one of those is.
    """
    given, before = _vllm_of(overrides), _vllm_of(table)
    if given.get("server") is not None:
        gone: tuple[str, ...] = OF_OWN_ENGINE
    else:
        gone = ("server",) if set(given) & set(OF_OWN_ENGINE) else ()
    if not set(before) & set(gone):
        return dict(table)
    kept = {name: value for name, value in before.items() if name not in gone}
    return {**table, "rollout": {**table["rollout"], "vllm": kept}}


def _vllm_of(table: Mapping[str, Any]) -> Mapping[str, Any]:
    """[rollout.vllm] of a table that was not looked at; empty where there is none."""
    rollout = table.get("rollout")
    vllm = rollout.get("vllm") if isinstance(rollout, Mapping) else None
    return vllm if isinstance(vllm, Mapping) else {}
