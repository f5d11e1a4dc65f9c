"""What a step may come to at its edges: each has a defined outcome, never NaN, never a crash."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from language_self_play import Config, self_play
from language_self_play.advantages import centre, challenger_advantages
from language_self_play.distributed import Place, Ranks
from language_self_play.errors import ConfigError
from language_self_play.game import check_engine, check_without_weights
from language_self_play.model_paths import BUILT_IN_MODEL, resolve_model
from language_self_play.rewards.arena import ArenaVerifier
from language_self_play.run_folder import RunFolder
from test_train import reproducible, small

REJECTED = {"guard/skipped"}


@pytest.fixture
def play(tmp_path: Path) -> Callable[..., RunFolder]:
    """play(config): a run whose every number is finite and whose every update was made."""

    def play(config: Config) -> RunFolder:
        run = self_play(config, tmp_path / f"run-{len(list(tmp_path.iterdir()))}")
        for line in run.metrics_file.read_text().splitlines():
            record = json.loads(line, parse_constant=pytest.fail)
            assert not REJECTED & record.keys()
            if "loss" in record:
                assert math.isfinite(record["loss"])
                assert math.isfinite(record["grad_norm"])
        weights = load_file(run.model_folder / "model.safetensors")
        assert all(weight.isfinite().all() for weight in weights.values())
        return run

    return play


def moved(run: RunFolder) -> float:
    """The norm of what learning changed in all weights of the arena's model."""
    before = load_file(Path(resolve_model(BUILT_IN_MODEL)) / "model.safetensors")
    after = load_file(run.model_folder / "model.safetensors")
    return sum(float((after[k] - before[k].float()).square().sum()) for k in after) ** 0.5


def constant(monkeypatch: Any, value: float) -> None:
    monkeypatch.setattr(
        ArenaVerifier,
        "__call__",
        lambda self, queries, answers, keys: [[value] * len(group) for group in answers],
    )


@pytest.mark.parametrize("algorithm", ["arena", "arena-zero"])
def test_a_step_without_a_valid_query_teaches_nothing(algorithm, play):
    # One token is a cut-off query.
    run = play(small(algorithm, steps=2, challenger={"max_tokens": 1, "beta": 0.0}))
    assert moved(run) == 0.0
    for record in run.metrics():
        assert record["queries/valid_fraction"] == 0.0
        assert record["queries/invalid/truncated"] == 1.0
        assert not {"reward/mean", "quality/mean", "kl/solver", "length/solver"} & record.keys()
        assert (record["loss"], record["grad_norm"]) == (0.0, 0.0)
    for game in run.games(0):
        assert (game["challenger_reward"], game["challenger_advantage"]) == (0.0, 0.0)
        assert game["answers"] == []


def test_groups_whose_answers_are_all_masked_leave_the_loss(play):
    # One token is a cut-off answer.
    config = {"solver": {"max_tokens": 1, "truncated": "mask"}, "challenger": {"beta": 0.0}}
    config["challenger"]["alpha"] = 0.0
    run = play(small("arena-zero", steps=1, **config))
    assert moved(run) == 0.0
    record = next(run.metrics())
    assert record["truncated/solver"] == 1.0
    assert not {"kl/solver", "entropy/solver"} & record.keys()
    assert record["entropy/challenger"] > 0


@pytest.mark.parametrize("reward", [0.1, 0.7, 5.3])
def test_equal_rewards_have_advantages_of_exactly_zero(reward):
    for size in range(2, 65):
        assert centre(torch.full((3, size), reward)).abs().max() == 0.0
        R = torch.full((3, size), reward)
        assert challenger_advantages(R, torch.zeros_like(R), [True] * 3).abs().max() == 0.0


def test_equal_rewards_without_a_kl_term_move_no_weight(play, monkeypatch):
    constant(monkeypatch, 0.1)
    # AdamW would make a whole step of the rounding of eight times 0.1.
    table = {"steps": 2, "solver": {"group_size": 8}, "learner": {"lr": 1e-3}}
    table["solver"]["beta"] = 0.0
    still = play(small("arena-zero", challenger={"beta": 0.0}, **table))
    assert moved(still) == 0.0
    rewards = {a["reward"] for g in still.games(1) for a in g["answers"]}
    assert rewards == {torch.tensor(0.1).item()}


def test_one_valid_query_among_invalid_ones_earns_what_they_do(play, monkeypatch):
    import language_self_play.players as players

    parse, seen = players.parse_query, []

    def only_first(text: str, template: str, truncated: bool) -> Any:
        seen.append(text)
        parsed = parse(text, template, truncated)
        return parsed if len(seen) == 1 else parsed._replace(reason="template")

    monkeypatch.setattr(players, "parse_query", only_first)
    run = play(small("arena-zero", steps=1))
    games = run.games(0)
    assert [g["valid"] for g in games] == [True, *[False] * 5]
    # An invalid query earns the smallest reward of the valid ones, here the only one.
    assert len({g["challenger_reward"] for g in games}) == 1
    assert {g["challenger_advantage"] for g in games} == {0.0}


@pytest.mark.parametrize("algorithm", ["arena", "arena-zero"])
def test_a_step_whose_queries_are_all_held_out_teaches_nothing(algorithm, play, monkeypatch):
    from language_self_play.arena import tasks

    monkeypatch.setattr(tasks, "is_held_out_query", lambda query: True)
    import language_self_play.players as players

    parse = players.parse_query  # every text counts, so that none is invalid
    monkeypatch.setattr(players, "parse_query", lambda *a: parse(*a)._replace(reason=None))
    run = play(small(algorithm, steps=2))
    assert moved(run) == 0.0
    record = next(run.metrics())
    assert record["queries/heldout_fraction"] == 1.0
    assert record["queries/valid_fraction"] == 0.0
    assert all(g["challenger_advantage"] is None for g in run.games(0))


def saved(model: Any, tokenizer: Any, folder: Path) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def grpo(tmp_path, monkeypatch) -> Callable[..., Config]:
    """grpo(path, queries): the Solver's half on `queries`, its reward the answer's length."""
    (tmp_path / "answer_length.py").write_text(
        "def reward(queries, answers):\n    return [float(len(a)) for a in answers]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))

    def config(path: str, queries: list[str], **overrides: Any) -> Config:
        data = tmp_path / "queries.jsonl"
        data.write_text("".join(json.dumps({"query": q}) + "\n" for q in queries))
        table = {
            "algorithm": "grpo",
            "steps": 2,
            "threads": 1,
            "data": {"path": str(data)},
            "policy": {"path": path},
            "challenger": {"num_queries": 2},
            "reward": {"length": {"kind": "python", "function": "answer_length:reward"}},
            "solver": {"group_size": 3, "max_tokens": 6},
            "log": {"progress": "none"},
        }
        return Config.from_table({**table, **overrides})

    return config


def test_answers_that_stop_at_once_are_empty_and_learned_from(
    make_markov_model, tokenizer, grpo, play, tmp_path
):
    path = saved(make_markov_model({}), tokenizer, tmp_path / "silent")
    run = play(grpo(path, ["27+48", "1+1"]))
    for record in run.metrics():
        # The stop token is the whole answer, and certain.
        assert (record["length/solver"], record["truncated/solver"]) == (1.0, 0.0)
        assert record["entropy/solver"] == pytest.approx(0.0, abs=1e-5)
        assert (record["reward/mean"], record["reward/std"]) == (0.0, 0.0)
    assert {(a["text"], a["tokens"]) for g in run.games(0) for a in g["answers"]} == {("", 1)}


def test_queries_that_stop_at_once_are_invalid(make_markov_model, tokenizer, play, tmp_path):
    path = saved(make_markov_model({}), tokenizer, tmp_path / "silent")
    run = play(small("arena-zero", steps=1, policy={"path": path}))
    record = next(run.metrics())
    assert record["queries/invalid/empty"] == 1.0
    assert record["length/challenger"] == 1.0


def test_an_answer_that_meets_the_contexts_end_is_cut_there(
    make_model, tokenizer, grpo, play, tmp_path, monkeypatch
):
    import language_self_play.game as game
    from language_self_play.chat import Chat

    query = "27+48"
    prompt = len(Chat(tokenizer, [tokenizer.eos_token_id], {}).encode(query))
    path = saved(make_model("llama", context=prompt + 2), tokenizer, tmp_path / "short")
    run = play(grpo(path, [query, query]))
    answers = [a for g in run.games(0) for a in g["answers"]]
    assert max(a["tokens"] for a in answers) == 2
    assert all(a["finish_reason"] == "length" or a["tokens"] <= 2 for a in answers)
    # A query that fills the context leaves no room for an answer.
    full = grpo(path, [query, query + "1+"])  # exactly as long as the context
    monkeypatch.setattr(game, "load_policy", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(
        ConfigError,
        match=rf"^\S+\.jsonl:2: the query takes {prompt + 2} tokens with the chat template, and the"
        rf" model's context has only {prompt + 2}; remove it",
    ):
        self_play(full, tmp_path / "full")
    assert not (tmp_path / "full").exists()


def test_a_query_that_meets_the_contexts_end_is_truncated(make_model, tokenizer, play, tmp_path):
    from language_self_play.arena.tiny_model import POSE_PROMPT
    from language_self_play.chat import Chat

    chat = Chat(tokenizer, [len(tokenizer)], {})
    room = 3
    context = len(chat.encode(POSE_PROMPT)) + room
    path = saved(make_model("llama", context=context), tokenizer, tmp_path / "short")
    run = play(small("arena-zero", steps=1, policy={"path": path}))
    games = [g for g in run.games(0) if g["reason"] == "truncated"]
    assert games
    assert next(run.metrics())["length/challenger"] <= room
    # One token less and there is no room at all: that is said before anything is played.
    path = saved(make_model("llama", context=context - room), tokenizer, tmp_path / "none")
    with pytest.raises(ConfigError, match=r"challenger\.prompt: takes \d+ tokens"):
        self_play(small("arena-zero", steps=1, policy={"path": path}), tmp_path / "refused")


def test_micro_batches_smaller_than_one_completion_hold_one(play):
    table = {"steps": 1, "learner": {"lr": 1e-3}}
    whole = play(small("arena-zero", **table))
    table["learner"] = {"lr": 1e-3, "tokens_per_micro_batch": 1}
    single = play(small("arena-zero", **table))
    [one, *_], [other, *_] = (list(map(reproducible, r.metrics())) for r in (whole, single))
    assert other == pytest.approx(one, rel=1e-4, abs=1e-6)


# ---------------------------------------------------------------- with vLLM


def test_the_engines_own_context_is_looked_at_before_weights_load(make_config, monkeypatch):
    monkeypatch.setattr("language_self_play.game.check_vllm", lambda config: None)

    def vllm(context: int) -> Config:
        return make_config(rollout={"engine": "vllm", "vllm": {"context": context}})

    check_without_weights(vllm(128))  # the arena's own
    # The arena's challenger prompt has 3 tokens.
    with pytest.raises(
        ConfigError,
        match=r"^challenger\.prompt: takes 3 tokens, and rollout\.vllm\.context is only 3; use a shorter prompt",
    ):
        check_without_weights(vllm(3))


def test_of_several_ranks_an_engine_is_given_up_before_the_others_are(make_config, monkeypatch):
    monkeypatch.setattr("language_self_play.game.check_vllm", lambda config: None)
    two = Ranks(Place(0, 2, 0, 2))
    settings = {"rollout": {"engine": "vllm", "vllm": {"timeout_s": 1800}}}
    with pytest.raises(
        ConfigError, match=r"^rollout\.vllm\.timeout_s = 1800: the other ranks wait"
    ):
        check_engine(make_config(**settings), torch.device("cpu"), two)
    check_engine(make_config(**settings), torch.device("cpu"))
    settings["rollout"]["vllm"]["timeout_s"] = 900
    check_engine(make_config(**settings), torch.device("cpu"), two)
