"""The direction of imports: rooms, top to bottom, each of which imports only from those below it.

Every import statement of every module counts, at its top or inside a function; only what stands
under `if TYPE_CHECKING:` does not. A new module must be given a room here.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import language_self_play

PACKAGE = "language_self_play"
SOURCE = Path(language_self_play.__file__).parent

# Top to bottom. A module may import those in rooms below its own, and what BESIDE allows.
ROOMS = [
    ("the command's name", ["__main__"]),
    (
        "commands",
        [
            "cli",
            "cli.train",
            "cli.evaluate",
            "cli.eval_accuracy",
            "cli.eval_alpaca",
            "cli.eval_pairs",
            "cli.eval_win_rate",
            "cli.eval_table",
            "cli.eval_harness",
            "cli.engine_flags",
            "cli.play",
            "cli.recipes",
            "cli.config",
            "cli.overrides",
            "cli.push",
            "cli.vllm_serve",
        ],
    ),
    ("what a run would take", ["plan", "memory"]),
    ("how it is counted", ["live_bytes"]),
    ("Algorithm 1", ["train"]),
    ("what it is played with, which joins the rooms", ["game"]),
    (
        "measuring and reporting",
        [
            *["evaluate", "evaluate.accuracy", "evaluate.subject", "evaluate.intervals"],
            *["evaluate.win_rate", "evaluate.length_control", "evaluate.outputs"],
            *["evaluate.pair_report", "evaluate.pair_judges", "evaluate.answers"],
            *["evaluate.pass_at_k", "evaluate.outcomes", "evaluate.exam", "evaluate.generation"],
            *["evaluate.contest", "evaluate.measures"],
            *[
                "evaluate.harness",
                "evaluate.kept",
                "evaluate.scores",
                "evaluate.table",
                "evaluate.table_files",
            ],
            *["summary", "progress", "model_card", "publish"],
        ],
    ),
    ("the players", ["players"]),
    (
        "rewards",
        [
            "rewards",
            "rewards.arena",
            "rewards.judge",
            "rewards.reply_cache",
            "rewards.majority",
            "rewards.mathematics",
            "rewards.python",
            "rewards.reward_model",
            "rewards.sandbox",
            "rewards.self_reward",
            "rewards.verifier",
        ],
    ),
    (
        "sampling",
        [
            *["sampling", "sampling.transformers", "sampling.vllm", "sampling.vllm_worker"],
            *["sampling.vllm_server", "sampling.vllm_python", "sampling.in_server.lsp_vllm"],
        ],
    ),
    ("learning", ["learner", "optimizer", "policy", "chat", "sharding", "fixed_model"]),
    (
        "passes of the model",
        [
            "forward",
            "decoding",
            "lean_decoder",
            "prefill",
            "shared_prompt",
            "packed_prompt",
            "linear",
            "row_batches",
        ],
    ),
    ("models as they lie, groups as batches", ["pretrained", "packing"]),
    ("records of a run", ["checkpoint", "metrics", "guard", "distributed", "model_paths"]),
    ("files", ["run_folder", "data", "lock", "shard_files"]),
    ("how files are written", ["durable"]),
    ("the mathematics", ["advantages", "losses", "logprobs", "attention", "randomness"]),
    ("text", ["prompts", "markdown", "wording"]),
    ("settings", ["config"]),
    ("their sections", ["config_evaluation"]),
    ("what more of them are made of", ["config_rewards", "config_types"]),
    (
        "what settings are made of, types",
        [
            *["settings", "recipe_files", "extras", "types", "hub"],
            *["stopwatch", "signals", "out_of_memory"],
        ],
    ),
    ("the built-in world, trained", ["arena.pretrain"]),
    ("the built-in world", ["arena", "arena.questions", "arena.tiny_model"]),
    ("its tasks", ["arena.tasks"]),
    ("errors and the package itself", ["errors", ""]),
]

# Within a room, module -> what it may import there.
BESIDE = {
    "cli": {"cli.train", "cli.evaluate", "cli.play", "cli.recipes", "cli.config", "cli.push"},
    "cli.train": {"cli", "cli.overrides"},
    "cli.evaluate": {"cli"},
    "cli.engine_flags": {"cli"},
    "cli.eval_alpaca": {"cli", "cli.engine_flags", "cli.eval_pairs", "cli.evaluate"},
    "cli.eval_pairs": {"cli", "cli.engine_flags", "cli.evaluate", "cli.overrides"},
    "cli.eval_win_rate": {"cli", "cli.engine_flags", "cli.eval_pairs", "cli.evaluate"},
    "cli.eval_table": {"cli", "cli.evaluate"},
    "cli.eval_harness": {"cli", "cli.evaluate"},
    "evaluate.answers": {"evaluate.generation", "evaluate.kept"},
    "evaluate.generation": {"evaluate"},
    "evaluate.harness": {"evaluate", "evaluate.outcomes"},
    "cli.eval_accuracy": {"cli", "cli.engine_flags", "cli.evaluate", "cli.overrides"},
    "cli.play": {"cli", "cli.overrides"},
    "cli.recipes": {"cli"},
    "cli.config": {"cli"},
    "cli.push": {"cli"},
    "cli.vllm_serve": {"cli", "cli.evaluate"},
    "evaluate.outputs": {"evaluate", "evaluate.win_rate"},
    "evaluate.pair_judges": {"evaluate", "evaluate.outputs", "evaluate.win_rate"},
    "evaluate.pair_report": {
        *["evaluate", "evaluate.length_control", "evaluate.outcomes", "evaluate.outputs"],
        "evaluate.win_rate",
    },
    "evaluate.win_rate": {"evaluate", "evaluate.intervals"},
    "evaluate.accuracy": {"evaluate", "evaluate.intervals", "evaluate.outcomes"},
    "evaluate.exam": {"evaluate", "evaluate.outcomes"},
    "evaluate.contest": {
        *["evaluate", "evaluate.exam", "evaluate.outcomes", "evaluate.outputs"],
        *["evaluate.pair_judges", "evaluate.pair_report"],
    },
    "evaluate.measures": {
        *["evaluate", "evaluate.accuracy", "evaluate.contest", "evaluate.exam"],
        *["evaluate.harness", "evaluate.outcomes"],
    },
    "config_rewards": {"config_types"},
    "evaluate.kept": {"evaluate", "evaluate.outcomes"},
    "evaluate.scores": {
        *["evaluate", "evaluate.outcomes", "evaluate.outputs", "evaluate.win_rate", "model_card"],
    },
    "evaluate.table": {
        *["evaluate", "evaluate.intervals", "evaluate.outputs", "evaluate.scores"],
    },
    "evaluate.table_files": {"evaluate", "evaluate.table"},
    "evaluate.outcomes": {"evaluate", "evaluate.intervals", "evaluate.pass_at_k"},
    "evaluate.subject": {"evaluate"},
    "summary": {"evaluate", "evaluate.outcomes", "evaluate.win_rate", "progress"},
    "model_card": {"progress", "summary"},
    "publish": {"model_card"},
    "rewards.arena": {"rewards"},
    "rewards.judge": {"rewards", "rewards.reply_cache"},
    "rewards.majority": {"rewards", "rewards.mathematics", "rewards.verifier"},
    "rewards.python": {"rewards"},
    "rewards.reward_model": {"rewards"},
    "rewards.self_reward": {"rewards"},
    "rewards.verifier": {"rewards", "rewards.mathematics", "rewards.sandbox"},
    "sampling.transformers": {"sampling"},
    "sampling.vllm": {"sampling", "sampling.vllm_server", "sampling.vllm_python"},
    "sampling.vllm_server": {"sampling"},
    "sampling.vllm_python": {"sampling"},
    "decoding": {"lean_decoder", "prefill", "shared_prompt"},
    "lean_decoder": {"linear", "shared_prompt"},
    "forward": {"decoding", "lean_decoder", "prefill", "shared_prompt", "packed_prompt"},
    "prefill": {"shared_prompt"},
    "shared_prompt": {"packed_prompt"},
    "plan": {"memory"},
    "learner": {"optimizer", "policy"},
    "policy": {"chat", "sharding"},
    "fixed_model": {"chat", "policy"},
    "checkpoint": {"distributed"},
}

# Nothing of ours but errors: these can be read, tested and reused alone.
ALONE = ["advantages", "losses", "logprobs", "randomness", "types", "stopwatch", "arena.tasks"]
ALONE += ["rewards.sandbox", "rewards.mathematics"]
ALONE += ["evaluate.intervals", "evaluate.length_control", "evaluate.pass_at_k"]

# Third-party library -> the modules that may import it. Anything else is an error.
LIBRARIES = {
    "numpy": {"evaluate.intervals", "evaluate.length_control", "evaluate.harness"},
    "lm_eval": {"evaluate.harness"},
    "matplotlib": {"evaluate.table_files"},
    "pydantic": {"config", "config_evaluation", "config_rewards", "config_types", "settings"},
    "math_verify": {"rewards.mathematics"},
    "tomli_w": {"config"},
    "rich": {
        "cli.train",
        "cli.eval_accuracy",
        "cli.eval_pairs",
        "cli.eval_table",
        "cli.eval_harness",
        "cli.play",
        "plan",
        "progress",
        "summary",
    },
    "safetensors": {"checkpoint", "policy", "shard_files", "sampling.in_server.lsp_vllm"},
    "huggingface_hub": {"publish", "evaluate.outputs", "fixed_model", "hub"},
    "peft": {"policy"},
    "vllm": {"sampling.vllm_worker", "sampling.in_server.lsp_vllm"},
    "lsp_vllm": {"sampling.vllm_worker"},  # our own file, as the Python that has vLLM finds it
    "tokenizers": {"arena.tiny_model"},
    "transformers": {
        "chat",
        "decoding",
        "forward",
        "lean_decoder",
        "memory",
        "live_bytes",
        "policy",
        "prefill",
        "pretrained",
        "rewards.reward_model",
        "rewards.self_reward",
        "sampling.transformers",
        "sampling.vllm",
        "sharding",
        "shared_prompt",
        "evaluate.accuracy",
        "evaluate.harness",
        "evaluate.generation",
        "arena.pretrain",
        "arena.tiny_model",
    },
    "torch": {
        "advantages",
        "arena.pretrain",
        "attention",
        "checkpoint",
        "decoding",
        "distributed",
        "evaluate.accuracy",
        "evaluate.harness",
        "evaluate.generation",
        "fixed_model",
        "forward",
        "game",
        "lean_decoder",
        "learner",
        "linear",
        "logprobs",
        "losses",
        "memory",
        "live_bytes",
        "metrics",
        "optimizer",
        "out_of_memory",
        "packed_prompt",
        "packing",
        "players",
        "policy",
        "prefill",
        "pretrained",
        "randomness",
        "rewards",
        "rewards.reward_model",
        "rewards.self_reward",
        "sampling.transformers",
        "sampling.in_server.lsp_vllm",
        "shard_files",
        "sharding",
        "shared_prompt",
        "train",
    },
}

# Modules that must come without torch and transformers, with everything that they import.
LIGHT = [
    *["cli", "cli.evaluate", "cli.eval_accuracy"],
    *["cli.eval_alpaca", "cli.eval_pairs", "cli.eval_win_rate"],
    *["evaluate.win_rate", "evaluate.length_control", "evaluate.outputs", "evaluate.pair_report"],
    *["cli.vllm_serve", "sampling.vllm_python", "sampling.vllm_server"],
    *["cli.train", "cli.play", "cli.recipes", "cli.config", "cli.overrides", "cli.engine_flags"],
    *["config", "errors", "types", "prompts", "run_folder", "progress", "summary", "stopwatch"],
    *[
        "plan",
        "sampling",
        "evaluate",
        "evaluate.subject",
        "cli.push",
        "publish",
        "model_card",
        "markdown",
        "lock",
    ],
    *["evaluate.intervals", "evaluate.pass_at_k", "evaluate.outcomes", "evaluate.kept"],
    *["model_paths", "wording"],
    *[
        "evaluate.scores",
        "evaluate.table",
        "evaluate.table_files",
        "cli.eval_table",
        "cli.eval_harness",
    ],
    *["arena", "arena.tasks", "arena.questions", "arena.tiny_model"],
]


# ---------------------------------------------------------------- reading the source


def module_name(file: Path) -> str:
    """`arena.tasks` for arena/tasks.py, `arena` for arena/__init__.py, `` for the package."""
    parts = file.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in sorted(SOURCE.rglob("*.py"))}
ROOM_OF = {module: i for i, (_, modules) in enumerate(ROOMS) for module in modules}


def imports(module: str) -> set[str]:
    """Full names of the modules that `module` imports anywhere, except for type checkers."""
    return set(_imports(ast.parse(MODULES[module].read_text("utf-8")), module))


def _imports(node: ast.AST, module: str) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{module}: relative imports hide their direction"
            for alias in child.names:
                inner = f"{child.module}.{alias.name}"
                yield inner if inner.removeprefix(f"{PACKAGE}.") in MODULES else child.module
        else:
            yield from _imports(child, module)


def of_ours(module: str) -> set[str]:
    """Those of our own modules that `module` imports, without the package's name."""
    names = imports(module) - {"__future__"}
    names = {n for n in names if n == PACKAGE or n.startswith(f"{PACKAGE}.")}
    return {name.removeprefix(PACKAGE).removeprefix(".") for name in names}


def libraries(module: str) -> set[str]:
    """The libraries outside Python's own that `module` imports."""
    roots = {name.split(".")[0] for name in imports(module)}
    return roots - set(sys.stdlib_module_names) - {PACKAGE, "__future__"}


# ---------------------------------------------------------------- the rules


def test_every_module_has_one_room_and_every_room_has_modules():
    listed = [module for _, modules in ROOMS for module in modules]
    assert sorted(listed) == sorted(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down_only(module):
    upward = {
        other
        for other in of_ours(module)
        if ROOM_OF[other] <= ROOM_OF[module] and other not in BESIDE.get(module, set())
    }
    assert upward == set(), f"{module} is in the room of {ROOMS[ROOM_OF[module]][0]!r}"


def test_what_is_allowed_within_a_room_is_within_a_room_and_free_of_circles():
    for module, allowed in BESIDE.items():
        assert {ROOM_OF[other] for other in allowed} == {ROOM_OF[module]}
    # The command imports a subcommand by its name when it runs it; nothing else goes both ways.
    both = {(a, b) for a, allowed in BESIDE.items() for b in allowed if a in BESIDE.get(b, set())}
    assert {pair for pair in both if "cli" not in pair} == set()


@pytest.mark.parametrize("module", ALONE)
def test_the_mathematics_and_its_kin_import_nothing_of_ours(module):
    assert of_ours(module) <= {"errors"}


def test_only_the_loop_and_its_game_join_players_rewards_learner_and_checkpoints():
    joined = {"players", "rewards", "learner", "checkpoint", "metrics"}
    joining = {module for module in MODULES if len(of_ours(module) & joined) > 2}
    assert joining == {"train", "game"}


def test_training_does_not_know_the_command():
    for module in MODULES:
        if not module.startswith("cli") and module != "__main__":
            assert not {m for m in of_ours(module) if m.startswith("cli")}, module


def test_sampling_backends_do_not_import_each_other():
    modules = {module for module in MODULES if module.startswith("sampling.")}
    vllm = {module for module in modules if "vllm" in module}
    assert modules - vllm == {"sampling.transformers"}
    assert of_ours("sampling.transformers") & modules == set()
    for module in vllm:
        assert "sampling.transformers" not in of_ours(module)
    # What the Python that has vLLM imports is alone.
    for module in ("sampling.vllm_worker", "sampling.in_server.lsp_vllm"):
        assert of_ours(module) == set()


@pytest.mark.parametrize("module", MODULES)
def test_libraries_are_imported_only_where_the_table_says(module):
    assert {lib for lib in libraries(module) if module not in LIBRARIES.get(lib, set())} == set()


def test_the_table_of_libraries_names_no_module_that_does_without():
    idle = {
        (lib, m) for lib, modules in LIBRARIES.items() for m in modules if lib not in libraries(m)
    }
    assert idle == set()


# ---------------------------------------------------------------- what comes along at run time


def python(code: str) -> str:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_importing_the_package_brings_neither_torch_nor_pydantic():
    heavy = {"torch", "transformers", "pydantic", "tomli_w", "rich", "safetensors"}
    assert python(f"import sys, {PACKAGE}; print({heavy} & set(sys.modules))") == "set()"


def test_the_light_modules_bring_neither_torch_nor_transformers():
    names = ", ".join(f"{PACKAGE}.{module}" for module in LIGHT)
    assert python(
        f"import sys, {names}; print({{'torch', 'transformers'}} & set(sys.modules))"
    ) == ("set()")


def test_the_packages_names_load_on_first_use_and_unknown_ones_are_refused():
    assert (
        python(
            f"""
import sys, {PACKAGE} as lsp
assert lsp.LspError.__name__ == "LspError" and "pydantic" not in sys.modules
assert lsp.Config.__name__ == "Config" and "torch" not in sys.modules
try:
    lsp.nonsense
except AttributeError as error:
    print(error)
"""
        )
        == "module 'language_self_play' has no attribute 'nonsense'"
    )


def test_every_name_that_the_package_promises_is_there():
    for name in language_self_play.__all__:
        assert getattr(language_self_play, name) is not None
