"""What a run is played with: policy, sampler, reward, judge and learner, from a checked configuration."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from language_self_play.arena import tasks as arena
from language_self_play.chat import Chat, load_chat
from language_self_play.config import Config, as_list
from language_self_play.data import Question, load_queries, place_of, queries_of_step
from language_self_play.distributed import ALONE, Ranks, device_of_rank, threads_of_rank
from language_self_play.errors import ConfigError, NonFiniteError, renaming
from language_self_play.evaluate.accuracy import evaluation_batches
from language_self_play.evaluate.measures import Measures
from language_self_play.evaluate.outcomes import Evaluation
from language_self_play.guard import in_words, places_of_logprobs, refuse_nonfinite
from language_self_play.learner import Learner, StepResult
from language_self_play.metrics import Turn
from language_self_play.players import (
    ChallengerPrompt,
    check_challenger_prompt,
    check_query,
    pose_queries,
)
from language_self_play.policy import Policy, load_policy
from language_self_play.pretrained import (
    choose_device,
    choose_dtype,
    context_length,
    load_model_config,
    longrope_context,
    resolve_model,
    stated_context,
)
from language_self_play.prompts import challenger_prompt
from language_self_play.randomness import choose, stream_key
from language_self_play.rewards import RewardSum, build_reward
from language_self_play.rewards.self_reward import JudgeQuestions, QualityJudge, build_judge
from language_self_play.row_batches import RowBatches
from language_self_play.run_folder import Record, RunFolder
from language_self_play.sampling import Sampler
from language_self_play.sampling.transformers import TransformersSampler
from language_self_play.sampling.vllm import VllmSampler, check_vllm, devices_of_rank
from language_self_play.sampling.vllm_server import check_server
from language_self_play.signals import Stops
from language_self_play.types import Posed, Solved

# Of a query within the chat template: a normalizer may spell characters out, a template repeat it.
MOST_TOKENS_PER_BYTE = 4


class Size(NamedTuple):
    """A batch's size, which memory may halve: an attribute of `part`, and what it is configured as."""

    part: Any
    attribute: str
    configured: int


@dataclass
class Game:
    """What a run is played with. Left as a context, it ends what its reward has started."""

    config: Config
    policy: Policy
    sampler: Sampler
    learner: Learner
    reward: RewardSum
    judge: QualityJudge | None
    challenger_prompts: list[ChallengerPrompt]
    questions: list[Question]
    evaluation: RowBatches
    measures: Measures
    stops: Stops = field(default_factory=Stops)
    ranks: Ranks = ALONE
    version: int | None = None  # of the weights, while they may be written: until their update
    skipped: int = 0  # updates in a row
    is_damaged: bool = False  # the weights, by what they say of their own samples
    told_sizes: dict[str, int] = field(default_factory=dict)
    _not_finite: NonFiniteError | None = None  # of this step's reward

    @property
    def can_save(self) -> bool:
        """Whether a checkpoint of the weights can be had and is worth having."""
        shards_are_lost = self.ranks.apart and self.policy.trains_shards
        return not (self.is_damaged or shards_are_lost)

    def __enter__(self) -> Game:
        return self

    def __exit__(self, *error: object) -> None:
        self.sampler.close()
        self.reward.close()
        self.measures.close()

    @property
    def in_arena(self) -> bool:
        """Whether queries are the arena's: then held-out ones are known, and unsolvable ones."""
        return plays_in_arena(self.config)

    @property
    def describe(self) -> Callable[[str], Record] | None:
        return arena.describe if self.in_arena else None

    def sync(self, step: int) -> None:
        """From here on draws are those of `step`, from the policy's current weights."""
        self.policy.gather()
        self.sampler.sync(self.policy.whole, step)
        if self.judge is not None:
            self.judge.sampler.step = step
        self.version = step
        self.stops.begin_step()

    def take_up(self, run: RunFolder) -> None:
        """Go on as the run's last record left off: halved batches, updates skipped in a row."""
        last: Record = [{}, *run.metrics()][-1]
        skipped = last.get("guard/skipped", 0)
        # A run that was stopped for them has been looked at: it counts anew.
        self.skipped = skipped if skipped < self.config.guard.max_skipped else 0
        for metric, (part, attribute, configured) in self._sizes().items():
            # The setting may have been lowered since.
            setattr(part, attribute, min(configured, last.get(metric, configured)))
        self.told_sizes = self.halved_sizes()

    def halved_sizes(self) -> dict[str, int]:
        """What of the batches' sizes memory has cut below the settings, by metric."""
        return {
            metric: now
            for metric, (part, attribute, configured) in self._sizes().items()
            if (now := getattr(part, attribute)) < configured
        }

    def _agree_on_sizes(self) -> None:
        """Each size as it is on the rank where it is smallest; some are used by the first rank alone."""
        for part, attribute, _ in self._sizes().values():
            setattr(part, attribute, self.ranks.least(getattr(part, attribute)))

    def _sizes(self) -> dict[str, Size]:
        """Every size of a batch that memory may halve, by metric."""
        tokens = self.config.learner.tokens_per_micro_batch
        rows = self.config.rollout.batch_size
        sizes = {
            "memory/micro_batch_tokens": Size(self.learner, "tokens_per_micro_batch", tokens),
            "memory/rollout_batch_size": Size(self.sampler, "batch_size", rows),
            "memory/eval_batch_tokens": Size(self.evaluation, "tokens", tokens),
        }
        if self.judge is not None:
            sizes["memory/judge_batch_tokens"] = Size(self.judge.batches, "tokens", tokens)
            sizes["memory/judge_batch_size"] = Size(self.judge.sampler, "batch_size", rows)
        for name, batches in self.reward.batches().items():
            sizes[f"memory/{name}_batch_tokens"] = Size(batches, "tokens", batches.configured)
        return sizes

    def is_asked_to_stop(self) -> bool:
        """Whether a signal has asked any rank to: asked at the same moment by all, they agree."""
        return any(self.ranks.any(self.stops.requested))

    def checkpoint_is_due(self, step: int) -> bool:
        """By cadence, at the end, or because SIGUSR1 has asked for one."""
        asked = any(self.ranks.any(self.stops.take_checkpoint_request()))
        if step == self.config.steps:
            return True
        if self.is_asked_to_stop():
            return False  # pausing writes one
        return asked or step % self.config.checkpoint.every == 0

    def pose(self, step: int) -> Posed | None:
        """The Challenger's turn; None in GRPO, which has none."""
        if self.config.algorithm == "grpo":
            return None
        # Of several (task, template) pairs one is drawn for the whole step.
        prompts, key = self.challenger_prompts, stream_key(self.config.seed, step, "task")
        return pose_queries(
            self.sampler,
            prompts[choose(key, len(prompts))],
            self.config.challenger,
            self.config.solver.system_prompt,
            arena.is_held_out_query if self.in_arena else lambda query: False,
        )

    def questions_of_step(self, step: int) -> tuple[list[str], list[str | None]]:
        """GRPO's queries and their keys, from the file."""
        config = self.config
        num_queries = config.challenger.num_queries
        chosen = queries_of_step(self.questions, step, num_queries, config.seed)
        return [q.query for q in chosen], [q.key for q in chosen]

    def rewards(
        self, queries: list[str], answers: list[list[str]], keys: list[str | None] | None
    ) -> Tensor:
        """R, (N, G). Where a reward is not finite all of it is NaN, and nothing will be learned.

        The first rank asks for it: a judge is paid once.
        """
        G = len(answers[0]) if answers else 0
        try:
            rows = self.ranks.once(lambda: self.reward(queries, answers, keys).tolist())
        except NonFiniteError as error:
            self._not_finite = error
            return torch.full((len(queries), G), math.nan)
        return torch.tensor(rows).view(len(queries), G)

    def self_reward(self, queries: list[str], answers: list[list[str]]) -> Tensor:
        """R_Q, (N, G): the judge's in LSP, zeros otherwise."""
        if self.judge is None:
            return torch.zeros(len(queries), len(answers[0]) if answers else 0)
        return self.judge(queries, answers)

    def learn(
        self, step: int, queries: list[str], posed: Posed | None, solved: Solved, R_Q: Tensor
    ) -> StepResult:
        """The learning step, or none where a number is not finite; then `skipped` says which."""
        of_reward, self._not_finite = self._not_finite, None
        self.learner.before_update = self._commit
        self.sampler.rest()
        self.policy.release()
        try:
            self.is_damaged = bool(places_of_logprobs(posed, solved))
            refuse_nonfinite(posed, solved, R_Q)
            if of_reward is not None:
                raise of_reward
            result = self.learner.step(solved, posed, self.config.challenger.alpha, step)
        except NonFiniteError as error:
            self._commit()
            self.skipped += 1
            where = in_words(error.places, posed, queries)
            reason = f"step {step}, {where}: {error}" if where else f"step {step}: {error}"
            return StepResult(math.nan, math.nan, learning_rate=math.nan, skipped=reason)
        self.skipped = 0
        return result

    def _commit(self) -> None:
        """From here on the step counts as played: it is neither abandoned nor played again."""
        self.stops.commit()
        self.version = None

    def turn(
        self,
        step: int,
        queries: list[str],
        posed: Posed | None,
        solved: Solved,
        R: Tensor,
        R_Q: Tensor,
        result: StepResult,
    ) -> Turn:
        """The step as it is recorded, with what the reward and the judge say of their last call."""
        unparsable = None if self.judge is None else self.judge.unparsable_fraction
        parts = self.reward.parts if len(self.reward.terms) > 1 else {}
        costs = self.reward.costs()
        objective = self.config.challenger.objective
        self._agree_on_sizes()
        trouble: Record = dict(self.halved_sizes())
        if self.skipped:
            trouble["guard/skipped"] = self.skipped
        return Turn(
            step,
            queries,
            posed,
            solved,
            R,
            R_Q,
            unparsable,
            result,
            parts,
            costs,
            objective,
            trouble,
            self.sampler.version,
        )

    def evaluate(self, run: RunFolder, step: int) -> Evaluation:
        """What config.eval asks for of version `step`, the current weights.

        All ranks sample; the first one alone computes what is exact, checks the answers and asks judges.
        """
        drawn = self.measures.draw(step, self.sampler)
        measure = self.measures.evaluation
        found = self.ranks.once(measure, step, drawn, self.policy, self.evaluation, run)
        evaluation = Evaluation(*found)
        for reason in evaluation.trouble:
            run.event("unjudged", step=step, reason=reason)
        return evaluation


def prepare(config: Config, ranks: Ranks = ALONE) -> Game:
    """Check everything that needs no weights, then load them."""
    torch.set_num_threads(config.threads or threads_of_rank(ranks.place))
    device, reward, questions, measures = check_without_weights(config, ranks)
    dtype = str(choose_dtype(config.dtype, device)).removeprefix("torch.")
    threads = torch.get_num_threads()
    # Of several ranks each has a GPU of its own, and settings are the same for all.
    named = str(device) if ranks.size == 1 else device.type
    resolved = {"threads": threads, "dtype": dtype, "device": named}
    config = config.model_copy(update=resolved)
    warn_of_bias(config)
    warn_of_context(config)
    policy = load_policy(config, device, ranks)
    policy.gather()
    if ranks.is_first:
        reward.load(device)
        measures.load()
    sampler: Sampler = TransformersSampler(
        policy.whole, policy.chat, config.seed, config.rollout.batch_size, ranks=ranks
    )
    write = None
    if config.rollout.engine == "vllm":
        sampler = served = VllmSampler(policy, config, ranks)
        # With LoRA the engine's base is the reference; else it holds none, and the policy's copy judges.
        write = served.sample_reference if policy.adapter is not None else None
    judge = build_judge(config, policy, write, ranks) if config.algorithm == "lsp" else None
    prompts = challenger_prompts(config) if config.algorithm != "grpo" else []
    policy.release()
    return Game(
        config,
        policy,
        sampler,
        Learner(policy, config, ranks),
        reward,
        judge,
        prompts,
        questions,
        evaluation_batches(config.learner.tokens_per_micro_batch),
        measures,
        ranks=ranks,
    )


def check_without_weights(
    config: Config, ranks: Ranks = ALONE
) -> tuple[torch.device, RewardSum, list[Question], Measures]:
    """Device, reward, GRPO's questions, evaluations: what can be wrong before weights load shows here.

    Raises ConfigError, InputFileError, ModelError or RewardError.
    """
    device = device_of_rank(choose_device(config.device), ranks.place)
    resolve_model(config.policy.path)  # before any hub is asked about a reward's model
    if config.rollout.engine == "vllm":
        check_engine(config, device, ranks)
    reward = build_reward(config)
    held_out = arena.is_held_out_query if plays_in_arena(config) else lambda query: False
    questions = load_queries(config.data, held_out) if config.algorithm == "grpo" else []
    chat = load_chat(config.policy)
    remote_code = config.policy.trust_remote_code
    context = context_length(load_model_config(config.policy.path, remote_code))
    own = config.rollout.vllm.context if config.rollout.engine == "vllm" else None
    if own is None or own >= context:
        return device, reward, questions, check_texts(questions, config, chat, context, device)
    with renaming(_as_of_engine):
        return device, reward, questions, check_texts(questions, config, chat, own, device)


def _as_of_engine(said: str) -> str:
    """A sentence about the model's context, where rollout.vllm.context is what is too small."""
    named = said.replace("the model's context has only", "rollout.vllm.context is only")
    for advice in ("use a model with a longer context", "a model with a longer context"):
        named = named.replace(advice, "raise it")
    return named


def check_texts(
    questions: list[Question], config: Config, chat: Chat, context: int, device: torch.device
) -> Measures:
    """What is asked fits the template and the context; the evaluations of `config.eval`.

    Raises ConfigError, InputFileError or RewardError.
    """
    try:
        chat.encode("a query", config.solver.system_prompt)
    except Exception as error:
        # A template is a program of the model's author; whatever it raises is its message.
        raise ConfigError(
            f"solver.system_prompt: the model's chat template refuses a system message: {error}"
        ) from None
    check_queries(questions, config, chat, context)
    if config.algorithm != "grpo":
        for prompt in challenger_prompts(config):
            check_challenger_prompt(chat.encode(prompt.text), context)
    if config.algorithm == "lsp":
        JudgeQuestions(config.self_reward, chat, context)
    measures = Measures(config, str(device))
    measures.check_prompts(chat, context)
    return measures


def check_engine(config: Config, device: torch.device, ranks: Ranks = ALONE) -> None:
    """Raises ConfigError unless there is a vLLM that can play this run, here or at its server."""
    waits, others_wait = config.rollout.vllm.timeout_s, config.distributed.timeout_s
    if ranks.size > 1 and waits >= others_wait:
        raise ConfigError(
            f"rollout.vllm.timeout_s = {waits:g}: the other ranks wait for distributed.timeout_s ="
            f" {others_wait:g} s only, so an engine that hangs would end the run before it is started"
            " again; lower the first or raise the second"
        )
    if config.rollout.vllm.server is None:
        check_vllm(config)
        if device.type == "cuda":  # elsewhere engines compute on cores
            devices_of_rank(config.rollout.vllm, os.environ, ranks.place)
        return
    model = load_model_config(config.policy.path, config.policy.trust_remote_code)
    dtype = str(choose_dtype(config.dtype, device)).removeprefix("torch.")
    check_server(config, dtype, model.to_dict(), context_length(model))


def check_queries(questions: list[Question], config: Config, chat: Chat, context: int) -> None:
    """Raises ConfigError, with its place, for a query that leaves no room for an answer.

    A token is seldom less than a byte of its text, so only long texts are tokenized: a data set may
    have 10⁶ of them.
    """
    system_prompt = config.solver.system_prompt
    around = len(chat.encode("a query", system_prompt))
    for question in questions:
        if around + MOST_TOKENS_PER_BYTE * len(question.query.encode()) < context:
            continue
        tokens = chat.encode(question.query, system_prompt)
        if len(tokens) >= context:
            check_query(f"{place_of(question, config.data)}: the query", tokens, context)


def plays_in_arena(config: Config) -> bool:
    rewards = any(section.kind == "arena" for section in config.reward.values())
    return rewards or "arena" in config.eval.tasks


def challenger_prompts(config: Config) -> list[ChallengerPrompt]:
    """The prompts of all (task, template) pairs."""
    section = config.challenger
    pairs = zip(as_list(section.task), as_list(section.template), strict=True)
    return [
        ChallengerPrompt(challenger_prompt(section.prompt, task, template), task, template)
        for task, template in pairs
    ]


def warn_of_bias(config: Config) -> None:
    """Say once that a truncated sampling distribution is not the one whose gradient is taken."""
    for role in ("solver",) if config.algorithm == "grpo" else ("challenger", "solver"):
        section = getattr(config, role)
        if section.top_p < 1 or section.top_k > 0:
            warnings.warn(
                f"{role}.top_p = {section.top_p} and {role}.top_k = {section.top_k} cut the"
                " distribution that is sampled from, so the gradient is biased;"
                " top_p = 1 and top_k = 0 are exact",
                stacklevel=2,
            )


def warn_of_context(config: Config) -> None:
    """Say once that of a longrope model's context only its beginning can be used."""
    path, remote_code = config.policy.path, config.policy.trust_remote_code
    model_config = load_model_config(path, remote_code)
    usable, stated = longrope_context(model_config), stated_context(model_config)
    if usable is not None and usable < stated:
        warnings.warn(
            f"policy.path = {path!r}: of its context of {stated} tokens the run uses {usable}, beyond"
            " which its rotary positions (longrope) depend on the longest text of a pass, and sampler"
            " and trainer would differ",
            stacklevel=2,
        )
