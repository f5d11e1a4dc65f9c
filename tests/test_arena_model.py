"""The shipped tiny model: what it is, what it can do, and that play makes it better."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest
import torch

from language_self_play.arena.tasks import describe
from language_self_play.config import Config, Sampling, SelfReward
from language_self_play.config import Policy as PolicySection
from language_self_play.evaluate.accuracy import arena_accuracy, evaluation_batches
from language_self_play.policy import Policy, load_chat_model
from language_self_play.rewards.self_reward import QualityJudge
from language_self_play.sampling.transformers import TransformersSampler

FOLDER = Path(str(resources.files("language_self_play"))) / "arena" / "model"


@pytest.fixture(scope="module")
def loaded():
    return load_chat_model(PolicySection(path="arena"), torch.device("cpu"))


def test_it_is_a_small_llama_in_float32_that_transformers_loads(loaded):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(FOLDER)
    assert model.config.model_type == "llama"
    assert sum(p.numel() for p in model.parameters()) <= 2_000_000
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert sum(f.stat().st_size for f in FOLDER.iterdir()) <= 8_000_000
    tokens = torch.tensor([loaded[0].encode("27+48")])
    assert torch.equal(model(tokens).logits, loaded[1](tokens).logits)


def test_its_tokenizer_is_the_one_that_the_recipe_builds(loaded):
    from language_self_play.arena.tiny_model import build_tokenizer

    built, saved = build_tokenizer(), loaded[0].tokenizer
    assert built.get_vocab() == saved.get_vocab()
    assert built.chat_template == saved.chat_template


def test_the_base_has_something_to_sharpen_and_room_in_every_tier(loaded):
    chat, model = loaded
    accuracy = arena_accuracy(model, chat, evaluation_batches(16_384))
    assert 0.35 < accuracy.sampled()[0] < 0.65
    easy, medium, hard = (accuracy.sampled(tier)[0] for tier in accuracy.tiers())
    assert easy > medium > hard > 0.25
    assert accuracy.greedy()[0] > accuracy.sampled()[0] + 0.2


def test_it_poses_mostly_solvable_and_mostly_easy_queries(loaded):
    chat, model = loaded
    sampler = TransformersSampler(model, chat, seed=0, batch_size=256)
    prompt = chat.encode("Pose one task.")
    [group] = sampler.sample([prompt], 200, "challenger", Sampling(), 20)
    known = [describe(c.text) for c in group.completions]
    tiers = [k["tier"] for k in known if k["tier"]]
    assert len(tiers) > 160
    assert tiers.count("easy") > tiers.count("medium") > tiers.count("hard") > 0


def test_it_judges_a_well_posed_query_above_an_impossible_one(loaded):
    chat, model = loaded
    sampler = TransformersSampler(model, chat, seed=0, batch_size=256)
    settings = SelfReward(mode="expected", rubric="arena")
    judge = QualityJudge(sampler, settings, 4_096, Policy(model, chat, model).as_reference)
    good = judge.score([("27+48", "57"), ("reverse kite", "etik"), ("sort cab", "abc")])
    impossible = judge.score(
        [("3-7", "4"), ("05+7", "21"), ("386-", "683"), ("54321*9", "988884"), ("sort b", "b")]
    )
    assert min(good) > 5.0
    assert max(impossible) < 2.0


@pytest.mark.slow
def test_twenty_steps_of_play_raise_held_out_accuracy(tmp_path):
    from language_self_play import self_play

    config = Config.from_recipe("arena", steps=20, log={"progress": "none"})
    records = list(self_play(config, tmp_path / "run").metrics())
    before, after = records[0], records[-1]
    # 56.6 % before; about 70 % after on the machine where the recipe was made.
    assert after["eval/sampled_accuracy"] > before["eval/sampled_accuracy"] + 0.08
    assert after["eval/greedy_accuracy"] > before["eval/greedy_accuracy"] - 0.02
