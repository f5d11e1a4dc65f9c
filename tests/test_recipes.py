"""The shipped recipes: each validates, says where its values come from, and has its page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from language_self_play.config import Config
from language_self_play.recipe_files import load_recipe, recipe_names, recipe_text

DOCS = Path(__file__).parents[1] / "docs" / "recipes"
PAPER = ["lsp-paper", "lsp-zero-paper", "grpo-paper"]
OURS = ["lora-16gb", "math-majority", "judge"]
ARENA = ["arena", "arena-grpo", "arena-zero"]

# Each page sums its table of memory; recounted here from the architectures, in GB of 10^9 bytes.
LLAMA_3B = 3_212_749_824
QWEN_HALF_B, QWEN_1_5B, REWARD_0_6B = 494_032_768, 1_543_714_304, 596_049_920


def page(name: str) -> str:
    return (DOCS / f"{name}.md").read_text("utf-8")


def settings_of(name: str) -> dict[str, str]:
    """`section.field` -> the comment behind it, for each line of a recipe that sets something."""
    section, found = "", {}
    for line in recipe_text(name).splitlines():
        if header := re.fullmatch(r"\[([\w.]+)\]", line):
            section = f"{header[1]}."
        elif line and not line.startswith("#"):
            setting, comment = re.fullmatch(r"(\w+) = .*?(?:\s+# (.*))?", line).groups()
            found[section + setting] = comment or ""
    return found


def test_these_are_all_the_recipes():
    assert recipe_names() == sorted(PAPER + OURS + ARENA)


@pytest.mark.parametrize("name", sorted(PAPER + OURS + ARENA))
def test_every_recipe_is_valid_and_begins_with_what_it_is(name):
    Config.from_recipe(name)
    first = recipe_text(name).splitlines()[0]
    assert re.fullmatch(r"# [A-Z].{40,97}\.", first)


@pytest.mark.parametrize("name", PAPER + OURS)
def test_every_recipe_has_a_page_that_says_what_was_not_run(name):
    text = page(name)
    assert text.startswith(f"# {name}\n")
    assert f"lsp train {name}" in text
    assert "\n## Memory, by arithmetic\n" in text
    verified = text[text.index("## Verified, and not") :]
    unrun = "nothing at 3B was run here" if name in PAPER else "it was not run"
    assert f"- Not verified: **{unrun}**" in verified
    assert f"docs/recipes/{name}.md" in recipe_text(name)


def test_the_table_of_recipes_lists_each_once():
    rows = re.findall(r"^\| \[([\w-]+)\]\(([\w./-]+)\)", page("README"), re.M)
    assert sorted(name for name, _ in rows) == recipe_names()
    for name, link in rows:
        assert link == ("../arena.md" if name in ARENA else f"{name}.md")
        assert (DOCS / link).is_file()


# ---------------------------------------------------------------- the paper's values


@pytest.mark.parametrize("name", PAPER)
def test_every_line_of_the_papers_recipes_says_whether_it_is_the_papers(name):
    comments = settings_of(name)
    assert len(comments) > 20
    unmarked = {s for s, c in comments.items() if not re.match(r"(paper|ours)(:|$)", c)}
    assert unmarked == set()


@pytest.mark.parametrize(
    ("name", "algorithm", "lr"),
    [
        ("lsp-paper", "lsp", 3e-6),
        ("lsp-zero-paper", "lsp-zero", 3e-6),
        ("grpo-paper", "grpo", 1e-6),
    ],
)
def test_the_papers_recipes_hold_the_values_of_appendix_c(name, algorithm, lr):
    config = Config.from_recipe(name)
    assert config.algorithm == algorithm
    assert config.steps == 1500
    assert config.policy.path == "meta-llama/Llama-3.2-3B-Instruct"
    assert config.policy.lora is None
    assert config.challenger.num_queries == 8
    assert config.solver.beta == 0.05
    assert config.learner.lr == lr
    assert config.learner.aggregation == "sequence"
    [reward] = config.reward.values()
    assert (reward.kind, reward.weight, reward.bound) == ("reward_model", 1.0, "none")
    assert reward.path == "Skywork/Skywork-Reward-V2-Llama-3.2-3B"
    if algorithm == "grpo":
        assert config.data.path == "tatsu-lab/alpaca"
    else:
        assert config.challenger.beta == 0.05
        assert config.challenger.objective == "hardness"
    if algorithm == "lsp":
        assert (config.self_reward.mode, config.self_reward.weight) == ("generate", 1.0)


@pytest.mark.parametrize("name", PAPER)
def test_what_the_paper_gives_is_marked_as_the_papers_and_nothing_else_is(name):
    given = {
        *("algorithm", "steps", "policy.path", "solver.beta", "learner.lr"),
        *("challenger.num_queries", "reward.skywork.kind", "reward.skywork.path"),
    }
    if name == "grpo-paper":
        given |= {"data.path"}
    else:
        given |= {"challenger.beta", "challenger.objective", "learner.aggregation"}
    if name == "lsp-paper":
        given |= {"self_reward.mode", "self_reward.weight"}
    marked = {s for s, comment in settings_of(name).items() if comment.startswith("paper")}
    assert marked == given


def test_the_two_games_of_the_paper_differ_in_the_self_reward_alone():
    lsp, zero = load_recipe("lsp-paper"), load_recipe("lsp-zero-paper")
    assert lsp.pop("self_reward")
    assert (lsp.pop("algorithm"), zero.pop("algorithm")) == ("lsp", "lsp-zero")
    assert lsp == zero


def test_grpo_differs_from_the_game_in_its_queries_and_learning_rate():
    zero, grpo = load_recipe("lsp-zero-paper"), load_recipe("grpo-paper")
    assert grpo.pop("data") == {"path": "tatsu-lab/alpaca"}
    assert (zero.pop("algorithm"), grpo.pop("algorithm")) == ("lsp-zero", "grpo")
    assert (zero["learner"].pop("lr"), grpo["learner"].pop("lr")) == (3e-6, 1e-6)
    assert zero.pop("challenger")["num_queries"] == grpo.pop("challenger")["num_queries"] == 8
    assert zero == grpo


# ---------------------------------------------------------------- ours


@pytest.mark.parametrize("name", OURS)
def test_our_recipes_train_adapters_with_rewards_and_qualities_of_one_scale(name):
    config = Config.from_recipe(name)
    assert config.policy.lora is not None
    # R_Q is 0 to 7; what is added to it is 0 to 1.
    assert 0.9 < 7 * config.self_reward.weight < 1.1
    [reward] = config.reward.values()
    assert reward.kind in ("majority", "judge") or reward.bound == "sigmoid"


# ---------------------------------------------------------------- memory on the pages


def cache(layers: int, heads: int, size: int, rows: int, tokens: int) -> int:
    return 2 * layers * heads * size * 2 * rows * tokens


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # Three models in bfloat16, 16 bytes a parameter of training, the largest passing part.
        ("lsp-paper", LLAMA_3B * (3 * 2 + 16) + cache(28, 8, 128, 32, 2030)),
        ("lsp-zero-paper", LLAMA_3B * (3 * 2 + 16) + cache(28, 8, 128, 32, 256 + 1024)),
        ("grpo-paper", LLAMA_3B * (3 * 2 + 16) + cache(28, 8, 128, 32, 256 + 1024)),
        (
            "lora-16gb",
            (QWEN_HALF_B + REWARD_0_6B) * 2
            + 8_798_208 * 16
            + 24 * ((8 * 896 + 4 * 4864) * 2 + (6 * 896 + 4864) * 4) * 4096
            + 2**25 * 4 * 4,
        ),
        ("math-majority", QWEN_1_5B * 2 + 18_464_768 * 16 + cache(28, 2, 128, 128, 256 + 1024)),
        (
            "judge",
            QWEN_1_5B * 2
            + 18_464_768 * 16
            + 28 * 8192 * 1536 * 2
            + ((8 * 1536 + 4 * 8960) * 2 + (6 * 1536 + 8960) * 4) * 8192
            + 2**25 * 4 * 4,
        ),
    ],
)
def test_the_sum_on_a_page_is_that_of_its_recipes_arithmetic(name, expected):
    [stated] = re.findall(r"^\| \*\*sum\*\* \|.*\*\*([\d.]+)\*\* \|$", page(name), re.M)
    assert float(stated) == pytest.approx(expected / 1e9, abs=0.06)


def test_the_sizes_behind_the_arithmetic_are_those_of_the_recipes():
    for name in PAPER:
        config = Config.from_recipe(name)
        assert config.rollout.batch_size == 32
        assert config.solver.max_tokens == 1024
        assert config.learner.tokens_per_micro_batch == 8192
        assert config.learner.gradient_checkpointing
        assert config.learner.optimizer == "adamw_fused"
    lora, vote, judge = map(Config.from_recipe, OURS)
    assert lora.learner.tokens_per_micro_batch == 4096
    assert not lora.learner.gradient_checkpointing
    assert (vote.rollout.batch_size, vote.solver.max_tokens) == (128, 1024)
    assert vote.challenger.num_queries * vote.solver.group_size == 128
    assert judge.learner.tokens_per_micro_batch == 8192
    assert judge.learner.gradient_checkpointing
    assert {c.policy.lora.rank for c in (lora, vote, judge)} == {16}
