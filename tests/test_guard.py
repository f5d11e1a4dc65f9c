"""Numbers that are not finite skip their update; memory that runs out halves its batches."""

from __future__ import annotations

import importlib
import json
import math
import os
import signal
from typing import Any

import pytest
import torch

from language_self_play import self_play
from language_self_play.errors import MemoryLimitError, NonFiniteError, Paused, RewardError
from language_self_play.guard import in_words
from language_self_play.learner import Learner
from language_self_play.optimizer import Optimizer
from language_self_play.progress import Silent
from language_self_play.rewards.arena import ArenaVerifier
from language_self_play.run_folder import RunFolder
from language_self_play.sampling.transformers import TransformersSampler
from language_self_play.types import Completion, Posed, Query
from out_of_memory import OUT_OF_MEMORY
from test_train import assert_same_run, events, reproducible, small

ONE_STEP = {"checkpoint": {"every": 1, "keep_last": 9}}
SKIPS = pytest.mark.filterwarnings("ignore:step \\d+:UserWarning")


def rewarding(monkeypatch: Any, values: dict[int, float], place: tuple[int, int] = (1, 2)) -> None:
    """The arena's verifier, but for one answer of some calls, whose number is the step's."""
    verify, calls = ArenaVerifier.__call__, iter(range(10**6))

    def reward(self: Any, queries: Any, answers: Any, keys: Any) -> Any:
        rows = [list(row) for row in verify(self, queries, answers, keys)]
        if (call := next(calls)) in values:
            rows[place[0]][place[1]] = values[call]
        return rows

    monkeypatch.setattr(ArenaVerifier, "__call__", reward)


def contents(run: RunFolder, step: int, file: str) -> bytes:
    return (run.checkpoints_folder / f"step-{step:06d}" / file).read_bytes()


def strict(line: str) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(line, parse_constant=refuse)


# ---------------------------------------------------------------- numbers that are not finite


@pytest.mark.parametrize("bad", [math.nan, -math.inf, 1e39])
def test_a_reward_that_is_not_finite_skips_its_update_and_the_run_goes_on(
    bad, tmp_path, monkeypatch
):
    rewarding(monkeypatch, {1: bad})
    with pytest.warns(UserWarning, match=r"step 1, solver, game \d \('.+'\): reward\.") as warned:
        run = self_play(small("arena-zero", steps=3, **ONE_STEP), tmp_path / "run")
    assert len(warned) == 1
    for file in ("model/model.safetensors", "optimizer.safetensors"):
        assert contents(run, 2, file) == contents(run, 1, file)
        assert contents(run, 3, file) != contents(run, 2, file)
    records = [strict(line) for line in run.metrics_file.read_text().splitlines()]
    assert [r.get("guard/skipped") for r in records] == [None, 1, None]
    assert {"loss", "grad_norm", "reward/mean", "kl/solver"} & records[1].keys() == set()
    assert records[1]["length/solver"] > 0
    games = run.games(1)
    [number] = [n for n in range(6) if f"game {n} (" in str(warned[0].message)]
    assert repr(games[number]["query"]) in str(warned[0].message)
    valid = [g for g in games if g["valid"]]
    assert games[number] == valid[1]  # the second of the queries that were answered
    assert all(a["reward"] is None and a["advantage"] is None for a in valid[1]["answers"])
    [skipped] = [e for e in events(run) if e["event"] == "skipped"]
    assert (skipped["step"], skipped["reason"]) == (1, str(warned[0].message))


@SKIPS
def test_three_in_a_row_stop_the_run_with_a_checkpoint_and_the_batch(tmp_path, monkeypatch):
    rewarding(monkeypatch, {0: math.nan, 2: math.nan, 3: math.nan, 4: math.nan})
    config = small("arena-zero", steps=8)
    with pytest.raises(NonFiniteError, match=r"step 4, .*\n.* 3 updates in a row") as stopped:
        self_play(config, tmp_path / "run")
    assert stopped.value.exit_code == 3
    run = RunFolder(tmp_path / "run")
    assert [r.get("guard/skipped") for r in run.metrics()] == [1, None, 1, 2, 3]
    assert [e["event"] for e in events(run)][-2:] == ["skipped", "stopped"]
    assert (run.checkpoints_folder / "step-000005").is_dir()
    file = run.folder / "nonfinite" / "step-000004.json"
    assert str(file) in str(stopped.value)
    batch = strict(file.read_text())
    assert batch["step"] == 4
    assert batch["rewards"][0][0] == "nan"
    challenger, *solver = batch["groups"]
    assert challenger["role"] == "challenger"
    games = run.games(4)
    valid = [g for g in games if g["valid"]]
    assert [c["text"] for c in challenger["completions"]] == [
        *(g["query"] for g in games if g["reason"] != "held_out")
    ]
    assert [c["text"] for c in solver[0]["completions"]] == [a["text"] for a in valid[0]["answers"]]
    assert valid[0]["query"] in solver[0]["prompt"]
    assert solver[0]["completions"][0]["advantage"] == "nan"
    assert all(p <= 0 for c in solver[0]["completions"] for p in c["logprobs"])
    # With the reward healthy again it goes on, from the weights of the one good step.
    resumed = self_play(run.resumed_config({}), run.folder, resume=True)
    assert [r["step"] for r in resumed.metrics()] == list(range(8))
    assert [r.get("guard/skipped") for r in resumed.metrics()][5:] == [None] * 3


def test_games_are_named_by_their_index_among_invalid_ones_too():
    posed = Posed("challenger", [], 1.0, all_queries=[Query("", False, "empty"), Query("27+48")])
    places = [("challenger", 0), ("solver", 0)]
    assert in_words(places, posed, ["27+48"]) == "challenger, game 0 (''); solver, game 1 ('27+48')"
    many = [("solver", i) for i in range(5)]  # GRPO's queries are all valid
    assert in_words(many, None, list("abcde")) == (
        "solver, game 0 ('a'), game 1 ('b'), game 2 ('c'), 2 more"
    )
    assert in_words(many[:1], None, ["\x1b[2J"]) == r"solver, game 0 ('\x1b[2J')"


class InterruptAt(Silent):
    """Presses Ctrl-C once a step has been recorded."""

    def __init__(self, step: int):
        self.at = step

    def step(self, record: dict, games: list[dict]) -> None:
        if record["step"] == self.at:
            os.kill(os.getpid(), signal.SIGINT)


@SKIPS
def test_a_resumed_run_counts_on_in_the_row(tmp_path, monkeypatch):
    config = small("arena-zero", steps=6)
    bad = {1: math.nan, 2: math.nan, 3: math.nan}
    rewarding(monkeypatch, bad)
    with pytest.raises(NonFiniteError):
        self_play(config, tmp_path / "whole")
    whole = RunFolder(tmp_path / "whole")
    monkeypatch.undo()
    rewarding(monkeypatch, bad)
    with pytest.raises(Paused):
        self_play(config, tmp_path / "part", progress=InterruptAt(2))
    part = RunFolder(tmp_path / "part")
    with pytest.raises(NonFiniteError, match=r"step 3, .*\n.* 3 updates in a row"):
        self_play(part.resumed_config({}), part.folder, resume=True)
    assert list(map(reproducible, part.metrics())) == list(map(reproducible, whole.metrics()))
    assert contents(part, 4, "optimizer.safetensors") == contents(whole, 4, "optimizer.safetensors")


def test_a_gradient_that_overflows_names_the_one_game_that_did(tmp_path, monkeypatch):
    # 3e38 is finite in float32, and so is the loss; the square of its gradient is not.
    rewarding(monkeypatch, {1: 3e38}, place=(4, 1))
    with pytest.warns(UserWarning, match=r"^step 1, solver, game 4 \('.+'\): the loss is .* inf"):
        run = self_play(small("arena-grpo", steps=2, **ONE_STEP), tmp_path / "run")
    for file in ("model/model.safetensors", "optimizer.safetensors"):
        assert contents(run, 2, file) == contents(run, 1, file)
    record = list(run.metrics())[1]
    assert record["guard/skipped"] == 1
    assert record["reward/mean"] > 1e36
    assert {"loss", "grad_norm"} & record.keys() == set()


@pytest.mark.parametrize(("role", "place"), [("challenger", (0, 3)), ("solver", (2, 1))])
def test_log_probs_that_are_not_finite_name_role_and_game(role, place, tmp_path, monkeypatch):
    sample = TransformersSampler.sample

    def damaged(self: Any, prompts: Any, n: int, of: str, *rest: Any) -> Any:
        groups = sample(self, prompts, n, of, *rest)
        if (of, self.step) == (role, 0):
            completions = groups[place[0]].completions
            bad = completions[place[1]]
            completions[place[1]] = bad._replace(logprobs=[-math.inf, *bad.logprobs[1:]])
        return groups

    monkeypatch.setattr(TransformersSampler, "sample", damaged)
    config = small("arena-zero", steps=2, **ONE_STEP)
    with pytest.warns(UserWarning, match="sampler's log-probs are not finite") as warned:
        run = self_play(config, tmp_path / "run")
    reason = str(warned[0].message)
    games = run.games(0)
    if role == "challenger":
        concerned = [g for g in games if g["reason"] != "held_out"][3]
    else:
        concerned = [g for g in games if g["valid"]][2]
    assert reason.startswith(
        f"step 0, {role}, game {concerned['index']} ({concerned['query']!r}): "
    )
    # Weights that say so of their own samples are not checkpointed: they could displace good ones.
    assert [c.name for c in sorted(run.checkpoints_folder.iterdir())] == ["step-000002"]


def test_a_self_reward_that_is_not_finite_skips_the_update(tmp_path, monkeypatch):
    sample = TransformersSampler.sample

    def damaged(self: Any, prompts: Any, n: int, of: str, *rest: Any) -> Any:
        groups = sample(self, prompts, n, of, *rest)
        if of == "judge" and self.step == 0:
            reply = Completion([5], "<score>7</score>", [math.nan], "stop")
            groups[0] = groups[0]._replace(completions=[reply])
        return groups

    monkeypatch.setattr(TransformersSampler, "sample", damaged)
    config = small(steps=1, self_reward={"mode": "generate", "max_tokens": 4})
    with pytest.warns(UserWarning, match=r"step 0, solver, game .*: the quality self-reward is"):
        run = self_play(config, tmp_path / "run")
    assert next(run.metrics())["guard/skipped"] == 1
    assert any(a["quality"] is None for g in run.games(0) for a in g["answers"])


# ---------------------------------------------------------------- memory


def forward_limit(monkeypatch: Any, most: int, error: Exception) -> list[int]:
    """Learning passes of more than `most` completions raise `error`; their sizes are returned."""
    import language_self_play.learner as learner

    compute, sizes = learner.completion_logprobs, []

    def limited(model: Any, batch: Any, *rest: Any) -> Any:
        sizes.append(batch.index_BK.numel())
        if sizes[-1] > most:
            raise error
        return compute(model, batch, *rest)

    monkeypatch.setattr(learner, "completion_logprobs", limited)
    return sizes


@pytest.mark.parametrize("kind", OUT_OF_MEMORY)
def test_learning_without_memory_halves_its_batches_and_learns_the_same(
    kind, tmp_path, monkeypatch
):
    config = small("arena-zero", steps=2, learner={"lr": 1e-3}, checkpoint={"every": 1})
    whole = self_play(config, tmp_path / "whole")
    sizes = forward_limit(monkeypatch, 4, OUT_OF_MEMORY[kind])
    halved = self_play(config, tmp_path / "halved")
    refused = [i for i, size in enumerate(sizes) if size > 4]
    assert 1 <= len(refused) <= 4  # in the first step alone: the size is kept
    assert max(refused) < len(sizes) / 2
    from safetensors.torch import load

    # After one step AdamW's first moment is a tenth of the gradient.
    one, other = (
        torch.cat([m.flatten() for k, m in sorted(load(file).items()) if k.endswith(":exp_avg")])
        for file in (contents(r, 1, "optimizer.safetensors") for r in (whole, halved))
    )
    assert one.norm() > 0.01
    assert (other - one).norm() <= 1e-5 * one.norm()
    for record, same in zip(halved.metrics(), whole.metrics(), strict=True):
        assert reproducible(record) == pytest.approx(reproducible(same), rel=1e-4, abs=1e-6)
        assert record["memory/micro_batch_tokens"] < 200
    assert "memory/micro_batch_tokens" not in next(whole.metrics())
    [told] = [e for e in events(halved) if e["event"] == "out_of_memory"]
    assert told["step"] == 0
    assert told["memory/micro_batch_tokens"] == record["memory/micro_batch_tokens"]
    # A resumed run begins with what fitted.
    resumed = self_play(halved.resumed_config({"steps": 3}), halved.folder, resume=True)
    assert list(resumed.metrics())[2]["memory/micro_batch_tokens"] < 200
    assert len([e for e in events(resumed) if e["event"] == "out_of_memory"]) == 1


def test_one_completion_without_memory_is_one_sentence_after_a_checkpoint(tmp_path, monkeypatch):
    config = small("arena-zero", checkpoint={"every": 100})
    whole = self_play(config, tmp_path / "whole")
    step = Learner.step
    with monkeypatch.context() as patch:

        def limited(self: Any, solved: Any, posed: Any, alpha: float, number: int) -> Any:
            if number == 2:
                forward_limit(patch, 0, OUT_OF_MEMORY["torch"])
            return step(self, solved, posed, alpha, number)

        patch.setattr(Learner, "step", limited)
        with pytest.raises(MemoryLimitError, match=r"^cpu has no memory left .* lower") as stopped:
            self_play(config, tmp_path / "part")
    assert stopped.value.exit_code == 2
    part = RunFolder(tmp_path / "part")
    assert (part.checkpoints_folder / "step-000002").is_dir()
    assert_same_run(whole, self_play(part.resumed_config({}), part.folder, resume=True))


def test_other_errors_of_a_pass_are_not_mistaken_for_memory(tmp_path, monkeypatch):
    forward_limit(monkeypatch, 0, RuntimeError("expected all tensors on the same device"))
    with pytest.raises(RuntimeError, match="same device"):
        self_play(small("arena-zero"), tmp_path / "run")


def test_an_update_without_memory_writes_no_checkpoint_of_half_an_update(tmp_path, monkeypatch):
    update = Optimizer.step

    def limited(self: Any, lr: float) -> None:
        if self.adamw.state and next(iter(self.adamw.state.values()))["step"] == 2:
            with torch.no_grad():
                next(iter(self.weights.values())).zero_()
            raise OUT_OF_MEMORY["torch"]
        update(self, lr)

    config = small("arena-zero", steps=3, checkpoint={"every": 1})
    whole = self_play(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(Optimizer, "step", limited)
        with pytest.raises(MemoryLimitError, match=r"^step 2: cpu has no memory left .* from its"):
            self_play(config, tmp_path / "part")
    part = RunFolder(tmp_path / "part")
    assert not (part.checkpoints_folder / "step-000003").exists()
    assert_same_run(whole, self_play(part.resumed_config({}), part.folder, resume=True))


@pytest.mark.parametrize("kind", OUT_OF_MEMORY)
def test_sampling_without_memory_halves_its_batches_and_draws_the_same(kind, tmp_path, monkeypatch):
    config = small("arena-zero", steps=2)
    whole = self_play(config, tmp_path / "whole")
    decode, refused = TransformersSampler._decode, []

    def limited(self: Any, decoding: Any, rows: list, *rest: Any) -> Any:
        if len(rows) > 4:
            refused.append(len(rows))
            raise OUT_OF_MEMORY[kind]
        return decode(self, decoding, rows, *rest)

    monkeypatch.setattr(TransformersSampler, "_decode", limited)
    halved = self_play(config, tmp_path / "halved")
    assert refused == [6]  # the six queries of the first step: then 3 at once
    for step in range(2):
        one, other = whole.games(step), halved.games(step)
        assert [g["query"] for g in one] == [g["query"] for g in other]
        assert [[a["text"] for a in g["answers"]] for g in one] == [
            [a["text"] for a in g["answers"]] for g in other
        ]
    assert [r["memory/rollout_batch_size"] for r in halved.metrics()] == [3, 3]
    [told] = [e for e in events(halved) if e["event"] == "out_of_memory"]
    assert told["memory/rollout_batch_size"] == 3


def test_the_judges_replies_without_memory_are_halved_told_and_taken_up_again(
    tmp_path, monkeypatch
):
    judging = {"mode": "generate", "max_tokens": 8}
    config = small("arena", steps=2, self_reward=judging, checkpoint={"every": 1})
    whole = self_play(config, tmp_path / "whole")
    decode, rows_of_judge = TransformersSampler._decode, []

    def limited(self: Any, decoding: Any, rows: list, *rest: Any) -> Any:
        if self.prompt_tokens < math.inf:  # the judge's
            rows_of_judge.append(len(rows))
            if len(rows) > 5:
                raise OUT_OF_MEMORY["cpu"]
        return decode(self, decoding, rows, *rest)

    monkeypatch.setattr(TransformersSampler, "_decode", limited)
    halved = self_play(config, tmp_path / "halved")
    # At most 18 pairs, which are 9 and then 4 at once, or fewer where pairs are equal.
    size = next(halved.metrics())["memory/judge_batch_size"]
    assert size in (2, 3, 4, 5)
    for step in range(2):
        for one, other in zip(whole.games(step), halved.games(step), strict=True):
            assert [a["text"] for a in one["answers"]] == [a["text"] for a in other["answers"]]
            assert [a["quality"] for a in one["answers"]] == [
                a["quality"] for a in other["answers"]
            ]
    records = list(halved.metrics())
    assert [r["memory/judge_batch_size"] for r in records] == [size, size]
    assert not any("memory/rollout_batch_size" in r for r in records)  # the players' goes on whole
    [told] = [e for e in events(halved) if e["event"] == "out_of_memory"]
    assert (told["step"], told["memory/judge_batch_size"]) == (0, size)
    del rows_of_judge[:]
    self_play(halved.resumed_config({"steps": 3}), halved.folder, resume=True)
    assert max(rows_of_judge) <= size
    assert len([e for e in events(halved) if e["event"] == "out_of_memory"]) == 1


def rows_limit(monkeypatch: Any, place: str, most: int) -> list[int]:
    """Calls of the function at `place`, whose second argument or third is a list of rows, likewise."""
    module, _, name = place.rpartition(".")
    compute, sizes = getattr(importlib.import_module(module), name), []

    def limited(*args: Any) -> Any:
        sizes.append(next(len(rows) for rows in args if isinstance(rows, list)))
        if sizes[-1] > most:
            raise OUT_OF_MEMORY["torch"]
        return compute(*args)

    monkeypatch.setattr(place, limited)
    return sizes


@pytest.mark.parametrize(
    ("place", "metric"),
    [
        ("language_self_play.rewards.self_reward.next_logits", "memory/judge_batch_tokens"),
        ("language_self_play.evaluate.accuracy._one_batch", "memory/eval_batch_tokens"),
    ],
)
def test_scoring_and_evaluation_without_memory_are_halved_told_and_taken_up_again(
    place, metric, tmp_path, monkeypatch
):
    config = small("arena", steps=2, eval={"tasks": ["arena"]}, checkpoint={"every": 1})
    whole = self_play(config, tmp_path / "whole")
    sizes = rows_limit(monkeypatch, place, 4)
    halved = self_play(config, tmp_path / "halved")
    refused = [i for i, size in enumerate(sizes) if size > 4]
    assert 1 <= len(refused) < 10
    assert max(refused) < len(sizes) / 2  # at the beginning alone: the size is kept
    for record, same in zip(halved.metrics(), whole.metrics(), strict=True):
        assert reproducible(record) == pytest.approx(reproducible(same), rel=1e-4, abs=1e-6)
    records = list(halved.metrics())[:2]
    assert records[0][metric] == records[1][metric] < config.learner.tokens_per_micro_batch
    [told] = [e for e in events(halved) if e["event"] == "out_of_memory"]
    assert (told["step"], told[metric]) == (0, records[0][metric])
    del sizes[:]
    self_play(halved.resumed_config({"steps": 3}), halved.folder, resume=True)
    assert max(sizes) <= 4


def test_an_update_without_room_ends_the_run_with_a_checkpoint_of_its_step(tmp_path, monkeypatch):
    config = small("arena-zero", steps=3, checkpoint={"every": 100})
    whole = self_play(config, tmp_path / "whole")
    room = Optimizer.room

    def full(self: Any) -> int:
        if next(iter(self.adamw.state.values()))["step"] == 2:
            raise OUT_OF_MEMORY["cpu"]
        return room(self)

    with monkeypatch.context() as patch:
        patch.setattr(Optimizer, "room", full)
        with pytest.raises(MemoryLimitError, match=r"no memory left to compute an update in"):
            self_play(config, tmp_path / "part")
    part = RunFolder(tmp_path / "part")
    assert (part.checkpoints_folder / "step-000002").is_dir()
    assert_same_run(whole, self_play(part.resumed_config({}), part.folder, resume=True))


def test_sampling_that_holds_not_one_row_says_so(tmp_path, monkeypatch):
    def limited(*_: Any) -> None:
        raise OUT_OF_MEMORY["cpu"]

    monkeypatch.setattr(TransformersSampler, "_decode", limited)
    with pytest.raises(MemoryLimitError, match=r"lower challenger\.max_tokens"):
        self_play(small("arena-zero"), tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / "step-000000").is_dir()


@pytest.mark.parametrize("error", [RewardError("reward.main: raised"), OUT_OF_MEMORY["torch"]])
def test_a_run_that_fails_in_a_reward_keeps_the_steps_before(error, tmp_path, monkeypatch):
    config = small("arena-zero", checkpoint={"every": 100})
    whole = self_play(config, tmp_path / "whole")
    answers, calls = ArenaVerifier.__call__, iter(range(99))

    def fails(self: Any, *args: Any) -> Any:
        if next(calls) == 2:
            raise error
        return answers(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(ArenaVerifier, "__call__", fails)
        expected = MemoryLimitError if isinstance(error, RuntimeError) else RewardError
        with pytest.raises(expected):
            self_play(config, tmp_path / "part")
    part = RunFolder(tmp_path / "part")
    assert events(part)[-1]["event"] == "failed"
    assert (part.checkpoints_folder / "step-000002").is_dir()
    assert_same_run(whole, self_play(part.resumed_config({}), part.folder, resume=True))
