"""Many ranks: they play what one plays, and end together. Real torchrun processes, over gloo."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from language_self_play import Config, game, self_play, sharding
from language_self_play.arena.tiny_model import build_config, build_tokenizer
from language_self_play.checkpoint import _write_shards, load_checkpoint
from language_self_play.cli import main
from language_self_play.distributed import (
    Place,
    Ranks,
    _heard,
    _packed,
    _told,
    _unpacked,
    device_of_rank,
    join_ranks,
    refuse_other_settings,
    threads_of_rank,
)
from language_self_play.errors import (
    ConfigError,
    InputFileError,
    MemoryLimitError,
    NonFiniteError,
    RunFolderError,
)
from language_self_play.learner import Learner, StepResult, Term
from language_self_play.optimizer import Optimizer
from language_self_play.packing import first_kept, kept_completions, share_of_tokens
from language_self_play.policy import Policy, load_policy
from language_self_play.pretrained import load_model
from language_self_play.recipe_files import merge
from language_self_play.run_folder import RunFolder
from language_self_play.shard_files import Shards
from language_self_play.sharding import ShardedModel
from language_self_play.types import Completion, Group, Groups

# What a rank takes to notice that another has gone, on a busy machine: gloo notices at once.
BOUND_S = 30

GAME = {
    "algorithm": "lsp",
    "steps": 4,
    "device": "cpu",
    "threads": 1,
    "policy": {"path": "arena"},
    "challenger": {"prompt": "arena", "num_queries": 5, "max_tokens": 16},
    "solver": {"group_size": 3, "max_tokens": 8},
    "self_reward": {"mode": "expected", "rubric": "arena", "weight": 0.14},
    "reward": {"main": {"kind": "arena"}},
    "learner": {"lr": 1e-4, "tokens_per_micro_batch": 256},
    "checkpoint": {"every": 2, "keep_last": 9},
    "log": {"progress": "none"},
}
# Penalties from all ranks' references, a masked loss, a count of tokens, micro-batches in unequal numbers,
# weights that are all cut, and what the first rank alone evaluates.
VARIANT = {
    "solver": {"max_tokens": 3, "truncated": "mask"},
    "learner": {
        "kl": "reward",
        "aggregation": "token_mean",
        "tokens_per_micro_batch": 100,
        "importance_cap": 0.9,
    },
    "eval": {"tasks": ["arena"]},
}
# Fewer completions than ranks: some draw nothing, or learn nothing of a role.
NARROW = {"challenger": {"num_queries": 2}, "solver": {"group_size": 2}}
FSDP = {"distributed": {"parallel": "fsdp"}}
OFFLOAD = {"distributed": {"cpu_offload": True}}
LORA = {"policy": {"lora": {"rank": 4, "alpha": 8.0}}}
KL_IN_REWARD = {"learner": {"kl": "reward"}}
BFLOAT16 = {"dtype": "bfloat16", "steps": 1}

# Of the second rank's draws, and of its passes without and with gradient, those where memory runs out. A
# first role's gradient is where another rank may be at the second role's already.
OUT_OF_MEMORY = {"draw": [1], "False": [2], "True": [1]}
# Memory runs out in the middle of a pass, at the last of 4 layers:
# of the third, the Challenger's, when the Solver's two have left gradients.
IN_A_LAYER = {"layer": [12]}

# What so many ranks play, one after the other in the same processes.
PLAYED: dict[int, list[tuple[dict, ...]]] = {
    2: [
        *((), (VARIANT,), (FSDP,), (FSDP, VARIANT), (FSDP, OFFLOAD)),
        *((FSDP, LORA), (FSDP, LORA, VARIANT), (LORA,)),
    ],
    4: [
        *((), (NARROW,)),
        *((FSDP, NARROW), (FSDP, NARROW, KL_IN_REWARD), (FSDP, LORA, NARROW)),
    ],
}
RUNS_OUT: list[tuple[dict, ...]] = [
    *((), (KL_IN_REWARD,)),
    *((FSDP,), (FSDP, KL_IN_REWARD), (FSDP, LORA)),
]

PLAYS = """
import json, os, shutil, sys
from contextlib import nullcontext
from pathlib import Path
import torch
from transformers.models.llama.modeling_llama import LlamaMLP
from language_self_play import Config, learner, self_play, train
from language_self_play.distributed import join_ranks
from language_self_play.sampling import transformers

draw, compute, layer = transformers.draw_tokens, learner.completion_logprobs, LlamaMLP.forward
step = learner.Learner.step
fails, calls, seen = {}, {}, []

def maybe_fail(kind):
    calls[kind] = calls.get(kind, 0) + 1
    if os.environ["RANK"] == "1" and calls[kind] in fails.get(kind, ()):
        raise torch.OutOfMemoryError("out of memory")

def draw_or_fail(*arguments):
    maybe_fail("draw")
    return draw(*arguments)

def compute_or_fail(*arguments):
    maybe_fail(str(torch.is_grad_enabled()))
    return compute(*arguments)

def layer_or_fail(*arguments):
    if torch.is_grad_enabled():
        maybe_fail("layer")
    return layer(*arguments)

def copy_until(first, step, run):
    shutil.copytree(first, run)
    for place in Path(run, "checkpoints").iterdir():
        if place.name > f"step-{step:06d}":
            shutil.rmtree(place)

def watched_step(self, *arguments):
    result = step(self, *arguments)
    [(_, tokens)] = result.logprob_differences
    seen.append((self.tokens_per_micro_batch, tokens))
    return result

transformers.draw_tokens, learner.completion_logprobs = draw_or_fail, compute_or_fail
LlamaMLP.forward, learner.Learner.step = layer_or_fail, watched_step
with join_ranks(60.0) as ranks:
    train.join_ranks = lambda timeout_s: nullcontext(ranks)
    for table, run, fails in json.loads(Path(sys.argv[1]).read_text()):
        calls.clear(), seen.clear()
        again = "again_after" in fails
        if again:  # as if the run had been killed after that checkpoint
            ranks.once(copy_until, *fails.pop("again_after"), run)
        self_play(Config.from_table(table), run, resume=again)
        Path(f"{run}.seen-{ranks.rank}").write_text(json.dumps(seen))
"""

# GRPO, for which a model needs to have learned nothing.
OF_LENGTH = {
    "algorithm": "grpo",
    "reward": {"main": {"kind": "python", "function": "length_reward:reward"}},
}
LENGTH_REWARD = """
def reward(queries, answers):
    return [float(len(answer)) for answer in answers]
"""

SLOW_REWARD = """
import time
def reward(queries, answers):
    time.sleep(0.3)
    return [float(len(answer)) for answer in answers]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("ranks")
    (made / "slow_reward.py").write_text(SLOW_REWARD)
    (made / "length_reward.py").write_text(LENGTH_REWARD)
    sys.path.insert(0, str(made))
    (made / "plays.py").write_text(PLAYS)
    # Sums as the arena writes them, units first.
    sums = [{"question": f"{a}+{b}", "answer": f"{a + b}"[::-1]} for a in (1, 7, 9) for b in (2, 5)]
    (made / "sums.jsonl").write_text("".join(json.dumps(s) + "\n" for s in sums[:5]))
    tokenizer = build_tokenizer()
    config = build_config(tokenizer)
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(made / "tied-model")
    tokenizer.save_pretrained(made / "tied-model")
    return made


def tied(folder: Path) -> dict:
    """GRPO of a model whose first and last layer are one tensor."""
    return merge(
        OF_LENGTH,
        {
            "policy": {"path": str(folder / "tied-model")},
            "data": {"path": str(folder / "sums.jsonl")},
        },
    )


def environment(folder: Path) -> dict[str, str]:
    paths = [str(folder), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def start(folder: Path, ranks: int, *arguments: str | Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), *map(str, arguments)]
    return subprocess.Popen(
        command,
        env=environment(folder),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def lsp(folder: Path, ranks: int, *arguments: str | Path) -> subprocess.Popen:
    return start(folder, ranks, "-m", "--", "language_self_play", *arguments)


def table_of(folder: Path, *tables: dict) -> dict:
    """GAME with `tables` laid over it, and questions that are asked at the beginning and the end."""
    asked = {"path": str(folder / "sums.jsonl"), "method": "exact", "max_tokens": 6}
    asked |= {"num_answers": 3, "temperature": 1.0}
    table = merge(GAME, {"eval": {"accuracy": {"sums": asked}}})
    for other in tables:
        table = merge(table, other)
    return table


@pytest.fixture(scope="module")
def alone(folder) -> Callable[..., RunFolder]:
    """alone(NARROW): the run of one process, played once."""
    runs: dict[str, RunFolder] = {}

    def played(*tables: dict) -> RunFolder:
        name = f"alone-{len(runs)}"
        key = json.dumps(tables)
        if key not in runs:
            runs[key] = self_play(Config.from_table(table_of(folder, *tables)), folder / name)
        return runs[key]

    return played


@pytest.fixture(scope="module")
def together(folder) -> Callable[[int, str], RunFolder]:
    """together(2, NAME): a run of those that so many ranks have played, all in one start."""
    said: dict[int, str] = {}

    def played(ranks: int, name: str) -> RunFolder:
        if ranks not in said:
            games = [
                (table_of(folder, *tables), str(folder / name_of(ranks, tables)), {})
                for tables in PLAYED[ranks]
            ]
            if ranks == 2:
                games += [
                    (table_of(folder, *tables), str(folder / f"out-{i}"), OUT_OF_MEMORY)
                    for i, tables in enumerate(RUNS_OUT)
                ]
                games += [
                    (table_of(folder, FSDP), str(folder / "out-in-a-layer"), IN_A_LAYER),
                    (table_of(folder, FSDP, BFLOAT16), str(folder / "bfloat16"), {}),
                    (table_of(folder, FSDP, tied(folder)), str(folder / "tied"), {}),
                    (table_of(folder, FSDP, LORA, tied(folder)), str(folder / "tied-lora"), {}),
                ]
                for kind, other in (("bfloat16", BFLOAT16 | {"steps": 4}), ("lora", LORA)):
                    table, first = table_of(folder, FSDP, other), str(folder / f"{kind}-first")
                    games += [
                        (table, first, {}),
                        (table, str(folder / f"{kind}-again"), {"again_after": (first, 2)}),
                    ]
            (folder / f"{ranks}.json").write_text(json.dumps(games))
            process = start(folder, ranks, "--", folder / "plays.py", folder / f"{ranks}.json")
            said[ranks], _ = process.communicate(timeout=400)
        assert (folder / f"{name}.seen-0").exists(), said[ranks]
        return RunFolder(folder / name)

    return played


def unsharded(tables: tuple[dict, ...]) -> tuple[dict, ...]:
    return tuple(table for table in tables if "distributed" not in table)


def name_of(ranks: int, tables: tuple[dict, ...]) -> str:
    return f"many-{ranks}-{PLAYED[ranks].index(tables)}"


def seen(run: RunFolder, rank: int) -> list[list[int]]:
    """(tokens of a micro-batch, tokens learned from) of every step, as a rank saw them."""
    return json.loads(run.folder.with_name(f"{run.folder.name}.seen-{rank}").read_text())


def weights(run: RunFolder) -> dict[str, torch.Tensor]:
    return load_file(run.model_folder / "model.safetensors")


def games(run: RunFolder, steps: int = GAME["steps"]) -> list[dict]:
    return [game for step in range(steps) for game in run.games(step)]


def texts(run: RunFolder, steps: int = GAME["steps"]) -> list[tuple]:
    return [
        (g["query"], [(a["text"], a["tokens"], a["finish_reason"]) for a in g["answers"]])
        for g in games(run, steps)
    ]


def numbers(run: RunFolder) -> list[float]:
    """Every number of the games and of the records that is reproducible."""
    found = []
    for g in games(run):
        found += [g["challenger_reward"], g["challenger_advantage"]]
        found += [a[k] for a in g["answers"] for k in ("reward", "quality", "advantage")]
    for record in run.metrics():
        kept = {k: v for k, v in record.items() if not k.startswith(("time/", "memory/"))}
        found += [len(kept), *kept.values()]
    return [float("nan") if number is None else float(number) for number in found]


def asked(run: RunFolder) -> list[tuple]:
    """Every answer of the question sets' evaluations."""
    return [
        (step, q["id"], [(a["text"], a["right"], a["tokens"]) for a in q["answers"]])
        for step in run.evaluated_steps()
        for q in run.evaluation(step)
        if q["set"] == "sums"
    ]


def assert_same_play(one: RunFolder, many: RunFolder) -> None:
    assert texts(many) == texts(one)
    assert asked(many) == asked(one)
    assert [step for step, *_ in asked(many)] == [0] * 5 + [4] * 5
    assert numbers(many) == pytest.approx(numbers(one), rel=1e-3, abs=1e-5, nan_ok=True)
    expected, found = weights(one), weights(many)
    assert found.keys() == expected.keys()
    # AdamW magnifies the rounding of a gradient that is almost 0: in one process other micro-batches
    # alone move one weight of 683,904 by 8e-6, and here one moved by 1.3e-5. All others hardly move.
    differences = [(found[name] - expected[name]).abs().flatten() for name in expected]
    assert torch.cat(differences).max() < 3e-5
    assert torch.cat(differences).mean() < 1e-8


# ---------------------------------------------------------------- one rank = many


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "tables"),
    [(ranks, tables) for ranks, played in PLAYED.items() for tables in played],
    ids=lambda value: "-".join(k for t in value for k in t) if isinstance(value, tuple) else None,
)
def test_many_ranks_play_and_learn_what_one_does(alone, together, ranks, tables):
    one = alone(*unsharded(tables))
    many = together(ranks, name_of(ranks, tables))
    assert_same_play(one, many)
    assert any(
        not torch.equal(a, b) for a, b in zip(weights(one).values(), _initial(), strict=True)
    )
    assert many.adapter_folder.is_dir() == (LORA in tables)
    if LORA in tables:
        expected, found = adapter(one.adapter_folder), adapter(many.adapter_folder)
        assert found.keys() == expected.keys()
        for name in expected:
            # A's gradient is 0 until B, which begins as 0, has moved: AdamW magnifies its rounding.
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=5e-5)
            assert (found[name] - expected[name]).abs().mean() < 5e-7
        # A checkpoint is the adapter alone: no weight of the model, and no shards.
        checkpoint = many.checkpoints()[0]
        assert {p.name for p in checkpoint.iterdir() if p.is_dir()} == {"adapter"}
        assert set(adapter(checkpoint / "adapter")) == set(expected)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "adapted"), [("tied", ()), ("tied-lora", (LORA,))])
def test_tied_weights_stay_one_in_shards(folder, alone, together, name, adapted):
    one, many = alone(tied(folder), *adapted), together(2, name)
    assert_same_play(one, many)
    first, head = "model.embed_tokens.weight", "lm_head.weight"
    assert head not in weights(many)
    begun = load_file(folder / "tied-model" / "model.safetensors")
    assert torch.equal(weights(many)[first], begun[first]) == bool(adapted)
    places = [many.model_folder]
    if not adapted:
        # As one tensor it has one set of moments, and both of its uses are in its gradient.
        assert not any(head in name for name in shards_of(many.checkpoints()[-1]).names(""))
        places.append(many.checkpoints()[-1] / "shards")
    for place in places:
        found = load_model(str(place), torch.float32, torch.device("cpu"))
        assert found.lm_head.weight is found.model.embed_tokens.weight
        assert torch.equal(found.lm_head.weight, weights(many)[first])


@pytest.mark.slow
def test_bfloat16_in_shards_learns_on_float32_weights_as_one_process_does(alone, together):
    one, many = alone(BFLOAT16), together(2, "bfloat16")
    assert texts(many, 1) == texts(one, 1)
    [first], [other] = ([r for r in run.metrics() if "loss" in r] for run in (one, many))
    # Before an update policy and reference are the same numbers, on every rank.
    assert (first["kl/solver"], other["kl/solver"]) == (0, 0)
    # 8 bits of mantissa: 1 / 256 = 0.4 % in each product, less in a norm over all.
    assert other["grad_norm"] == pytest.approx(first["grad_norm"], rel=4e-3)
    masters = load_file(one.checkpoints()[-1] / "optimizer.safetensors")
    pieces = shards_of(many.checkpoints()[-1])
    changes, differences = [], []
    for name, weight in _initial_by_name().items():
        master, piece = masters[f"{name}:master"], pieces.read(f"{name}:weight")
        assert piece.dtype == torch.float32
        # The arena's file is float32: shards begin as it is, one process's masters as its rounding.
        change, expected = piece - weight, master - weight.bfloat16().float()
        # AdamW's first update is lr · g / (|g| + ε) or less, so where roundings turn a sign: 2 · 1e-4.
        assert change.abs().max() <= 1.01e-4
        assert (change - expected).abs().max() <= 2.01e-4
        changes.append(change.flatten())
        differences.append((change - expected).abs().flatten())
    # Almost all signs are the same.
    assert torch.cat(differences).mean() < 0.02 * 1e-4
    # In bfloat16 an update of 1e-4 would be lost on weights above 0.05, which half of them are not.
    assert (torch.cat(changes).abs() > 0.9e-4).float().mean() > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bfloat16", "lora"])
def test_a_resume_in_shards_is_exact(together, name):
    first, again = together(2, f"{name}-first"), together(2, f"{name}-again")
    events = [json.loads(line) for line in again.events_file.read_text().splitlines()]
    assert [e["step"] for e in events if e["event"] == "resumed"] == [2]
    assert texts(again) == texts(first)
    expected, found = (
        {p.relative_to(run.folder): p for p in run.folder.rglob("*.safetensors")}
        for run in (first, again)
    )
    assert found.keys() == expected.keys()
    for file in expected:
        assert found[file].read_bytes() == expected[file].read_bytes(), file


@pytest.mark.slow
def test_an_adapter_of_two_sharded_ranks_is_gone_on_from_by_one_process(folder, together):
    first = together(2, "lora-first")
    run = shutil.copytree(first.folder, folder / "lora-alone")
    for step in (3, 4):
        shutil.rmtree(run / "checkpoints" / f"step-{step:06d}", ignore_errors=True)
    resumed = self_play(RunFolder(run).resumed_config({}), run, resume=True)
    assert_same_play(first, resumed)


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_ranks_that_replicate_go_on_from_shards_with_the_whole(folder, together, number):
    class OneOfTwo(Ranks):
        """What the first rank finds, it finds too."""

        def once(self, function, *args, **kwargs):
            return function(*args, **kwargs)

    run = together(2, name_of(2, (FSDP,)))
    config = Config.from_table(table_of(folder))
    policy = load_policy(config, torch.device("cpu"))
    optimizer = Optimizer(policy.model, config.learner)
    newest = run.checkpoints()[-1]
    assert load_checkpoint(run, policy, optimizer, OneOfTwo(Place(number, 2, number, 2))) == 4
    shards = shards_of(newest)
    moments = optimizer.state()
    for name, weight in policy.model.named_parameters():
        assert torch.equal(weight, shards.read(f"{name}:weight")), name
        assert torch.equal(moments[f"{name}:exp_avg"], shards.read(f"{name}:exp_avg")), name


@pytest.mark.slow
@pytest.mark.parametrize("tables", [(NARROW,), (FSDP, NARROW)], ids=["replicate", "fsdp"])
def test_each_token_counts_once_also_where_ranks_have_nothing_to_learn(together, tables):
    run = together(4, name_of(4, tables))
    # 2 queries and their answers, 2 to each valid one.
    tokens = [
        round(record["length/challenger"] * 2)
        + sum(a["tokens"] for g in run.games(record["step"]) for a in g["answers"])
        for record in run.metrics()
        if "loss" in record
    ]
    assert len(tokens) == 4
    for rank in range(4):
        assert [n for _, n in seen(run, rank)] == tokens


@pytest.mark.slow
def test_shards_in_bfloat16_are_gone_on_from_by_one_process(folder, together):
    # To which the reference is the same, though the shards hold it in float32.
    first = together(2, "bfloat16-first")
    run = shutil.copytree(first.folder, folder / "bfloat16-alone")
    shutil.rmtree(run / "checkpoints" / "step-000004")
    resumed = self_play(RunFolder(run).resumed_config({}), run, resume=True)
    events = [json.loads(line) for line in resumed.events_file.read_text().splitlines()]
    assert [e["step"] for e in events if e["event"] == "resumed"] == [2]
    # Of 2 updates of at most 1e-4 each few go the other way, in weights of 8 bits.
    differences = [(weights(resumed)[n] - w).float().flatten() for n, w in weights(first).items()]
    assert torch.cat(differences).abs().mean() < 4e-5


@pytest.mark.slow
def test_a_checkpoint_of_shards_is_played_and_measured_without_the_run_s_end(
    folder, together, capsys
):
    """Its weights are those that model/ holds at the end of the same step."""
    finished = together(2, name_of(2, (FSDP,)))
    run = RunFolder(shutil.copytree(finished.folder, folder / "unfinished"))
    shutil.rmtree(run.model_folder)
    assert run.newest_model() == run.folder / "checkpoints/step-000004/shards"
    assert RunFolder.holding(run.newest_model()).folder == run.folder
    found = load_model(str(run.newest_model()), torch.float32, torch.device("cpu"))
    for name, weight in weights(finished).items():
        assert torch.equal(found.state_dict()[name], weight), name
    buffers = dict(load_model("arena", torch.float32, torch.device("cpu")).named_buffers())
    assert buffers
    assert all(torch.equal(b, buffers[name]) for name, b in found.named_buffers())
    for place in (run.folder, run.newest_model()):
        assert main(["play", str(place), "--games", "1"]) == 0
        assert main(["eval", "accuracy", str(place)]) == 0
    capsys.readouterr()
    (run.newest_model() / "shard-00001-of-00002.safetensors").unlink()
    assert main(["play", str(run.folder)]) == 2
    assert "rows are missing; a rank's file is gone" in capsys.readouterr().err


def _initial() -> list[torch.Tensor]:
    return list(_initial_by_name().values())


def _initial_by_name() -> dict[str, torch.Tensor]:
    from language_self_play.pretrained import resolve_model

    return load_file(Path(resolve_model("arena")) / "model.safetensors")


def shards_of(checkpoint: Path) -> Shards:
    return Shards((file, "") for file in sorted((checkpoint / "shards").glob("*.safetensors")))


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(
    "tables", RUNS_OUT, ids=["loss", "kl-in-reward", "fsdp", "fsdp-kl-in-reward", "fsdp-lora"]
)
def test_memory_that_runs_out_on_one_rank_halves_the_batches_of_all(alone, together, tables):
    run = together(2, f"out-{RUNS_OUT.index(tables)}")
    configured = table_of(run.folder.parent, *tables)["learner"]["tokens_per_micro_batch"]
    sizes = [[size for size, _ in seen(run, rank)] for rank in range(2)]
    assert sizes[0] == sizes[1]
    # Once for a pass without a gradient and once for one with.
    assert sizes[0][-1] <= configured // 4
    assert list(run.metrics())[3]["memory/micro_batch_tokens"] == sizes[0][-1]
    # The first draws are those of the second rank's 3 questions of 5, with 3 answers each: 9 // 2.
    assert next(run.metrics())["memory/rollout_batch_size"] == 4
    assert_same_play(alone(*unsharded(tables)), run)


@pytest.mark.slow
def test_shards_give_up_a_pass_together_where_memory_runs_out_within_a_layer(alone, together):
    run = together(2, "out-in-a-layer")
    sizes = [[size for size, _ in seen(run, rank)] for rank in range(2)]
    assert sizes[0] == sizes[1]
    assert sizes[0][0] <= 128  # of 256
    assert_same_play(alone(), run)


# ---------------------------------------------------------------- how ranks end


def rank_process(run: subprocess.Popen, rank: int) -> int:
    """The pid of a rank among torchrun's children."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) != run.pid:
                continue
            if f"\0RANK={rank}\0" in f"\0{(stat.parent / 'environ').read_text()}":
                return int(stat.parent.name)
        except OSError:
            continue
    raise AssertionError(f"no rank {rank}")


def slow_game(folder: Path, name: str, **tables) -> tuple[Path, Path]:
    table = merge(GAME, {"steps": 8, "reward": {"main": {}}, **tables})
    table["reward"] = {"main": {"kind": "python", "function": "slow_reward:reward"}}
    recipe = folder / f"{name}.toml"
    recipe.write_text(Config.from_table(table).to_toml())
    return recipe, folder / name


def wait_for_steps(run: Path, count: int, process: subprocess.Popen) -> None:
    file = run / "metrics.jsonl"
    wait_for(lambda: file.is_file() and file.read_text().count("\n") >= count, process)


def wait_for(happened: Callable[[], object], process: subprocess.Popen) -> None:
    end = time.monotonic() + 120
    while not happened():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.05)


def resume(folder: Path, ranks: int, run: Path) -> RunFolder:
    if ranks == 1:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", ".* held this run and has gone"
            )  # a killed first rank
            return self_play(RunFolder(run).resumed_config({}), run, resume=True)
    process = lsp(folder, ranks, "train", "--resume", run)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return RunFolder(run)


@pytest.fixture(scope="module")
def undisturbed(folder) -> RunFolder:
    recipe, run = slow_game(folder, "undisturbed")
    process = lsp(folder, 2, "train", recipe, "--run", run)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return RunFolder(run)


@pytest.mark.slow
def test_a_killed_rank_takes_the_others_down_and_a_resume_is_exact(folder, undisturbed):
    recipe, run = slow_game(folder, "killed")
    process = lsp(folder, 2, "train", recipe, "--run", run)
    wait_for_steps(run, 3, process)
    os.kill(rank_process(process, 1), signal.SIGKILL)
    killed = time.monotonic()
    said, _ = process.communicate(timeout=120)
    assert time.monotonic() - killed < BOUND_S
    assert process.returncode != 0
    assert "lsp: another rank has ended" in said
    assert "Traceback" not in said.split("lsp: another rank")[0]
    assert not (run / "run.lock").exists()
    resumed = resume(folder, 2, run)
    assert weights(resumed).keys() == weights(undisturbed).keys()
    for name, weight in weights(undisturbed).items():
        assert torch.equal(weights(resumed)[name], weight), name
    for step in range(8):
        assert resumed.games(step) == undisturbed.games(step)


@pytest.mark.slow
def test_signals_to_any_rank_are_to_all_and_another_number_of_ranks_goes_on(folder, undisturbed):
    recipe, run = slow_game(folder, "paused", checkpoint={"every": 100})
    process = lsp(folder, 2, "train", recipe, "--run", run)
    wait_for_steps(run, 1, process)
    os.kill(rank_process(process, 1), signal.SIGUSR1)
    wait_for(lambda: list((run / "checkpoints").glob("step-*")), process)
    os.kill(rank_process(process, 1), signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert len(re.findall(r"paused, \d of 8 steps played; go on with", said)) == 1
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert events[0]["ranks"] == 2
    assert events[-1]["event"] == "paused"
    assert (run / "checkpoints" / f"step-{events[-1]['step']:06d}").is_dir()
    resumed = resume(folder, 1, run)
    for name, weight in weights(undisturbed).items():
        torch.testing.assert_close(weights(resumed)[name], weight, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def sharded(folder) -> Path:
    """A run of two ranks with shards, killed after its first checkpoint."""
    recipe, run = slow_game(folder, "sharded", **FSDP)
    process = lsp(folder, 2, "train", recipe, "--run", run)
    wait_for_steps(run, 3, process)
    os.kill(rank_process(process, 0), signal.SIGKILL)
    process.communicate(timeout=120)
    shards = sorted(p.name for p in (run / "checkpoints/step-000002/shards").glob("shard-*"))
    assert shards == ["shard-00000-of-00002.safetensors", "shard-00001-of-00002.safetensors"]
    return run


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3, 1])
def test_shards_of_two_ranks_are_gone_on_from_by_any_number(folder, sharded, undisturbed, ranks):
    run = shutil.copytree(sharded, folder / f"sharded-{ranks}")
    resumed = resume(folder, ranks, run)
    for name, weight in weights(undisturbed).items():
        torch.testing.assert_close(weights(resumed)[name], weight, rtol=0, atol=1e-5)
    assert not list((run / "checkpoints").glob(".*"))


@pytest.mark.slow
def test_what_goes_wrong_on_the_first_rank_is_told_once_and_ends_all(folder):
    (folder / "bad_reward.py").write_text(
        "def reward(queries, answers):\n    return [1.0] * (4 if len(queries) == 4 else 1)\n"
    )  # 4 when it is tried, before the run begins
    recipe, run = slow_game(folder, "bad")
    recipe.write_text(recipe.read_text().replace("slow_reward", "bad_reward"))
    process = lsp(folder, 2, "train", recipe, "--run", run)
    said, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert said.count("reward.main.function = ") == 1
    process = lsp(folder, 2, "train", recipe, "--run", run)
    said, _ = process.communicate(timeout=120)
    assert said.count("already holds a run") == 1


@pytest.mark.slow
def test_ranks_started_without_torchrun_end_with_the_codes_of_one_process(folder):
    recipe, run = slow_game(folder, "bare")
    command = [sys.executable, "-m", "language_self_play", "train", recipe, "--run", run]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            command,
            env=environment(folder)
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            | {"RANK": str(r), "WORLD_SIZE": "2", "LOCAL_RANK": str(r), "LOCAL_WORLD_SIZE": "2"},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for r in range(2)
    ]
    wait_for_steps(run, 2, processes[0])
    for process in processes:  # as Ctrl-C does
        process.send_signal(signal.SIGINT)
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [75, 75]
    assert said[0].count("finishing the step") == said[0].count("lsp: paused, ") == 1
    assert said[1] == ""


# ---------------------------------------------------------------- the parts


def rank(number: int, size: int) -> Ranks:
    return Ranks(Place(number, size, number, size))


def completion(length: int, text: str = "x") -> Completion:
    return Completion(list(range(length)), text, [-0.5] * length, "stop")


def test_shares_are_in_order_without_gaps_and_empty_where_there_is_too_little():
    assert [list(rank(r, 3).share(7)) for r in range(3)] == [[0, 1], [2, 3], [4, 5, 6]]
    assert [len(rank(r, 4).share(2)) for r in range(4)] == [0, 1, 0, 1]


def test_one_group_is_shared_by_completions_and_several_by_groups():
    assert rank(1, 2).share_of_completions(1, 6) == (range(1), range(3, 6))
    assert rank(1, 2).share_of_completions(4, 6) == (range(2, 4), range(6))


def test_tokens_are_shared_by_count_and_each_kept_completion_is_learned_from_once():
    # Prompts of 4 count 2 for each of 2 completions: 10+2, 2+2 | 2+2, and one that is masked: 20
    # tokens with middles 6, 14 and 18. Two ranks of 10: the first has the first completion alone.
    group = [Group([0] * 4, [completion(10), completion(2)]), Group([0] * 2, [completion(2)] * 2)]
    groups = Groups("solver", group, 1.0, keep=[[True, True], [True, False]])
    shares = [share_of_tokens(groups, r, 2) for r in range(2)]
    assert shares == [[[True, False], [False, False]], [[False, True], [True, False]]]
    assert share_of_tokens(groups, 0, 1) is groups.keep
    assert first_kept(Groups("solver", group, 1.0, keep=[[False, False], [False, True]])) == [
        [False, False],
        [False, True],
    ]
    assert [len(c.tokens) for c in kept_completions(groups)] == [10, 2, 2]


def test_a_rank_adds_zeros_to_gradients_that_others_alone_have(monkeypatch):
    class WithOther(Ranks):
        """Another rank has gradients of the first three weights, and they are ones."""

        def any(self, *flags):
            return [True, True, True, False]

    sizes = []

    def add_ones(flat):
        sizes.append(len(flat))
        flat.add_(1.0)

    monkeypatch.setattr(dist, "all_reduce", add_ones)
    weights = [torch.zeros(shape) for shape in ((2, 3), (4,), (1,), (5,))]
    weights[1].grad = torch.tensor([1.0, 2.0, 3.0, 4.0])
    WithOther(Place(1, 2, 1, 2)).sum_gradients(weights)
    assert sizes == [2 * 3 + 4 + 1]
    assert torch.equal(weights[0].grad, torch.ones(2, 3))
    assert weights[1].grad.tolist() == [2.0, 3.0, 4.0, 5.0]
    assert weights[2].grad.tolist() == [1.0]
    assert weights[3].grad is None


def test_completions_travel_unchanged():
    played = [
        Completion([1, 70_000], "a\n\ud800 b", [-0.1, float("-inf")], "stop"),
        Completion([], "", [], "length"),
    ]
    assert list(_unpacked(_packed([Group([1], played)]))) == played


def test_errors_travel_with_their_kind_place_and_number():
    error = NonFiniteError("it is NaN", [("solver", 3)])
    assert (type(_heard(_told(error))), str(_heard(_told(error)))) == (NonFiniteError, "it is NaN")
    assert _heard(_told(error)).places == [("solver", 3)]
    full = RunFolderError("no room")
    full.errno = 28
    assert _heard(_told(full)).errno == 28


def test_a_process_alone_asks_nobody():
    ranks = Ranks()
    assert ranks.once(lambda: {1, 2}) == {1, 2}  # as it is, not as JSON has it
    assert (ranks.gather(b"x"), ranks.any(True, False), ranks.most(3)) == ([b"x"], [1, 0], 3)


def test_ranks_that_have_left_exchange_nothing_and_the_first_alone_acts():
    first, second = rank(0, 2), rank(1, 2)
    first.leave(), second.leave()
    assert (first.once(lambda: 7), second.once(lambda: 7)) == (7, None)
    assert first.any(True) == [True]


def test_ranks_of_a_host_share_its_cores(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    assert [threads_of_rank(Place(0, n, 0, n)) for n in (1, 4, 32)] == [16, 4, 1]


def test_an_environment_that_names_half_a_place_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "one")
    with pytest.raises(ConfigError, match="RANK = 'one' in the environment: must be a number"):
        Place.of_this_process()


def test_a_rank_takes_the_gpu_of_its_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    cuda = torch.device("cuda")
    assert device_of_rank(cuda, Place(3, 4, 1, 2)) == torch.device("cuda", 1)
    assert device_of_rank(cuda, Place(0, 1, 0, 1)) == cuda
    with pytest.raises(ConfigError, match="3 ranks on a host with 2 GPUs"):
        device_of_rank(cuda, Place(2, 3, 2, 3))
    with pytest.raises(ConfigError, match='device = "cuda:0": names one GPU'):
        device_of_rank(torch.device("cuda:0"), Place(0, 2, 0, 2))


def test_settings_name_the_kind_of_gpu_where_each_rank_has_one(monkeypatch, tmp_path):
    # No GPU is needed to see what is resolved: preparing stops where weights would be loaded.
    named = []
    monkeypatch.setattr(game, "choose_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(game, "warn_of_bias", lambda config: named.append(config.device))

    def stop(config, device, ranks):
        named.append(str(device))
        raise InterruptedError

    monkeypatch.setattr(game, "load_policy", stop)
    for ranks in (rank(1, 2), Ranks()):
        with pytest.raises(InterruptedError):
            game.prepare(Config.from_table(GAME), ranks)
    assert named == ["cuda", "cuda:1", "cuda", "cuda"]


def test_a_rank_with_other_settings_is_told_by_all():
    class WithOther(Ranks):
        """Another rank was started with another flag."""

        def gather(self, own):
            return [own, own, own.replace(b'"learner.lr": 0.0001', b'"learner.lr": 0.1')]

    config = Config.from_table(GAME)
    with pytest.raises(ConfigError) as raised:
        refuse_other_settings(config, False, WithOther(Place(0, 3, 0, 3)))
    assert str(raised.value) == (
        "learner.lr = 0.1 on rank 2, 0.0001 on the first: all ranks play the same game; start them with"
        " the same recipe and flags"
    )
    assert raised.value.agreed
    refuse_other_settings(config, False, Ranks())


def test_what_tokens_say_is_summed_over_ranks_before_it_is_a_mean(tiny_llama, endless_chat):
    class WithOther(Ranks):
        """Another rank has 6 tokens, 4 of them at the cap, with 0.7 nats between samplers."""

        def sums(self, numbers):
            return [a + b for a, b in zip(numbers, [0.0, 0.7, 6, 4], strict=True)]

    config = Config.from_table(merge(GAME, {"learner": {"importance_cap": 1.0}}))
    learner = Learner(Policy(tiny_llama, endless_chat), config, WithOther())
    own = StepResult(logprob_differences=[(0.2, 3), (0.1, 1)], capped=[1.0, 0.0])
    result = learner._summed(own)
    assert result.logprob_difference == pytest.approx(0.1)  # (0.3 + 0.7) / (4 + 6)
    assert result.capped_fraction == pytest.approx(0.5)  # (1 + 4) / 10


def test_what_is_not_finite_on_another_rank_is_found_on_all(tiny_llama, endless_chat):
    class WithOther(Ranks):
        """Another rank's loss is NaN."""

        def sums(self, numbers):
            return [math.nan, *numbers[1:]]

    learner = Learner(Policy(tiny_llama, endless_chat), Config.from_table(GAME), WithOther())
    played = [Group([1, 2], [completion(2), completion(3)]) for _ in range(2)]
    solved = Groups("solver", played, 1.0, torch.zeros(2, 2))
    assert learner._places_not_finite([Term(solved, 1.0, 0.0)]) == [("solver", 0), ("solver", 1)]


def test_no_update_is_made_where_another_rank_has_no_room_for_it(tiny_llama, endless_chat):
    learner = Learner(Policy(tiny_llama, endless_chat), Config.from_table(GAME), AnyOther())
    with pytest.raises(MemoryLimitError, match="no memory left to compute an update") as raised:
        learner._check_room()
    assert raised.value.agreed


def test_a_rank_s_shard_that_finds_no_room_is_told_by_all(tiny_llama, endless_chat, tmp_path):
    run, policy = RunFolder(tmp_path), Policy(tiny_llama, endless_chat)
    run.checkpoints_folder.mkdir()
    optimizer = Optimizer(tiny_llama, Config.from_table(GAME).learner)
    with pytest.raises(RunFolderError, match="No space left") as raised:
        _write_shards(run.checkpoints_folder / ".shards-1", run, policy, optimizer, AnyOther())
    assert raised.value.errno == errno.ENOSPC
    assert raised.value.agreed
    assert not list(run.checkpoints_folder.iterdir())


class AnyOther(Ranks):
    """Another rank has whatever is asked for, and no room on its disk."""

    def any(self, *flags):
        return [True for _ in flags]

    def most(self, number):
        return errno.ENOSPC


def test_pieces_wait_in_the_host_s_memory_where_that_is_asked_for(tiny_llama, monkeypatch):
    asked = []

    def fully_shard(module, **options):
        asked.append(type(options["offload_policy"]))
        return module

    monkeypatch.setattr(sharding, "fully_shard", fully_shard)
    monkeypatch.setattr(sharding, "init_device_mesh", lambda *args: None)
    monkeypatch.setattr(Ranks, "from_first", lambda ranks, tensor: None)
    for offload, policy in ((True, sharding.CPUOffloadPolicy), (False, sharding.OffloadPolicy)):
        asked.clear()
        ShardedModel(tiny_llama, Ranks(), torch.device("cpu"), torch.float32, offload)
        assert set(asked) == {policy}


def test_ranks_that_end_by_what_all_raise_end_after_the_first(monkeypatch):
    # A launcher kills the others when one ends, and the first may still be writing.
    waited = []
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **kwargs: None)
    monkeypatch.setattr(Ranks, "outlive_first", lambda ranks: waited.append((ranks.rank, agreed)))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for number in ("0", "1"):
        monkeypatch.setenv("RANK", number)
        monkeypatch.setenv("LOCAL_RANK", number)
        for agreed in (True, False):
            error = ConfigError("it is wrong")
            error.agreed = agreed
            with pytest.raises(ConfigError), join_ranks(1.0) as ranks:
                raise error
            assert ranks.apart == (not agreed)
    assert waited == [(1, True)]


@pytest.mark.parametrize(
    ("tables", "sentence"),
    [
        ({"learner": {"optimizer": "adamw_8bit"}, **FSDP}, "adamw_8bit"),
        ({"guard": {"stop_within_s": 5.0}, **FSDP}, "guard.stop_within_s"),
        ({"distributed": {"cpu_offload": True}}, "distributed.cpu_offload: is for shards"),
        ({"distributed": {"parallel": "ddp"}}, "distributed.parallel = 'ddp'"),
        ({"distributed": {"timeout_s": 0}}, "distributed.timeout_s = 0"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(tables, sentence):
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        Config.from_table(merge(GAME, tables))


def test_shards_are_read_by_any_number_of_ranks(tmp_path):
    from language_self_play.shard_files import Shards, rows_of, save_shard

    whole = {"w": torch.arange(14.0).view(7, 2), "b": torch.arange(2.0)}
    for r in range(3):  # rows 3, 3, 1 of w; 1, 1, 0 of b
        own = {
            k: v[rows_of(r, 3, len(v)).start : rows_of(r, 3, len(v)).stop] for k, v in whole.items()
        }
        pieces = {k: (rows_of(r, 3, len(v)).start, len(v)) for k, v in whole.items()}
        uncut = {"step": torch.tensor(5.0), "buffer": torch.arange(3.0)}
        save_shard(tmp_path, own | uncut, pieces, r, 3)
    shards = Shards((file, "") for file in sorted(tmp_path.iterdir()))
    assert torch.equal(shards.read("w"), whole["w"])
    assert shards.read("step") == 5.0
    assert torch.equal(shards.read("buffer"), torch.arange(3.0))
    for size in (1, 2, 4, 9):
        parts = [shards.read("w", r, size) for r in range(size)]
        assert torch.equal(torch.cat(parts), whole["w"])
        assert [len(p) for p in parts] == [len(rows_of(r, size, 7)) for r in range(size)]
    (tmp_path / "shard-00001-of-00003.safetensors").unlink()  # rows 3, 4 and 5
    torn = Shards((file, "") for file in sorted(tmp_path.iterdir()))
    with pytest.raises(InputFileError, match="of w 3 rows are missing"):
        torn.read("w")


def test_settings_of_ranks_can_change_when_a_run_is_resumed(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.create(Config.from_table(GAME))
    run.refuse_changes(Config.from_table(merge(GAME, FSDP)))
