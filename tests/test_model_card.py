"""The model card: what it says of a run, what it keeps to itself, and texts that can't break out."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import get_args

import pytest
from huggingface_hub import ModelCard, ModelCardData
from markdown_it import MarkdownIt

from language_self_play import Config, self_play
from language_self_play.config import Reward
from language_self_play.markdown import block, code, escaped, fence, sparkline
from language_self_play.model_card import REWARDS, hub_id, model_card, with_hub_id
from language_self_play.run_folder import RunFolder

HUB_BASE = "Qwen/Qwen2.5-0.5B-Instruct"
SECTIONS = ["How to load it", "What it was rewarded for", "Evaluation", "Curves", "Example games"]
SECTIONS += ["Settings", "Limits", "Citation"]

# Everything by which a text could leave a code block, a table's cell, a span or the metadata.
HOSTILE = [
    "```\n# out\n```",
    "````text\n```\n~~~\n<script>alert(1)</script>",
    "    ```\n    indented",
    "---\nlicense: mit\n---",
    "</code></pre><img src=x onerror=alert(1)>",
    "a | b\n| --- | --- |\n| c | d |",
    "`x` ``y`` [link](javascript:alert(1)) ![i](http://evil.test/i.png)",
    "\x1b[2J\x00\x07\rover\u202egnp.exe\u2028line\x85",
    "<!-- \n\n## Heading\n\n- item\n\n***\n> quote",
    "\ud800 half a pair",
    "$$\\href{javascript:1}{x}$$ @everyone :smile: https://evil.test www.evil.test",
]


@pytest.fixture
def make_run(tmp_path, make_config):
    """make_run(records, games, **settings): a run folder with these metrics and games."""

    def make(records=(), games=(), name="run", **settings):
        run = RunFolder(tmp_path / name)
        run.create(make_config(**{"steps": 40, "algorithm": "lsp", **settings}))
        for record in records:
            run.record(record, [g for g in games if g["step"] == record["step"]])
        return run

    return make


def records(count=40):
    """V̄ rises from 0 to 1; held-out accuracy is 50 % before and 75 % after."""
    for step in range(count):
        yield {
            "step": step,
            "reward/mean": step / (count - 1),
            "kl/solver": 0.0,
            "time/step_s": 1.0,
        } | (evaluation(0.5) if step == 0 else {})
    yield {"step": count} | evaluation(0.75)


def evaluation(accuracy):
    names = ("sampled", "greedy")
    return {f"eval/{n}_accuracy": accuracy for n in names} | {
        f"eval/{n}_accuracy_ci95": 0.02 for n in names
    }


def game(step, query, *answers):
    """A game whose `answers` are (text, R) pairs."""
    answers = [{"text": t, "reward": r, "quality": 0.25} for t, r in answers]
    return {"step": step, "query": query, "valid": True, "answers": answers}


GAMES = [
    game(38, "older", ("x", 1.0)),
    game(39, "middling", ("good", 1.0), ("bad", 0.0)),
    game(39, "hard", ("w", -1.0), ("v", -2.0)),
    game(39, "unanswered"),
    game(39, "easy", ("y", 2.0), ("z", 1.5)),
]


def card(run, *arguments, **keywords):
    return model_card(run.folder, *arguments, **keywords)


def body(text):
    return text.split("\n---\n", 1)[1]


def html(text):
    """The body as a reader of CommonMark with tables shows it."""
    return MarkdownIt("commonmark", {"html": True}).enable("table").render(body(text))


def section(text, title):
    return text.split(f"## {title}\n")[1].split("\n## ")[0]


def rows(text):
    """The cells of a section's table, without its rule."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines if "---" not in line
    ]


# ---------------------------------------------------------------- metadata


def metadata(text):
    data = ModelCard(text).data
    assert isinstance(data, ModelCardData)
    return data.to_dict()


def test_metadata_names_base_library_and_task_and_invents_no_license(make_run):
    run = make_run(policy={"path": HUB_BASE})
    assert metadata(card(run)) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": HUB_BASE,
        "base_model_relation": "finetune",
        "tags": ["language-self-play", "self-play", "reinforcement-learning", "lsp"],
    }


def test_an_adapters_metadata_is_pefts(make_run):
    data = metadata(card(make_run(policy={"path": HUB_BASE, "lora": {}}), "adapter"))
    assert data["library_name"] == "peft"
    assert data["base_model"] == HUB_BASE
    assert data["base_model_relation"] == "adapter"
    assert "lora" in data["tags"]


@pytest.mark.parametrize(
    "path", ["arena", "./ann/model", "/home/ann/model", "a/b/c", "~/model", "C:\\ann\\model", "."]
)
def test_a_base_that_is_not_on_the_hub_is_not_in_the_metadata(make_run, path):
    data = metadata(card(make_run(policy={"path": path})))
    assert "base_model" not in data
    assert "base_model_relation" not in data


def test_a_folder_that_looks_like_a_hub_id_is_a_folder(make_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub_id("ann/model") == "ann/model"
    (tmp_path / "ann/model").mkdir(parents=True)
    assert hub_id("ann/model") is None


def test_grpo_names_its_data_set_if_it_is_on_the_hub(make_run):
    grpo = {"algorithm": "grpo", "steps": 3}
    text = card(make_run(name="a", data={"path": "tatsu-lab/alpaca"}, **grpo))
    assert metadata(text)["datasets"] == ["tatsu-lab/alpaca"]
    assert "huggingface.co/datasets/tatsu-lab/alpaca" in text
    text = card(make_run(name="b", data={"path": "/home/ann/secret/q.jsonl"}, **grpo))
    assert "datasets" not in metadata(text)
    assert "`q.jsonl`, a file of the author's" in text
    assert "secret" not in text
    assert "wrote every query itself" not in text


# ---------------------------------------------------------------- what it says


def test_a_whole_run_has_every_section_in_order(make_run):
    text = card(make_run(records(), GAMES))
    assert re.findall("^## (.*)$", text, re.M) == SECTIONS
    assert "# run\n" in text
    for fact in (
        "**algorithm:** LSP",
        "**steps played:** 40",
        "**seed:** 0",
        "**trained:** all weights",
    ):
        assert fact in text
    assert "](https://arxiv.org/abs/2509.07414)" in text
    assert set(re.findall(r"https?://[^/)\s]+", text)) == {"https://arxiv.org"}


def test_a_curves_numbers_are_means_of_eighths_of_the_run(make_run):
    header, accuracy, reward, _ = rows(section(card(make_run(records())), "Curves"))
    # 41 records, the last of which holds an evaluation alone.
    assert header[2:] == ["0–4", "5–9", "10–14", "15–19", "20–24", "25–29", "30–34", "35–39"]
    assert accuracy[1:] == ["`▁█`", "50.0%", "–", "–", "–", "–", "–", "–", "75.0%"]
    # Steps 0 to 4 of 39: (0 + 1 + 2 + 3 + 4) / 5 / 39 = 0.0513; 35 to 39: 37 / 39 = 0.949.
    assert (reward[2], reward[9]) == ("0.0513", "0.949")
    assert reward[1][1] == "▁"
    assert reward[1][-2] == "█"
    assert len(reward[1]) == 24 + 2


def test_few_records_give_a_column_each(make_run):
    header, _, reward, _ = rows(section(card(make_run(list(records(3))[:3])), "Curves"))
    assert header[2:] == ["0", "1", "2"]
    assert reward[1:] == ["`▁▅█`", "0", "0.5", "1"]


def test_a_sparkline_runs_from_its_lowest_to_its_highest_value():
    assert sparkline([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]) == "▁▂▃▄▅▆▇█"
    assert sparkline([-1.0, -8.0]) == "█▁"
    assert sparkline([2.0, 2.0]) == "▁▁"
    assert sparkline([]) == ""


def test_evaluation_is_before_and_after_with_the_change(make_run):
    text = section(card(make_run(records())), "Evaluation")
    assert rows(text)[1] == ["**all**", *["50.0 ± 2.0", "75.0 ± 2.0", "+25.0"] * 2]
    assert "before (after 0 steps) and after 40 steps" in text


def test_one_evaluation_is_shown_alone_and_none_is_said(make_run):
    text = section(card(make_run(list(records())[:5], name="one")), "Evaluation")
    assert rows(text)[1] == ["**all**", "50.0 ± 2.0", "50.0 ± 2.0"]
    assert "after 0 steps, with" in text
    assert "None was made" in section(card(make_run(name="none")), "Evaluation")


def test_games_are_the_easiest_the_middle_and_the_hardest_of_the_last_step(make_run):
    text = section(card(make_run(records(), GAMES)), "Example games")
    assert re.findall(r"^Query \(V (\S+), 2 answers\)\n    (.*)$", text, re.M) == [
        ("1.75", "easy"),
        ("0.5", "middling"),
        ("-1.5", "hard"),
    ]
    assert "Best answer (R 1, R_Q 0.25)\n    good\nWorst answer (R 0, R_Q 0.25)\n    bad\n" in text
    assert "step 39" in text
    assert "older" not in text


def test_a_game_without_quality_self_reward_shows_none(make_run):
    text = section(card(make_run(records(), GAMES, algorithm="lsp-zero")), "Example games")
    assert "Best answer (R 1)\n" in text
    assert "R_Q" not in text


def test_answers_that_all_earned_the_same_are_shown_once(make_run):
    same = [game(39, "q", ("first", 1.0), ("second", 1.0)), game(39, "p", ("only", 0.0))]
    text = section(card(make_run(records(), same)), "Example games")
    assert "An answer, all earned the same (R 1, R_Q 0.25)\n    first\n" in text
    assert "Its only answer (R 0, R_Q 0.25)\n    only\n" in text
    assert "second" not in text


def test_settings_are_the_main_ones_and_those_that_differ(make_run):
    run = make_run(learner={"aggregation": "token_mean", "lr": 1e-4}, challenger={"num_queries": 4})
    table = {row[0].strip("`"): row[1:] for row in rows(section(card(run), "Settings"))}
    assert table["challenger.num_queries"] == ["`4`", "`8`"]
    assert table["learner.lr"] == ["`0.0001`", "`3e-06`"]
    assert table["solver.group_size"] == ["`3`", "`8`"]
    assert table["challenger.alpha"] == ["`1`", "same"]
    assert table["learner.aggregation"] == ["`token_mean`", "`sequence`"]
    assert "learner.schedule" not in table
    assert not {n for n in table if n.startswith(("log", "checkpoint", "rollout", "policy"))}


def test_grpo_shows_no_setting_that_it_does_not_use(make_run):
    data = {"algorithm": "grpo", "data": {"path": "arena"}}
    run = make_run(challenger={"beta": 0.7}, self_reward={"weight": 3.0}, **data)
    text = section(card(run), "Settings")
    assert re.findall(r"challenger\.\w+", text) == ["challenger.num_queries"]
    assert "self_reward" not in text
    assert "`1e-06` | same" in text  # the paper's learning rate for GRPO
    assert "Quality self-reward" not in card(run)
    assert "written by the model itself" not in card(run)


def test_every_kind_of_reward_has_its_sentence():
    kinds = {
        get_args(part.model_fields["kind"].annotation)[0] for part in get_args(get_args(Reward)[0])
    }
    assert set(REWARDS) == kinds


def test_several_rewards_show_their_weights(make_run):
    python = {"kind": "python", "function": "m:f", "weight": -0.5}
    text = section(card(make_run(reward={"short": python})), "What it was rewarded for")
    assert "- `short`: a Python function of the author's. Weight -0.5. " in text
    assert "`function` `m:f`" in text
    assert (
        "- `main`: 1 for the one right answer to an arena query, 0 otherwise. Weight 1.\n" in text
    )


def test_a_checkpoints_card_ends_where_its_weights_do(make_run):
    run = make_run(records(), [*GAMES, game(9, "ninth", ("t", 1.0))])
    text = card(run, version=10)
    assert "10 of 40; this is a checkpoint" in text
    assert rows(section(text, "Curves"))[0][-1] == "8–9"
    assert "ninth" in text
    assert "easy" not in text
    assert "75.0" not in text


@pytest.mark.parametrize(
    "damage", ["none", "empty", "torn", "not an object", "binary", "odd games"]
)
def test_missing_or_damaged_records_still_give_a_card(make_run, damage):
    run = make_run(list(records()) if damage == "odd games" else [])
    match damage:
        case "empty":
            run.metrics_file.write_text("")
            (run.games_folder / "step-000000.jsonl").write_text("")
        case "torn":
            run.metrics_file.write_text('{"step": 0, "rew\n')
        case "not an object":
            run.metrics_file.write_text('[1]\n"x"\n{"step": "x"}\n')
        case "binary":
            run.metrics_file.write_bytes(b"\xff\xfe\n")
        case "odd games":
            (run.games_folder / "step-000039.jsonl").write_text('{"answers": [{}]}\n')
    text = card(run)
    titles = re.findall("^## (.*)$", text, re.M)
    assert titles == [t for t in SECTIONS if t not in ("Curves", "Example games") or t in titles]
    assert "Example games" not in titles
    assert ("Curves" in titles) == (damage == "odd games")
    assert metadata(text)["library_name"] == "transformers"


def test_numbers_that_are_none_or_of_another_kind_are_gaps(make_run):
    kept = [{"step": s, "reward/mean": v} for s, v in enumerate([0.5, None, True, "x", 1.5])]
    reward = rows(section(card(make_run(kept)), "Curves"))[1]
    assert reward[1:] == ["`▁█`", "0.5", "1.5"] or reward[1:] == [
        "`▁█`",
        "0.5",
        "–",
        "–",
        "–",
        "1.5",
    ]


# ---------------------------------------------------------------- what it keeps to itself


def test_neither_local_paths_nor_secrets_are_shown(make_run, monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-8d1f20aa")
    monkeypatch.setenv("HF_TOKEN", "hf_secret_3f9c1d77")
    home = "/home/ann/private"
    judge = {
        "kind": "judge",
        "base_url": "https://ann:pw1@api.test:8443/v1?key=k2#f3",
        "model": "gpt-x",
    }
    judge |= {
        "api_key_env": "MY_HIDDEN_KEY",
        "cache": f"{home}/c.sqlite",
        "prompt": f"{home}/judge.txt",
    }
    run = make_run(
        records(),
        GAMES,
        policy={"path": f"{home}/base", "chat_template": f"{home}/t.jinja"},
        challenger={"prompt": f"{home}/challenger.txt"},
        self_reward={"rubric": f"{home}/rubric.txt"},
        reward={
            "judge": judge,
            "rm": {"kind": "reward_model", "path": f"{home}/rm"},
            "hub_rm": {"kind": "reward_model", "path": "Skywork/Skywork-Reward"},
        },
    )
    text = card(run) + card(run, "adapter")
    for secret in (
        home,
        "ann",
        str(tmp_path),
        "pw1",
        "k2",
        "f3",
        "MY_HIDDEN_KEY",
        "sqlite",
        "secret",
    ):
        assert secret not in text, secret
    assert "`https://api.test:8443/v1`" in text
    assert "concurrency" not in text  # a default
    for shown in (
        "`gpt-x`",
        "`judge.txt`",
        "`rubric.txt`",
        "`base`",
        "`t.jinja`",
        "`challenger.txt`",
        "`rm`",
        "`Skywork/Skywork-Reward`",
    ):
        assert shown in text, shown
    assert "secret" not in run.config_file.read_text()


# ---------------------------------------------------------------- texts that can't break out


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_of_the_model_leaves_its_block(make_run, text):
    games = [game(39, text, (text, 1.0), (text + "!", 0.0))]
    with_text = card(make_run(records(), games, name="a"))
    plain = card(make_run(records(), [game(39, "q", ("r", 1.0), ("s", 0.0))], name="a-plain"))
    assert tokens(with_text) == tokens(plain)
    assert metadata(with_text) == metadata(plain)
    assert all(c.isprintable() or c == "\n" for c in with_text)


def tokens(text):
    """The structure that a reader of Markdown sees: its blocks, spans and levels, without texts."""
    parsed = MarkdownIt("commonmark", {"html": True}).enable("table").parse(body(text))
    blocks = [(t.type, t.tag, t.level, t.info) for t in parsed]
    spans = [[c.type for c in t.children] for t in parsed if t.children]
    return blocks, spans


@pytest.mark.parametrize(
    "text", [text for text in HOSTILE if "\ud800" not in text and "\0" not in text]
)
def test_no_setting_leaves_its_cell_and_no_name_its_heading(make_run, text):
    settings = {"task": text, "template": text}
    rewards = {text.replace(".", ""): {"kind": "python", "function": text}}
    run = make_run(
        records(), GAMES, challenger=settings, reward=rewards, solver={"system_prompt": text}
    )
    plain_rewards = {"x": {"kind": "python", "function": "["}}
    other = make_run(
        records(),
        GAMES,
        name="plain",
        challenger={"task": "[", "template": "["},
        reward=plain_rewards,
        solver={"system_prompt": "["},
    )
    got, wanted = html(card(run)), html(card(other))
    # Same elements; only a name may be plain code in one and escaped code in the other.
    assert re.findall(r"<(?!/?code)[^>]*>", got) == re.findall(r"<(?!/?code)[^>]*>", wanted)
    assert "<script" not in got
    assert "<img" not in got
    assert "javascript:" not in re.sub(r"<pre>.*?</pre>|<code>.*?</code>", "", got, flags=re.S)


def test_an_escaped_value_reads_as_it_was():
    shown = MarkdownIt("commonmark", {"html": True}).enable("table").render
    page = shown(f"| a | b |\n| --- | --- |\n| {code('x|`*<b>&amp;_y_')} | {code('plain')} |\n")
    assert "<code>x|`*&lt;b&gt;&amp;amp;_y_</code>" in page
    assert "<code>plain</code>" in page
    assert shown(f"# {escaped('a_b_ <i> `c`')}") == "<h1>a_b_ &lt;i&gt; `c`</h1>\n"


def test_long_texts_are_cut_and_wrapped():
    shown = block("word " * 1000, max_characters=800, max_lines=12, width=88)
    assert shown.endswith("\n    … (cut; 5,000 characters in all)")
    assert len(shown.splitlines()) <= 12 + 1
    assert max(map(len, shown.splitlines())) <= 88 + 4
    assert block("a\n" * 50, 800, 12, 88).count("    a\n") == 12
    assert block("x" * 900, 800, 12, 88).count("x") == 800
    assert block("", 800, 12, 88) == "    (empty)"
    assert block("a\n\n  b", 800, 12, 88) == "    a\n    \n      b"


def test_a_fence_is_longer_than_any_in_the_text():
    assert fence("a ```` b") == "`````text\na ```` b\n`````"
    assert fence("a") == "```text\na\n```"


# ---------------------------------------------------------------- the code that loads it


@pytest.fixture(scope="module", params=[False, True], ids=["all weights", "lora"])
def trained(request, tmp_path_factory):
    """A real run of one step; with LoRA it has an adapter/ beside its model/."""
    if request.param:
        pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("runs") / "trained"
    policy = {"path": "arena"} | ({"lora": {"rank": 2}} if request.param else {})
    quiet = {"progress": "none"}
    config = Config.from_recipe(
        "arena", steps=1, threads=1, policy=policy, eval={"tasks": []}, log=quiet
    )
    return self_play(config, folder)


def test_the_loading_code_of_a_real_run_runs_and_answers(trained, tmp_path):
    parts = [trained.model_folder]
    if trained.adapter_folder.is_dir():
        parts.append(trained.adapter_folder)
    answers = []
    for part in parts:
        text = (part / "README.md").read_text("utf-8")
        assert text == model_card(trained.folder, part.name)
        [snippet] = re.findall(r"```python\n(.*?)```", text, re.S)
        answers.append(python(snippet, cwd=part))
        assert re.fullmatch(r"\d+\n", answers[-1]), answers
        # With the hub's id in place of the folder; a folder of that name stands in for the hub.
        named = with_hub_id(snippet, "ann/model")
        assert '"ann/model"' in named
        (tmp_path / part.name / "ann").mkdir(parents=True)
        (tmp_path / part.name / "ann/model").symlink_to(part)
        assert python(named, cwd=tmp_path / part.name) == answers[-1]
    assert len(set(answers)) == 1  # the adapter over its base is the merged model
    for file in [f for part in parts for f in part.iterdir() if f.suffix in (".json", ".md")]:
        assert str(trained.folder.parent) not in file.read_text("utf-8")


def python(code, cwd):
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_the_loading_code_passes_on_what_the_chat_needs(make_run):
    settings = {
        "path": "a/b",
        "chat_template_kwargs": {"enable_thinking": False},
        "trust_remote_code": True,
    }
    prompt = 'Say "π" \N{GRINNING FACE}\n```'
    text = card(make_run(policy=settings, solver={"system_prompt": prompt}))
    [snippet] = re.findall(r"```+python\n(.*?)\n```+\n", section(text, "How to load it"), re.S)
    assert '**{"enable_thinking": False},' in snippet
    assert snippet.count(", trust_remote_code=True)") == 2
    [line] = [line for line in snippet.splitlines() if line.startswith("messages = ")]
    names = {}
    exec(line, names)
    assert names["messages"][0] == {"role": "system", "content": prompt}
