"""The README.md of a trained model, made from its run: what it is, how to load it, how it came about.

It goes where strangers read it. Of local paths only the last part is shown, of an endpoint neither its
user nor its query, and the names of environment variables stay out; texts of the model and values of
the run can't leave their place (markdown.py).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from language_self_play import __version__
from language_self_play.arena.tasks import TIERS
from language_self_play.config import Config, Learner, Reward
from language_self_play.errors import RunFolderError
from language_self_play.markdown import block, code, escaped, fence, sparkline, table
from language_self_play.progress import two_answers
from language_self_play.run_folder import Part, Record, RunFolder, flatten
from language_self_play.summary import three_games

PAPER = "[arXiv 2509.07414](https://arxiv.org/abs/2509.07414)"
BUILT_IN = "arena"  # policy.path and data.path for what ships with the package
# The line of the loading code that push replaces.
HERE = 'path = "."  # this folder'
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", re.ASCII)

WHAT = {
    "lsp": "One model played two roles: as Challenger it posed queries that were hard for itself, as"
    " Solver it answered them, and reinforcement learning updated it from both sides. Its initial self"
    " judged the quality of every query and answer, and both roles were rewarded for that too.",
    "lsp-zero": "One model played two roles: as Challenger it posed queries that were hard for itself,"
    " as Solver it answered them, and reinforcement learning updated it from both sides. This is the"
    " zero-sum form, in which the Challenger gains what the Solver loses.",
    "grpo": "This is the baseline, the Solver's half of the game (GRPO): it answered queries from a"
    " data set, and learned from how each answer's reward differed from the mean of its query's.",
}
REWARDS = {
    "arena": "1 for the one right answer to an arena query, 0 otherwise.",
    "python": "a Python function of the author's.",
    "reward_model": "the score of a reward model.",
    "verifier": "1 for an answer that agrees with its query's key, 0 otherwise.",
    "majority": "1 for an answer that agrees with most answers to its query, 0 otherwise.",
    "judge": "a language model's score over an API, divided by the highest score.",
}
NAMES = {"lsp": "LSP", "lsp-zero": "LSP-Zero", "grpo": "GRPO"}

# Always shown, in this order; of the others those that are not the default.
MAIN_SETTINGS = (
    *("challenger.num_queries", "solver.group_size", "learner.lr", "challenger.alpha"),
    *("challenger.beta", "solver.beta", "learner.kl", "challenger.temperature"),
    *("solver.temperature", "challenger.max_tokens", "solver.max_tokens"),
)
# Told elsewhere in the card, or nothing that a model's reader needs.
NOT_SETTINGS = (
    *("algorithm", "steps", "seed", "device", "threads", "policy.path", "reward."),
    *("log.", "checkpoint.", "eval.", "rollout.", "learner.tokens_per_micro_batch"),
)
# Settings that can hold a local path, by their last name.
PATHS = {"path", "prompt", "rubric", "chat_template"}
# Of a reward's settings, what belongs to the author's machine.
PRIVATE = {"kind", "weight", "api_key_env", "cache", "device", "workers"}

# metric -> (name, format)
CURVES = {
    "eval/sampled_accuracy": ("held-out accuracy, sampled", "{:.1%}"),
    "reward/mean": ("V̄, mean reward", "{:.3g}"),
    "quality/mean": ("V_Q, mean quality", "{:.3g}"),
    "kl/challenger": ("KL, Challenger", "{:.4f}"),
    "kl/solver": ("KL, Solver", "{:.4f}"),
    "queries/valid_fraction": ("valid queries", "{:.0%}"),
    "queries/unsolvable_fraction": ("unsolvable queries", "{:.0%}"),
    "length/solver": ("answer length, tokens", "{:.1f}"),
}
POINTS, SPARKS = 8, 24

# Of an example game's texts, what is shown.
TEXT_CHARACTERS, TEXT_LINES, TEXT_WIDTH = 800, 12, 88

CITATION = """\
@misc{kuba2025languageselfplay,
  title  = {Language Self-Play For Data-Free Training},
  author = {Kuba and Gu and Ma and Tian and Mohan and Chen},
  year   = {2025},
  eprint = {2509.07414},
  archivePrefix = {arXiv}
}"""


def model_card(run: Path, part: Part = "model", version: int | None = None) -> str:
    """The card of the run's model/ or adapter/, Markdown with the hub's metadata before it.

    `version` is a checkpoint's step; None is the run's end. Metrics and games that are missing or
    damaged are left out. Raises RunFolderError or ConfigError if `run` has no readable config.toml.
    """
    folder = RunFolder(run)
    config = Config.from_table(folder.config())
    records = _records(folder, config.steps if version is None else version)
    sections = [
        _metadata(config, part),
        _introduction(config, part, run, version),
        "## How to load it\n\n" + _loading(config, part),
        "## What it was rewarded for\n\n" + _rewards(config),
        "## Evaluation\n\n" + _evaluation(records),
        _curves(records),
        _games(folder, records, with_quality=config.algorithm == "lsp"),
        "## Settings\n\n" + _settings(config),
        "## Limits\n\n" + _limits(config, records, version),
        "## Citation\n\nThe method is by Kuba, Gu, Ma, Tian, Mohan and Chen; this model is not by"
        f" them.\n\n{fence(CITATION, 'bibtex')}",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def with_hub_id(card: str, repo_id: str) -> str:
    """The card with the hub's id in its loading code, in place of the folder it lies in."""
    return card.replace(HERE, f'path = "{repo_id}"')


def hub_id(path: str) -> str | None:
    """`path` if it names something on the hub; None for what is local or built in."""
    named = HUB_ID.fullmatch(path) and path != BUILT_IN and not Path(path).exists()
    return path if named else None


# ---------------------------------------------------------------- what it is


def _metadata(config: Config, part: Part) -> str:
    """The hub's YAML. JSON texts are YAML too, so nothing in them is ever taken for more."""
    lines = [f"library_name: {'peft' if part == 'adapter' else 'transformers'}"]
    lines.append("pipeline_tag: text-generation")
    if (base := hub_id(config.policy.path)) is not None:
        lines.append(f"base_model: {json.dumps(base)}")
        lines.append(f"base_model_relation: {'adapter' if part == 'adapter' else 'finetune'}")
    if config.data.path is not None and (data := hub_id(config.data.path)) is not None:
        lines += ["datasets:", f"- {json.dumps(data)}"]
    tags = ["language-self-play", "self-play", "reinforcement-learning", config.algorithm]
    if config.policy.lora is not None:
        tags.append("lora")
    lines += ["tags:", *(f"- {tag}" for tag in tags)]
    return "\n".join(["---", *lines, "---"])


def _introduction(config: Config, part: Part, run: Path, version: int | None) -> str:
    what = "LoRA adapter for a language model" if part == "adapter" else "language model"
    steps = f"{config.steps:,}"
    if version is not None and version < config.steps:
        steps = f"{version:,} of {config.steps:,}; this is a checkpoint, the run went on or stopped"
    trained = "all weights"
    if (lora := config.policy.lora) is not None:
        trained = f"a LoRA adapter of rank {lora.rank}"
        trained += "" if part == "adapter" else ", merged into the weights here"
    facts = [
        ("algorithm", NAMES[config.algorithm]),
        ("base model", _base(config)),
        ("trained", trained),
        ("training data", _data(config)),
        ("steps played", steps),
        ("seed", str(config.seed)),
        ("made with", f"language-self-play {__version__}"),
    ]
    return (
        f"# {escaped(run.resolve().name) or 'A trained model'}\n\n"
        f"A {what} trained by Language Self-Play ({PAPER}). {WHAT[config.algorithm]}\n\n"
        + "\n".join(f"- **{name}:** {fact}" for name, fact in facts)
    )


def _base(config: Config) -> str:
    path = config.policy.path
    if path == BUILT_IN:
        return "the tiny model that ships with language-self-play"
    if (hub := hub_id(path)) is not None:
        return f"[{escaped(hub)}](https://huggingface.co/{hub})"
    return f"{code(_shown_path(path))}, a folder of the author's"


def _data(config: Config) -> str:
    path = config.data.path
    if path is None:
        return "none: the model wrote every query itself"
    if path == BUILT_IN:
        return "the 1,000 human queries of language-self-play's arena"
    if (hub := hub_id(path)) is not None:
        return f"[{escaped(hub)}](https://huggingface.co/datasets/{hub})"
    return f"{code(_shown_path(path))}, a file of the author's"


def _loading(config: Config, part: Part) -> str:
    """Code that answers a query; a test runs it."""
    remote = ", trust_remote_code=True" if config.policy.trust_remote_code else ""
    messages = [{"role": "user", "content": "27+48" if _in_arena(config) else "Hello!"}]
    if config.solver.system_prompt is not None:
        messages.insert(0, {"role": "system", "content": config.solver.system_prompt})
    arguments = ["messages", "add_generation_prompt=True", 'return_tensors="pt"']
    arguments += ["return_dict=True"]
    if extra := config.policy.chat_template_kwargs:
        arguments.append(f"**{_literal(extra)}")
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer", "", HERE]
    if part == "adapter":
        lines.insert(0, "from peft import PeftModel")
        base = json.dumps(hub_id(config.policy.path) or _shown_path(config.policy.path))
        if config.policy.path == BUILT_IN:
            lines.insert(0, "from importlib.resources import files\n")
            base = 'files("language_self_play") / "arena" / "model"'
        elif hub_id(config.policy.path) is None:
            base += "  # wherever its base model lies"
        lines += [
            f"base = {base}",
            f"base_model = AutoModelForCausalLM.from_pretrained(base{remote})",
            "model = PeftModel.from_pretrained(base_model, path)",
        ]
    else:
        lines.append(f"model = AutoModelForCausalLM.from_pretrained(path{remote})")
    lines += [
        f"tokenizer = AutoTokenizer.from_pretrained(path{remote})",
        f"messages = {_literal(messages)}",
        "inputs = tokenizer.apply_chat_template(",
        *(f"    {argument}," for argument in arguments),
        ")",
        f"output = model.generate(**inputs, max_new_tokens={config.solver.max_tokens})",
        'answer = output[0, inputs["input_ids"].shape[1] :]',
        "print(tokenizer.decode(answer, skip_special_tokens=True))",
    ]
    text = fence("\n".join(lines), "python")
    if _in_arena(config):
        text += "\n\nNumbers are answered units first: 27+48 is `57`."
    return text


def _literal(value: Any) -> str:
    """Python's text for a value, in ASCII and on one line."""
    text = ascii(value)
    return text if '"' in text or "\\" in text else text.replace("'", '"')


# ---------------------------------------------------------------- how it came about


def _rewards(config: Config) -> str:
    lines = []
    for name, reward in config.reward.items():
        line = f"- {code(name)}: {REWARDS[reward.kind]}"
        if len(config.reward) > 1 or reward.weight != 1:
            line += f" Weight {reward.weight:g}."
        if details := _reward_details(reward):
            line += f" {details}"
        lines.append(line)
    if config.algorithm == "lsp":
        judge = config.self_reward
        lines.append(
            "- Quality self-reward: the base model scores each query with its answer from 0 to 7"
            f" (mode {code(judge.mode)}, rubric {code(_last_part(judge.rubric))}, weight"
            f" {judge.weight:g}). It is added to the Solver's reward and to the Challenger's."
        )
    return "\n".join(lines)


def _reward_details(reward: Reward) -> str:
    details = []
    for name, value in reward:
        field = type(reward).model_fields[name]
        if name in PRIVATE or (value == field.default and not field.is_required()):
            continue
        if name == "base_url":
            value = _shown_url(value)
        details.append(f"{code(name)} {code(_shown(name, value))}")
    return f"Settings: {', '.join(details)}." if details else ""


def _settings(config: Config) -> str:
    # What has no default must be there, and is told elsewhere.
    defaults = Config.from_table(
        {"policy": {"path": BUILT_IN}, "reward": {"any": {"kind": "arena"}}}
    )
    usual, values = flatten(defaults.model_dump()), flatten(config.model_dump())
    usual["learner.lr"] = config.model_copy(update={"learner": Learner()}).lr
    values["learner.lr"] = config.lr
    names = [*MAIN_SETTINGS, *(n for n in values if n not in MAIN_SETTINGS)]
    rows = []
    for name in names:
        is_main = name in MAIN_SETTINGS
        if name.startswith(NOT_SETTINGS) or not (is_main or values[name] != usual.get(name)):
            continue
        if not _is_used(name, config) or values[name] in (None, {}, []):
            continue
        value = code(_shown(name, values[name]))
        default = code(_shown(name, usual[name])) if usual.get(name) is not None else "unset"
        rows.append((code(name), value, "same" if values[name] == usual.get(name) else default))
    return (
        "The main ones, and all others of the game and the learner that are not the default. A step"
        " poses `num_queries` queries and gives `group_size` answers to each; `beta` weighs the KL"
        " to the base model.\n\n" + table(["setting", "value", "default"], rows)
    )


def _is_used(name: str, config: Config) -> bool:
    if config.algorithm == "grpo" and name.startswith("challenger."):
        return name == "challenger.num_queries"
    return config.algorithm == "lsp" or not name.startswith("self_reward.")


def _curves(records: list[Record]) -> str:
    played = [record for record in records if _number(record.get("reward/mean")) is not None]
    if not played:
        return ""
    points = [records[i] for i in _starts(len(records), POINTS)]
    last = max(record["step"] for record in played)
    ends = [record["step"] - 1 for record in points[1:]] + [last]
    header = ["mean over steps", "curve"]
    for first, end in zip([record["step"] for record in points], ends, strict=True):
        header.append(f"{first}–{end}" if end > first else f"{first}")
    rows = []
    for key, (name, digits) in CURVES.items():
        values = [_number(record.get(key)) for record in records]
        there = [value for value in values if value is not None]
        if not there:
            continue
        cells = ["–" if m is None else digits.format(m) for m in _means(values, POINTS)]
        curve = [mean for mean in _means(there, SPARKS) if mean is not None]
        rows.append([name, f"`{sparkline(curve)}`", *cells])
    return (
        "## Curves\n\n"
        + table(header, rows, numbers_from=2)
        + "\n\nEach curve is scaled from its lowest to its highest value. KL is to the base model, in"
        " nats a token."
    )


def _starts(length: int, parts: int) -> list[int]:
    """Where `parts` nearly equal parts of a list begin; fewer for a shorter list."""
    parts = min(length, parts)
    return [i * length // parts for i in range(parts)]


def _means(values: Sequence[float | None], parts: int) -> list[float | None]:
    """The mean of each of `parts` nearly equal parts, of what is there."""
    starts = _starts(len(values), parts)
    means: list[float | None] = []
    for start, end in zip(starts, [*starts[1:], len(values)], strict=True):
        there = [v for v in values[start:end] if v is not None]
        means.append(sum(there) / len(there) if there else None)
    return means


def _evaluation(records: list[Record]) -> str:
    key = "eval/sampled_accuracy"
    evaluations = [record for record in records if _number(record.get(key)) is not None]
    if not evaluations:
        return "None was made while it trained. Measure it on your own task before you use it."
    before, after = evaluations[0], evaluations[-1]
    once = before is after
    header = ["tier"]
    for kind in ("sampled", "greedy"):
        header += [kind] if once else [f"{kind}, before", "after", "change"]
    rows = []
    for tier in (*TIERS, None):
        suffix = f"/{tier}" if tier else ""
        if _number(before.get(key + suffix)) is None:
            continue
        cells = [tier or "**all**"]
        for kind in ("sampled", "greedy"):
            name, half = f"eval/{kind}_accuracy{suffix}", f"eval/{kind}_accuracy_ci95{suffix}"
            pair = [_number(record.get(name)) for record in (before, after)]
            halves = [_number(record.get(half)) for record in (before, after)]
            shown = [
                "–" if mean is None else f"{100 * mean:.1f}" + (f" ± {100 * h:.1f}" if h else "")
                for mean, h in zip(pair, halves, strict=True)
            ]
            first, second = pair
            change = None if first is None or second is None else 100 * (second - first)
            cells += [shown[0]] if once else [*shown, "–" if change is None else f"{change:+.1f}"]
        rows.append(cells)
    when = f"after {before['step']} steps"
    if not once:
        when = f"before (after {before['step']} steps) and after {after['step']} steps"
    return (
        f"Accuracy in % {when}, with 95 % intervals, on the held-out questions of language-self-play's"
        " arena, a closed world of small tasks. Sampled is the exact probability of the right answer"
        " at temperature 1.\n\n" + table(header, rows)
    )


def _games(run: RunFolder, records: list[Record], with_quality: bool) -> str:
    try:
        games = three_games(run, records)
        shown = [fence(_game(game, with_quality)) for game in games]
        reversed_digits = " Numbers are answered units first." if "tier" in games[0] else ""
    except (RunFolderError, OSError, ValueError, LookupError, TypeError):
        return ""  # damaged games are no reason to lose a trained model
    step = games[0]["step"]
    quality = " R_Q the weighted quality self-reward," if with_quality else ""
    rule = "the queries with the highest, the middle and the lowest mean reward, each with its best"
    return (
        f"## Example games\n\nFrom the last step with answers, step {step}: {rule} and its worst"
        f" answer. R is the reward,{quality} V the mean reward of the query's answers. Texts are the"
        f" model's own.{reversed_digits}\n\n" + "\n\n".join(shown)
    )


def _game(game: Record, with_quality: bool) -> str:
    def text(text: str) -> str:
        return block(text, TEXT_CHARACTERS, TEXT_LINES, TEXT_WIDTH)

    answers = game["answers"]
    value = sum(a["reward"] for a in answers) / len(answers)
    lines = [f"Query (V {value:.3g}, {len(answers)} answers)", text(game["query"])]
    best, *worst = two_answers(game)
    titled = [("Best answer", best), *(("Worst answer", answer) for answer in worst)]
    if all(answer["reward"] == best["reward"] for answer in worst):
        titled = [("An answer, all earned the same" if worst else "Its only answer", best)]
    for title, answer in titled:
        scores = f"R {answer['reward']:.3g}"
        scores += f", R_Q {answer['quality']:.3g}" if with_quality else ""
        lines += [f"{title} ({scores})", text(answer["text"])]
    return "\n".join(lines)


def _limits(config: Config, records: list[Record], version: int | None) -> str:
    lines = [
        "- It learned to do what the rewards above pay for, which may not be what you want of it.",
        "- One run with one seed; another seed gives another model.",
        "- Not measured: general ability, truthfulness, bias, safety. Training by reward can weaken"
        " what its base model learned of them.",
        "- Its base model's limits and terms of use apply; no license is stated here.",
    ]
    if config.algorithm != "grpo":
        lines.insert(
            1,
            "- The queries were written by the model itself and read by nobody; they may drift from"
            " what people ask.",
        )
    if _in_arena(config):
        lines.insert(0, "- A model of a closed world of small tasks; of no use outside it.")
    if not records:
        lines.append("- The run's metrics were not found, so curves and evaluation are missing.")
    return "\n".join(lines)


# ---------------------------------------------------------------- what is read and shown


def _records(run: RunFolder, version: int) -> list[Record]:
    """The records up to `version`; none if they are damaged."""
    try:
        records = [r for r in run.metrics() if _number(r.get("step")) is not None]
    except (RunFolderError, OSError, ValueError, AttributeError):
        return []
    return [
        record
        for record in records
        # A checkpoint's own record holds its evaluation, and the game that came after it.
        if record["step"] < version or (record["step"] == version and "reward/mean" not in record)
    ]


def _in_arena(config: Config) -> bool:
    return any(reward.kind == "arena" for reward in config.reward.values())


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def _shown(name: str, value: Any) -> str:
    """A setting's value as text, without what belongs to the author's machine."""
    last_name = name.rsplit(".", 1)[-1]
    if isinstance(value, str) and last_name in PATHS:
        return _shown_path(value) if last_name == "path" else _last_part(value)
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple) and all(isinstance(v, str) for v in value):
        return "; ".join(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _shown_path(path: str) -> str:
    """A hub id or a built-in name as it is, of a local path the last part."""
    return path if hub_id(path) is not None else _last_part(path)


def _last_part(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1] or "a folder"


def _shown_url(url: str) -> str:
    """An endpoint without user, password, query and fragment, any of which can be a secret."""
    try:
        parts = urlsplit(url)
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return "an endpoint"
    return (
        f"{parts.scheme}://{parts.hostname}{port}{parts.path}" if parts.hostname else "an endpoint"
    )
