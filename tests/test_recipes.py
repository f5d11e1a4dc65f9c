"""The shipped recipes: each validates, says where its values come from, and has its page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from language_self_play.config import Config
from language_self_play.recipe_files import load_recipe, recipe_names, recipe_text

DOCS = Path(__file__).parents[1] / "docs" / "recipes"
PAPER = ["lsp-paper", "lsp-zero-paper", "grpo-paper"]
OURS = ["lora-16gb", "math-majority", "judge"]
ARENA = ["arena", "arena-grpo", "arena-zero"]


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
    assert "\n## Memory, estimated\n" in text
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

LLAMA_3B: dict[str, Any] = {
    "vocab_size": 128_256,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}
QWEN_HALF_B: dict[str, Any] = {
    "vocab_size": 151_936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
QWEN_1_5B = {
    **QWEN_HALF_B,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
}
REWARD_0_6B: dict[str, Any] = {
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lsp-paper", "grpo-paper", *OURS])
def test_the_sum_on_a_page_is_the_estimate_for_its_models(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from transformers import LlamaConfig, Qwen2Config, Qwen3Config

    from language_self_play.memory import Turn, memory_estimate

    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "131072")  # the loss of the CPU's heap is no GPU's
    llama = LlamaConfig(**LLAMA_3B, num_labels=1)
    policies = {"lora-16gb": Qwen2Config(**QWEN_HALF_B)}
    policies |= dict.fromkeys(("math-majority", "judge"), Qwen2Config(**QWEN_1_5B))
    policies.get(name, llama).save_pretrained(tmp_path / "policy")
    reward = Qwen3Config(**REWARD_0_6B, num_labels=1) if name == "lora-16gb" else llama
    reward.save_pretrained(tmp_path / "reward")
    table = load_recipe(name) | {"device": "cpu", "dtype": "bfloat16"}
    table["policy"]["path"] = str(tmp_path / "policy")
    for section in table["reward"].values():
        if section["kind"] == "reward_model":
            section["path"] = str(tmp_path / "reward")
    config = Config.from_table(table)
    N, G = config.challenger.num_queries, config.solver.group_size
    query, answer = config.challenger.max_tokens, config.solver.max_tokens
    # Frames of 30 and 50 tokens, a challenger prompt of 400, a rubric of 450.
    turns, judging = [Turn(N, query + 30, G, answer)], None
    if config.algorithm == "lsp":
        turns.append(Turn(1, 400, N, query))
        written = config.self_reward.mode == "generate"
        said = query + answer + (50 if written else 450)
        judging = Turn(N * G, said, 1, config.self_reward.max_tokens if written else 1)
    estimate = memory_estimate(config, turns, judging)
    # A merged copy is held in the CPU's memory, which on a GPU is another.
    expected = sum(estimate.always.values()) + max(
        sum(parts.values()) for when, parts in estimate.phases.items() if when != "saving"
    )
    [stated] = re.findall(r"^\| \*\*sum\*\* \|.*\*\*([\d.]+)\*\* \|$", page(name), re.M)
    assert float(stated) == pytest.approx(expected / 1e9, rel=0.02)
