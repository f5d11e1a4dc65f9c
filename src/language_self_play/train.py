"""Algorithm 1 of "Language Self-Play For Data-Free Training": the only training loop there is."""

from __future__ import annotations

import os
import warnings
from contextlib import suppress
from typing import NoReturn

import torch

from language_self_play.advantages import challenger_advantages, solver_advantages
from language_self_play.checkpoint import load_checkpoint, save_checkpoint, save_model
from language_self_play.config import Config
from language_self_play.distributed import (
    Ranks,
    SharedRunFolder,
    join_ranks,
    refuse_other_settings,
)
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
from language_self_play.evaluate.outcomes import Evaluation
from language_self_play.game import Game, prepare
from language_self_play.guard import write_batch
from language_self_play.lock import RunLock
from language_self_play.metrics import Turn, game_records, step_record
from language_self_play.model_card import model_card
from language_self_play.out_of_memory import is_out_of_memory
from language_self_play.players import answer_queries, truncation_penalties
from language_self_play.progress import Progress, Silent, build_progress
from language_self_play.run_folder import RunFolder, free_run_folder
from language_self_play.signals import Abandoned, Stops
from language_self_play.stopwatch import Stopwatch

NOTHING = Evaluation({}, [])


def self_play(
    config: Config,
    run: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    take_over: bool = False,
) -> RunFolder:
    """Play `config.steps` steps of `config.algorithm` and return the run's folder.

    `run` names the folder (default: a new one under runs/). With `resume` it goes on from that
    folder's newest checkpoint, as if it had never stopped. `progress` watches (default: what
    config.log.progress says). `take_over` says that a process of another machine, which run.lock
    names, has ended; one that is seen to play is refused all the same.

    Raises an LspError: ConfigError, ModelError, InputFileError and RewardError before weights are
    loaded where that is possible; after a checkpoint NonFiniteError, when too many steps in a row
    could not be learned from, MemoryLimitError, and Paused, when SIGINT, SIGTERM or SIGHUP asks it to stop
    or a service that a reward needs is away. A second SIGINT is a KeyboardInterrupt that says how to
    go on. In a process that torchrun started it plays as one of the ranks; each returns the folder, and
    only the first has written to it.
    """
    with join_ranks(config.distributed.timeout_s) as ranks:
        refuse_other_settings(config, resume, ranks)
        place = ranks.once(lambda: str(run or free_run_folder(config.algorithm)))
        folder = RunFolder(place) if ranks.size == 1 else SharedRunFolder(place, ranks)
        lock = RunLock(folder.folder, take_over)
        return _with_signals(config, folder, ranks, lock, resume, progress)


def _with_signals(
    config: Config,
    folder: RunFolder,
    ranks: Ranks,
    lock: RunLock,
    resume: bool,
    progress: Progress | None,
) -> RunFolder:
    with Stops(config.guard.stop_within_s) as stops, lock:
        try:
            return _self_play(config, folder, ranks, lock, resume, progress, stops)
        except Abandoned:
            raise Paused(
                "stopped by a signal before a step was played; start it again, by --resume if its"
                " folder holds a config.toml"
            ) from None
        except KeyboardInterrupt:
            if not folder.config_file.is_file():
                raise
            again = (
                "steps since the last checkpoint are" if folder.checkpoints() else "all of it is"
            )
            raise KeyboardInterrupt(
                f"stopped at once; {again} played again by: {folder.resume_command}"
            ) from None


def _self_play(
    config: Config,
    folder: RunFolder,
    ranks: Ranks,
    lock: RunLock,
    resume: bool,
    progress: Progress | None,
    stops: Stops,
) -> RunFolder:
    if resume:
        folder.refuse_changes(config)
        config = folder.as_resolved(config)
        ranks.once(lock.take)
    else:
        ranks.once(folder.refuse_if_used)
    game = prepare(config, ranks)
    config, game.stops = game.config, stops  # with what has been resolved
    if resume:
        start = load_checkpoint(folder, game.policy, game.learner.optimizer, ranks)
        if config.steps < start:
            raise ConfigError(f"steps = {config.steps}: the run has played {start} steps already")
        folder.truncate(start)
        game.take_up(folder)
        for part in (folder.model_folder, folder.adapter_folder):
            ranks.once(remove_folder, part)  # of an earlier end
        folder.write_config(config)
    else:
        start = 0
        ranks.once(lock.take)
        folder.create(config)
    several = {"ranks": ranks.size} if ranks.size > 1 else {}
    folder.event("resumed" if resume else "started", step=start, **several)
    if progress is None:
        first = next(folder.metrics(), {})
        progress = build_progress(config, start, first) if ranks.is_first else Silent()
    with game, progress as seen:
        try:
            with ranks.together():
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
        evaluation = evaluate(run, step) if game.measures.is_due(step) else NOTHING
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
        record = step_record(turn, watch.lap(), policy.device, game.describe) | evaluation.metrics
        # Before the checkpoint that would skip this step on resume.
        run.record(record, games, evaluation.questions)
        progress.step(record, games)
        guard(game, run, turn)  # tells of what went wrong; stops when that goes on
        if game.checkpoint_is_due(step + 1):
            save(game, run, step + 1)
        if step + 1 < config.steps and game.is_asked_to_stop():
            pause(game, run, step + 1)

    sync(config.steps)
    evaluation = evaluate(run, config.steps)
    game.stops.commit()
    if evaluation.metrics:
        run.record({"step": config.steps, **evaluation.metrics}, [], evaluation.questions)
        progress.step({"step": config.steps, **evaluation.metrics}, [])
    game.ranks.once(save_model, run.own, policy, model_card)
    run.event("finished", step=config.steps)


def pause(game: Game, run: RunFolder, step: int, reason: str | None = None) -> NoReturn:
    """Stop resumably before `step`, with a checkpoint of the weights that it would be played with."""
    checkpoint(game, run, step, last=True)
    run.event("paused", step=step, **({"reason": reason} if reason else {}))
    played = f"{step} of {game.config.steps} steps played"
    why = f"paused, {reason}; {played}" if reason else f"paused, {played}"
    paused = Paused(f"{why}; go on with: {run.resume_command}")
    paused.agreed = not game.ranks.apart
    raise paused


def checkpoint(game: Game, run: RunFolder, step: int, last: bool = False) -> None:
    """checkpoints/step-`step`; none of damaged weights, which would displace the last good ones.

    Where the disk can't take it the run goes on to its next one, with a warning; where this is the
    `last`, as it is at the run's end, it stops: Paused, resumable from the checkpoint before.
    """
    if not game.can_save:
        return
    try:
        keep, optimizer = game.config.checkpoint, game.learner.optimizer
        save_checkpoint(run, game.policy, optimizer, step, keep, game.ranks)
    except RunFolderError as error:
        if last or step == game.config.steps:
            run.stop(error)
        run.tolerate("checkpoint", error, "the run goes on and tries again at its next checkpoint")


def guard(game: Game, run: RunFolder, turn: Turn) -> None:
    """Tell of batches halved, of an engine started again, and of an update that was not made.

    After guard.max_skipped of those in a row the run stops: NonFiniteError, after a checkpoint, with
    the step's batch in a file.
    """
    if (sizes := game.halved_sizes()) != game.told_sizes:
        run.event("out_of_memory", step=turn.step, **sizes)
        game.told_sizes = sizes
    for trouble in game.sampler.trouble:
        run.event("engine_restarted", step=turn.step, reason=trouble)
    game.sampler.trouble.clear()
    if (reason := turn.result.skipped) is None:
        return
    run.event("skipped", step=turn.step, reason=reason)
    if game.skipped < game.config.guard.max_skipped:
        warnings.warn(reason, stacklevel=2)
        return
    checkpoint(game, run, turn.step + 1)
    chat = game.policy.chat
    try:
        file = game.ranks.once(lambda: str(write_batch(run.own, turn, chat)))
        batch = f"what the last one would have learned from is in {file}"
    except RunFolderError as error:
        batch = str(error)
    run.event("stopped", step=turn.step + 1, reason=reason)
    stopped = NonFiniteError(
        f"{reason}\nthe run stopped, because {game.skipped} updates in a row were skipped"
        f" (guard.max_skipped); {batch}"
    )
    stopped.agreed = True
    raise stopped


def rescue(game: Game, run: RunFolder, error: Exception) -> None:
    """Before a run ends by `error`: a checkpoint of its weights, where no update has begun on them.

    Raises MemoryLimitError, in words, in place of an allocator's error.
    """
    step = game.version if game.can_save else None
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
