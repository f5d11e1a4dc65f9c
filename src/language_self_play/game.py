"""What a run is played with: policy, sampler, reward, judge and learner, from a checked configuration."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from language_self_play.arena import tasks as arena
from language_self_play.chat import load_chat
from language_self_play.config import Config, as_list
from language_self_play.data import Question, load_queries, queries_of_step
from language_self_play.distributed import ALONE, Ranks, device_of_rank, threads_of_rank
from language_self_play.errors import ConfigError, NonFiniteError
from language_self_play.evaluate.accuracy import arena_accuracy
from language_self_play.guard import in_words, places_of_logprobs, refuse_nonfinite
from language_self_play.learner import Learner, StepResult
from language_self_play.metrics import Turn, finite
from language_self_play.players import ChallengerPrompt, check_challenger_prompt, pose_queries
from language_self_play.policy import Policy, load_policy
from language_self_play.pretrained import (
    choose_device,
    choose_dtype,
    context_length,
    load_model_config,
)
from language_self_play.prompts import challenger_prompt
from language_self_play.randomness import choose, stream_key
from language_self_play.rewards import RewardSum, build_reward
from language_self_play.rewards.self_reward import JudgeQuestions, QualityJudge, build_judge
from language_self_play.run_folder import Record, RunFolder
from language_self_play.sampling import Sampler
from language_self_play.sampling.transformers import TransformersSampler
from language_self_play.signals import Stops
from language_self_play.types import Posed, Solved


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
        shards_are_lost = self.ranks.apart and self.policy.sharded is not None
        return not (self.is_damaged or shards_are_lost)

    def __enter__(self) -> Game:
        return self

    def __exit__(self, *error: object) -> None:
        self.reward.close()

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
        for part, name, metric in (
            (self.learner, "tokens_per_micro_batch", "memory/micro_batch_tokens"),
            (self.sampler, "batch_size", "memory/rollout_batch_size"),
        ):
            configured = getattr(part, name)  # which may have been lowered since
            setattr(part, name, min(configured, last.get(metric, configured)))
        self.told_sizes = self.halved_sizes()

    def halved_sizes(self) -> dict[str, int]:
        """What of the batches' sizes memory has cut below the settings, by metric."""
        config = self.config
        sizes = {
            "memory/micro_batch_tokens": (
                self.learner.tokens_per_micro_batch,
                config.learner.tokens_per_micro_batch,
            ),
            "memory/rollout_batch_size": (self.sampler.batch_size, config.rollout.batch_size),
        }
        return {name: now for name, (now, configured) in sizes.items() if now < configured}

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
        )

    def evaluate(self) -> Record:
        """The metrics of config.eval.tasks for the current weights, measured on the first rank."""
        return self.ranks.once(self._evaluate)

    def _evaluate(self) -> Record:
        if "arena" not in self.config.eval.tasks:
            return {}
        tokens_at_once = self.config.learner.tokens_per_micro_batch
        system_prompt = self.config.solver.system_prompt
        accuracy = arena_accuracy(
            self.policy.whole, self.policy.chat, tokens_at_once, system_prompt
        )
        return finite(accuracy.metrics())


def prepare(config: Config, ranks: Ranks = ALONE) -> Game:
    """Check everything that needs no weights, then load them."""
    torch.set_num_threads(config.threads or threads_of_rank(ranks.place))
    device, reward, questions = check_without_weights(config, ranks)
    dtype = str(choose_dtype(config.dtype, device)).removeprefix("torch.")
    config = config.model_copy(update={"threads": torch.get_num_threads(), "dtype": dtype})
    warn_of_bias(config)
    policy = load_policy(config, device, ranks)
    policy.gather()
    if ranks.is_first:
        reward.load(device)
    sampler = TransformersSampler(
        policy.whole, policy.chat, config.seed, config.rollout.batch_size, ranks
    )
    judge = build_judge(config, policy, ranks) if config.algorithm == "lsp" else None
    prompts = challenger_prompts(config) if config.algorithm != "grpo" else []
    policy.release()
    learner = Learner(policy, config, ranks)
    return Game(config, policy, sampler, learner, reward, judge, prompts, questions, ranks=ranks)


def check_without_weights(
    config: Config, ranks: Ranks = ALONE
) -> tuple[torch.device, RewardSum, list[Question]]:
    """Device, reward and GRPO's questions: whatever can be wrong before weights load shows here.

    Raises ConfigError, InputFileError, ModelError or RewardError.
    """
    device = device_of_rank(choose_device(config.device), ranks.place)
    reward = build_reward(config)
    held_out = arena.is_held_out_query if plays_in_arena(config) else lambda query: False
    questions = load_queries(config.data, held_out) if config.algorithm == "grpo" else []
    chat = load_chat(config.policy)
    remote_code = config.policy.trust_remote_code
    context = context_length(load_model_config(config.policy.path, remote_code))
    try:
        chat.encode("a query", config.solver.system_prompt)
    except Exception as error:
        # A template is a program of the model's author; whatever it raises is its message.
        raise ConfigError(
            f"solver.system_prompt: the model's chat template refuses a system message: {error}"
        ) from None
    if config.algorithm != "grpo":
        for prompt in challenger_prompts(config):
            check_challenger_prompt(chat.encode(prompt.text), context)
    if config.algorithm == "lsp":
        JudgeQuestions(config.self_reward, chat, context)
    return device, reward, questions


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
