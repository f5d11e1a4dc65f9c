"""Algorithm 1 of "Language Self-Play For Data-Free Training": the only training loop there is."""

from __future__ import annotations

import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from language_self_play.advantages import challenger_advantages, solver_advantages
from language_self_play.arena import tasks as arena
from language_self_play.chat import load_chat
from language_self_play.checkpoint import load_checkpoint, save_checkpoint, save_model
from language_self_play.config import Config, as_list
from language_self_play.data import Question, load_queries, queries_of_step
from language_self_play.errors import ConfigError, Paused, ServiceError
from language_self_play.evaluate.accuracy import arena_accuracy
from language_self_play.learner import Learner, StepResult
from language_self_play.metrics import Turn, game_records, step_record
from language_self_play.model_card import model_card
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
from language_self_play.run_folder import Record, RunFolder, free_run_folder, remove_folder
from language_self_play.sampling import Sampler
from language_self_play.sampling.transformers import TransformersSampler
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
    loaded where that is possible, NonFiniteError for a NaN or infinity, and Paused, after a
    checkpoint, when SIGINT or SIGTERM asks it to stop or a service that a reward needs is away.
    """
    folder = RunFolder(run if run is not None else free_run_folder(config.algorithm))
    if resume:
        folder.refuse_changes(config)
    else:
        folder.refuse_if_used()
    game = prepare(config)
    config = game.config  # with what has been resolved
    if resume:
        start = load_checkpoint(folder, game.policy, game.learner.optimizer)
        if config.steps < start:
            raise ConfigError(f"steps = {config.steps}: the run has played {start} steps already")
        folder.truncate(start)
        remove_folder(folder.model_folder)  # of an earlier end
        folder.write_config(config)
    else:
        start = 0
        folder.create(config)
    folder.event("resumed" if resume else "started", step=start)
    with game, stop_requests() as stop_requested, progress or build_progress(config, start) as seen:
        try:
            play(game, folder, start, seen, stop_requested)
        except ServiceError as error:
            pause(game, folder, game.sampler.step, str(error))
    return folder


def play(
    game: Game,
    run: RunFolder,
    start: int,
    progress: Progress,
    stop_requested: Callable[[], bool],
) -> None:
    """The loop: step s samples with weights version s, and learns version s + 1 from it."""
    config, policy, sampler, learner = game.config, game.policy, game.sampler, game.learner
    objective = config.challenger.objective
    watch = Stopwatch(torch.cuda.synchronize if policy.device.type == "cuda" else lambda: None)
    sync = watch.timed("sync", game.sync)
    pose = watch.timed("sample_challenger", game.pose)
    answer = watch.timed("sample_solver", answer_queries)
    reward = watch.timed("reward", game.reward)
    self_reward = watch.timed("quality", game.self_reward)
    learn = watch.timed("learn", learner.step)
    evaluate = watch.timed("eval", game.evaluate)
    save = watch.timed("checkpoint", save_checkpoint)

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
        result = learn(solved, posed, config.challenger.alpha, step)  # L_Sol + α_Ch · L_Ch
        turn = game.turn(step, queries, posed, solved, R, R_Q, result)
        games = game_records(turn, game.describe)
        record = step_record(turn, watch.lap(), policy.device, game.describe) | evaluation
        run.record(record, games)  # before the checkpoint that would skip this step on resume
        progress.step(record, games)
        stopping = stop_requested() and step + 1 < config.steps
        if stopping or (step + 1) % config.checkpoint.every == 0 or step + 1 == config.steps:
            save(run, policy, learner.optimizer, step + 1, config.checkpoint.keep_last)
        if stopping:
            pause(game, run, step + 1)

    sync(config.steps)
    if evaluation := evaluate():
        run.record({"step": config.steps, **evaluation}, [])
        progress.step({"step": config.steps, **evaluation}, [])
    save_model(run, policy, model_card)
    run.event("finished", step=config.steps)


def pause(game: Game, run: RunFolder, step: int, reason: str | None = None) -> NoReturn:
    """Stop resumably before `step`, with a checkpoint of the weights that it would be played with."""
    keep_last = game.config.checkpoint.keep_last
    save_checkpoint(run, game.policy, game.learner.optimizer, step, keep_last)
    run.event("paused", step=step, **({"reason": reason} if reason else {}))
    played = f"{step} of {game.config.steps} steps played"
    why = f"paused, {reason}; {played}" if reason else f"paused, {played}"
    raise Paused(f"{why}; go on with: lsp train --resume {run.folder}")


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

    def self_reward(self, queries: list[str], answers: list[list[str]]) -> Tensor:
        """R_Q, (N, G): the judge's in LSP, zeros otherwise."""
        if self.judge is None:
            return torch.zeros(len(queries), len(answers[0]) if answers else 0)
        return self.judge(queries, answers)

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
        return Turn(
            step, queries, posed, solved, R, R_Q, unparsable, result, parts, costs, objective
        )

    def evaluate(self) -> Record:
        """The metrics of config.eval.tasks for the current weights."""
        if "arena" not in self.config.eval.tasks:
            return {}
        tokens_at_once = self.config.learner.tokens_per_micro_batch
        system_prompt = self.config.solver.system_prompt
        return arena_accuracy(
            self.policy.model, self.policy.chat, tokens_at_once, system_prompt
        ).metrics()


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


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Whether SIGINT or SIGTERM has asked to stop after this step; a second one stops at once."""
    requested = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield requested.is_set  # Only the main thread receives signals.
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def request(signum: int, frame: object) -> None:
        requested.set()
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in before:
        signal.signal(number, request)
    try:
        yield requested.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
