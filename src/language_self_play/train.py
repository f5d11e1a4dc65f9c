"""Algorithm 1 of "Language Self-Play For Data-Free Training": the only training loop there is."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NoReturn

import torch
from torch import Tensor

from language_self_play.advantages import challenger_advantages, solver_advantages
from language_self_play.arena import tasks as arena
from language_self_play.chat import load_chat
from language_self_play.checkpoint import load_checkpoint, save_checkpoint, save_model
from language_self_play.config import Config, as_list
from language_self_play.data import Question, load_queries, queries_of_step
from language_self_play.durable import remove_folder
from language_self_play.errors import (
    ConfigError,
    LspError,
    MemoryLimitError,
    NonFiniteError,
    Paused,
    RunFolderError,
    ServiceError,
)
from language_self_play.evaluate.accuracy import arena_accuracy
from language_self_play.guard import (
    in_words,
    places_of_logprobs,
    refuse_nonfinite,
    write_batch,
)
from language_self_play.learner import Learner, StepResult
from language_self_play.lock import RunLock
from language_self_play.metrics import Turn, finite, game_records, step_record
from language_self_play.model_card import model_card
from language_self_play.out_of_memory import is_out_of_memory
from language_self_play.players import (
    ChallengerPrompt,
    answer_queries,
    check_challenger_prompt,
    pose_queries,
    truncation_penalties,
)
from language_self_play.policy import Policy, load_policy
from language_self_play.pretrained import (
    choose_device,
    choose_dtype,
    context_length,
    load_model_config,
)
from language_self_play.progress import Progress, build_progress
from language_self_play.prompts import challenger_prompt
from language_self_play.randomness import choose, stream_key
from language_self_play.rewards import RewardSum, build_reward
from language_self_play.rewards.self_reward import JudgeQuestions, QualityJudge, build_judge
from language_self_play.run_folder import Record, RunFolder, free_run_folder
from language_self_play.sampling import Sampler
from language_self_play.sampling.transformers import TransformersSampler
from language_self_play.signals import Abandoned, Stops
from language_self_play.stopwatch import Stopwatch
from language_self_play.types import Posed, Solved


def self_play(
    config: Config,
    run: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> RunFolder:
    """Play `config.steps` steps of `config.algorithm` and return the run's folder.

    `run` names the folder (default: a new one under runs/). With `resume` it goes on from that
    folder's newest checkpoint, as if it had never stopped. `progress` watches (default: what
    config.log.progress says).

    Raises an LspError: ConfigError, ModelError, InputFileError and RewardError before weights are
    loaded where that is possible; after a checkpoint NonFiniteError, when too many steps in a row
    could not be learned from, MemoryLimitError, and Paused, when SIGINT or SIGTERM asks it to stop
    or a service that a reward needs is away.
    """
    folder = RunFolder(run if run is not None else free_run_folder(config.algorithm))
    with Stops(config.guard.stop_within_s) as stops, RunLock(folder.folder) as lock:
        try:
            return _self_play(config, folder, lock, resume, progress, stops)
        except Abandoned:
            raise Paused(
                "stopped by SIGTERM before a step was played; start it again, by --resume if its"
                " folder holds a config.toml"
            ) from None


def _self_play(
    config: Config,
    folder: RunFolder,
    lock: RunLock,
    resume: bool,
    progress: Progress | None,
    stops: Stops,
) -> RunFolder:
    if resume:
        folder.refuse_changes(config)
        config = folder.as_resolved(config)
        lock.take()
    else:
        folder.refuse_if_used()
    game = prepare(config)
    config, game.stops = game.config, stops  # with what has been resolved
    if resume:
        start = load_checkpoint(folder, game.policy, game.learner.optimizer)
        if config.steps < start:
            raise ConfigError(f"steps = {config.steps}: the run has played {start} steps already")
        folder.truncate(start)
        game.take_up(folder)
        for part in (folder.model_folder, folder.adapter_folder):
            remove_folder(part)  # of an earlier end
        folder.write_config(config)
    else:
        start = 0
        lock.take()
        folder.create(config)
    folder.event("resumed" if resume else "started", step=start)
    with game, progress or build_progress(config, start) as seen:
        try:
            play(game, folder, start, seen)
        except ServiceError as error:
            pause(game, folder, game.sampler.step, str(error))
        except Abandoned:
            if game.version is None:
                raise  # before the first step
            bound = f"{config.guard.stop_within_s:g} s (guard.stop_within_s)"
            reason = (
                f"step {game.sampler.step} took longer than {bound} to end, so it was abandoned"
            )
            pause(game, folder, game.sampler.step, reason)
        except (Paused, NonFiniteError):
            raise  # both have seen to their checkpoint
        except Exception as error:
            rescue(game, folder, error)
            raise
    return folder


def play(game: Game, run: RunFolder, start: int, progress: Progress) -> None:
    """The loop: step s samples with weights version s, and learns version s + 1 from it."""
    config, policy, sampler = game.config, game.policy, game.sampler
    objective = config.challenger.objective
    watch = Stopwatch(torch.cuda.synchronize if policy.device.type == "cuda" else lambda: None)
    sync = watch.timed("sync", game.sync)
    pose = watch.timed("sample_challenger", game.pose)
    answer = watch.timed("sample_solver", answer_queries)
    reward = watch.timed("reward", game.rewards)
    self_reward = watch.timed("quality", game.self_reward)
    learn = watch.timed("learn", game.learn)
    evaluate = watch.timed("eval", game.evaluate)
    save = watch.timed("checkpoint", checkpoint)

    for step in range(start, config.steps):
        sync(step)  # on-policy: the sampler holds θ_step
        evaluation = evaluate() if step % config.eval.every == 0 else {}
        posed = pose(step)  # q_i ~ π_θ(· | challenger prompt); None in GRPO
        queries, keys = (posed.queries, None) if posed else game.questions_of_step(step)
        solved = answer(sampler, queries, config.solver)  # a_ij ~ π_θ(· | q_i)
        R = reward(queries, solved.answers, keys)  # (N, G)
        R_Q = self_reward(queries, solved.answers)  # (N, G), zeros in LSP-Zero and GRPO
        penalty = truncation_penalties(solved, config.solver)  # (N, G), zeros by default
        solved.advantages = solver_advantages(R - penalty, R_Q)  # centred R + R_Q
        if posed:
            posed.advantages = challenger_advantages(R, R_Q, posed.valid, objective)  # V_Q - V
        result = learn(step, queries, posed, solved, R_Q)  # down L_Sol + α_Ch · L_Ch
        turn = game.turn(step, queries, posed, solved, R, R_Q, result)
        games = game_records(turn, game.describe)
        record = step_record(turn, watch.lap(), policy.device, game.describe) | evaluation
        run.record(record, games)  # before the checkpoint that would skip this step on resume
        progress.step(record, games)
        guard(game, run, turn)  # tells of what went wrong; stops when that goes on
        if game.checkpoint_is_due(step + 1):
            save(game, run, step + 1)
        if game.stops.requested and step + 1 < config.steps:
            pause(game, run, step + 1)

    sync(config.steps)
    evaluation = evaluate()
    game.stops.commit()
    if evaluation:
        run.record({"step": config.steps, **evaluation}, [])
        progress.step({"step": config.steps, **evaluation}, [])
    save_model(run, policy, model_card)
    run.event("finished", step=config.steps)


def pause(game: Game, run: RunFolder, step: int, reason: str | None = None) -> NoReturn:
    """Stop resumably before `step`, with a checkpoint of the weights that it would be played with."""
    checkpoint(game, run, step, last=True)
    run.event("paused", step=step, **({"reason": reason} if reason else {}))
    played = f"{step} of {game.config.steps} steps played"
    why = f"paused, {reason}; {played}" if reason else f"paused, {played}"
    raise Paused(f"{why}; go on with: lsp train --resume {run.folder}")


def checkpoint(game: Game, run: RunFolder, step: int, last: bool = False) -> None:
    """checkpoints/step-`step`; none of damaged weights, which would displace the last good ones.

    Where the disk can't take it the run goes on to its next one, with a warning; where this is the
    `last`, as it is at the run's end, it stops: Paused, resumable from the checkpoint before.
    """
    if game.is_damaged:
        return
    try:
        save_checkpoint(run, game.policy, game.learner.optimizer, step, game.config.checkpoint)
    except RunFolderError as error:
        if last or step == game.config.steps:
            run.stop(error)
        run.tolerate("checkpoint", error, "the run goes on and tries again at its next checkpoint")


def guard(game: Game, run: RunFolder, turn: Turn) -> None:
    """Tell of batches that had to be halved, and of an update that was not made.

    After guard.max_skipped of those in a row the run stops: NonFiniteError, after a checkpoint, with
    the step's batch in a file.
    """
    if (sizes := game.halved_sizes()) != game.told_sizes:
        run.event("out_of_memory", step=turn.step, **sizes)
        game.told_sizes = sizes
    if (reason := turn.result.skipped) is None:
        return
    run.event("skipped", step=turn.step, reason=reason)
    if game.skipped < game.config.guard.max_skipped:
        warnings.warn(reason, stacklevel=2)
        return
    checkpoint(game, run, turn.step + 1)
    chat = game.policy.chat
    try:
        batch = f"what the last one would have learned from is in {write_batch(run, turn, chat)}"
    except RunFolderError as error:
        batch = str(error)
    run.event("stopped", step=turn.step + 1, reason=reason)
    raise NonFiniteError(
        f"{reason}\nthe run stopped, because {game.skipped} updates in a row were skipped"
        f" (guard.max_skipped); {batch}"
    )


def rescue(game: Game, run: RunFolder, error: Exception) -> None:
    """Before a run ends by `error`: a checkpoint of its weights, where no update has begun on them.

    Raises MemoryLimitError, in words, in place of an allocator's error.
    """
    step = game.version
    with suppress(LspError):  # such as a full disk, which may be the error
        if step is not None:
            checkpoint(game, run, step)
        run.event("failed", step=game.sampler.step, reason=f"{type(error).__name__}: {error}")
    if is_out_of_memory(error) and not isinstance(error, MemoryLimitError):
        kept = "the run's checkpoint is of this step" if step is not None else "go on from its last"
        raise MemoryLimitError(
            f"step {game.sampler.step}: {game.policy.device} has no memory left"
            f" ({str(error).splitlines()[0]}); lower learner.tokens_per_micro_batch,"
            " rollout.batch_size or max_tokens, or set learner.gradient_checkpointing or policy.lora;"
            f" {kept}"
        ) from None


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
    version: int | None = None  # of the weights, while they may be written: until their update
    skipped: int = 0  # updates in a row
    is_damaged: bool = False  # the weights, by what they say of their own samples
    told_sizes: dict[str, int] = field(default_factory=dict)
    _not_finite: NonFiniteError | None = None  # of this step's reward

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
        self.sampler.sync(self.policy.model, step)
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

    def checkpoint_is_due(self, step: int) -> bool:
        """By cadence, at the end, or because SIGUSR1 has asked for one."""
        asked = self.stops.take_checkpoint_request()
        if step == self.config.steps:
            return True
        if self.stops.requested:
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
        """R, (N, G). Where a reward is not finite all of it is NaN, and nothing will be learned."""
        try:
            return self.reward(queries, answers, keys)
        except NonFiniteError as error:
            self._not_finite = error
            return torch.full((len(queries), len(answers[0])), math.nan)

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
        """The metrics of config.eval.tasks for the current weights."""
        if "arena" not in self.config.eval.tasks:
            return {}
        tokens_at_once = self.config.learner.tokens_per_micro_batch
        system_prompt = self.config.solver.system_prompt
        accuracy = arena_accuracy(
            self.policy.model, self.policy.chat, tokens_at_once, system_prompt
        )
        return finite(accuracy.metrics())


def prepare(config: Config) -> Game:
    """Check everything that needs no weights, then load them."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device, reward, questions = check_without_weights(config)
    dtype = str(choose_dtype(config.dtype, device)).removeprefix("torch.")
    config = config.model_copy(update={"threads": torch.get_num_threads(), "dtype": dtype})
    warn_of_bias(config)
    policy = load_policy(config, device)
    reward.load(device)
    sampler = TransformersSampler(policy.model, policy.chat, config.seed, config.rollout.batch_size)
    judge = build_judge(config, policy) if config.algorithm == "lsp" else None
    prompts = challenger_prompts(config) if config.algorithm != "grpo" else []
    learner = Learner(policy, config)
    return Game(config, policy, sampler, learner, reward, judge, prompts, questions)


def check_without_weights(config: Config) -> tuple[torch.device, RewardSum, list[Question]]:
    """Device, reward and GRPO's questions: whatever can be wrong before weights load shows here.

    Raises ConfigError, InputFileError, ModelError or RewardError.
    """
    device = choose_device(config.device)
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
