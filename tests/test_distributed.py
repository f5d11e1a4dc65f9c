"""Many ranks: they play what one plays, and end together. Real torchrun processes, over gloo."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from language_self_play import Config, self_play
from language_self_play.distributed import (
    Place,
    Ranks,
    _heard,
    _packed,
    _told,
    _unpacked,
    device_of_rank,
    threads_of_rank,
)
from language_self_play.errors import ConfigError, NonFiniteError, RunFolderError
from language_self_play.packing import first_kept, kept_completions, share_of_tokens
from language_self_play.recipe_files import merge
from language_self_play.run_folder import RunFolder
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
# Penalties from all ranks' references, a masked loss, a count of tokens, and micro-batches in unequal numbers.
VARIANT = {
    "solver": {"max_tokens": 3, "truncated": "mask"},
    "learner": {"kl": "reward", "aggregation": "token_mean", "tokens_per_micro_batch": 100},
}
# Fewer completions than ranks: one that draws and learns nothing.
NARROW = {"challenger": {"num_queries": 2}, "solver": {"group_size": 2}}
FSDP = {"distributed": {"parallel": "fsdp"}}

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
    return made


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


def play(folder: Path, name: str, ranks: int, *tables: dict) -> RunFolder:
    """The run of GAME with `tables` laid over it; ranks = 0 is this process, without torchrun."""
    table = GAME
    for other in tables:
        table = merge(table, other)
    config = Config.from_table(table)
    if not ranks:
        return self_play(config, folder / name)
    recipe = folder / f"{name}.toml"
    recipe.write_text(config.to_toml())
    process = lsp(folder, ranks, "train", recipe, "--run", folder / name)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return RunFolder(folder / name)


@pytest.fixture(scope="module")
def alone(folder) -> Callable[..., RunFolder]:
    """alone(NARROW): the run of one process, played once."""
    runs: dict[str, RunFolder] = {}

    def played(*tables: dict) -> RunFolder:
        name = f"alone-{len(runs)}"
        key = json.dumps(tables)
        if key not in runs:
            runs[key] = play(folder, name, 0, *tables)
        return runs[key]

    return played


def weights(run: RunFolder) -> dict[str, torch.Tensor]:
    return load_file(run.model_folder / "model.safetensors")


def games(run: RunFolder) -> list[dict]:
    return [game for step in range(GAME["steps"]) for game in run.games(step)]


def texts(run: RunFolder) -> list[tuple]:
    return [
        (g["query"], [(a["text"], a["tokens"], a["finish_reason"]) for a in g["answers"]])
        for g in games(run)
    ]


def numbers(run: RunFolder) -> list[float]:
    """Every number of the games and of the records that is reproducible."""
    found = []
    for game in games(run):
        found += [game["challenger_reward"], game["challenger_advantage"]]
        found += [a[k] for a in game["answers"] for k in ("reward", "quality", "advantage")]
    for record in run.metrics():
        found += [v for k, v in record.items() if not k.startswith(("time/", "memory/"))]
    return [float("nan") if number is None else float(number) for number in found]


def assert_same_play(one: RunFolder, many: RunFolder) -> None:
    assert texts(many) == texts(one)
    assert numbers(many) == pytest.approx(numbers(one), rel=1e-3, abs=1e-5, nan_ok=True)
    expected, found = weights(one), weights(many)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-5)


# ---------------------------------------------------------------- one rank = many


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "tables"),
    [
        (2, ()),
        (4, ()),
        (4, (NARROW,)),
        (2, (VARIANT,)),
        (2, (FSDP,)),
        (4, (FSDP, NARROW)),
        (2, (FSDP, VARIANT)),
    ],
    ids=lambda value: "-".join(k for t in value for k in t) if isinstance(value, tuple) else None,
)
def test_many_ranks_play_and_learn_what_one_does(folder, alone, ranks, tables):
    name = f"many-{ranks}-{len(list(folder.iterdir()))}"
    one = alone(*(t for t in tables if t is not FSDP))
    many = play(folder, name, ranks, *tables)
    assert_same_play(one, many)
    assert any(
        not torch.equal(a, b) for a, b in zip(weights(one).values(), _initial(), strict=True)
    )


def _initial() -> list[torch.Tensor]:
    from language_self_play.pretrained import resolve_model

    return list(load_file(Path(resolve_model("arena")) / "model.safetensors").values())


@pytest.mark.slow
def test_memory_that_runs_out_on_one_rank_halves_the_batches_of_all(folder, alone):
    script = folder / "runs_out.py"
    script.write_text(
        f"""
import json, os, sys, torch
from language_self_play import Config, self_play, learner
from language_self_play.distributed import Ranks

compute, calls, found = learner.completion_logprobs, [], []
def sometimes(*arguments):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 2:
        raise torch.OutOfMemoryError("out of memory")
    return compute(*arguments)
learner.completion_logprobs = sometimes

step = learner.Learner.step
def seen(self, *arguments):
    result = step(self, *arguments)
    found.append(self.tokens_per_micro_batch)
    return result
learner.Learner.step = seen

table = json.loads({json.dumps(GAME)!r})
self_play(Config.from_table(table), sys.argv[1])
print("SIZES", os.environ["RANK"], found, flush=True)
"""
    )
    process = start(folder, 2, "--", script, folder / "out")
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    sizes = dict(re.findall(r"SIZES (\d) (\[.*\])", said))
    assert sizes["0"] == sizes["1"]
    assert max(json.loads(sizes["1"])) < 256
    assert_same_play(alone(), RunFolder(folder / "out"))


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
    sys.path.insert(0, str(folder))
    recipe.write_text(Config.from_table(table).to_toml())
    return recipe, folder / name


def wait_for_steps(run: Path, count: int, process: subprocess.Popen) -> None:
    file, end = run / "metrics.jsonl", time.monotonic() + 120
    while not file.is_file() or file.read_text().count("\n") < count:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.05)


def resume(folder: Path, ranks: int, run: Path) -> RunFolder:
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
def test_sigterm_at_any_rank_pauses_all_and_another_number_of_ranks_goes_on(folder, undisturbed):
    recipe, run = slow_game(folder, "paused")
    process = lsp(folder, 2, "train", recipe, "--run", run)
    wait_for_steps(run, 2, process)
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


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3, 1])
def test_shards_of_two_ranks_are_gone_on_from_by_any_number(folder, undisturbed, ranks):
    name = f"sharded-{ranks}"
    recipe, run = slow_game(folder, name, **FSDP)
    process = lsp(folder, 2, "train", recipe, "--run", run)
    wait_for_steps(run, 3, process)
    os.kill(rank_process(process, 0), signal.SIGKILL)
    process.communicate(timeout=120)
    shards = sorted(p.name for p in (run / "checkpoints/step-000002/shards").iterdir())
    assert shards == ["shard-00000-of-00002.safetensors", "shard-00001-of-00002.safetensors"]
    resumed = resume(folder, ranks, run)
    for name, weight in weights(undisturbed).items():
        torch.testing.assert_close(weights(resumed)[name], weight, rtol=0, atol=1e-5)
    assert not list((run / "checkpoints").glob(".*"))


@pytest.mark.slow
def test_what_goes_wrong_on_the_first_rank_is_told_once_and_ends_all(folder):
    (folder / "bad_reward.py").write_text("def reward(queries, answers):\n    return [1.0]\n")
    recipe, run = slow_game(folder, "bad")
    recipe.write_text(recipe.read_text().replace("slow_reward", "bad_reward"))
    process = lsp(folder, 2, "train", recipe, "--run", run)
    said, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert said.count("reward.main: ") == 1
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
    processes[1].send_signal(signal.SIGTERM)
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [75, 75]
    assert "paused" in said[0]
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


@pytest.mark.parametrize(
    ("tables", "sentence"),
    [
        ({"policy": {"lora": {}}, **FSDP}, "does not go together with policy.lora"),
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
        save_shard(tmp_path, own | {"step": torch.tensor(5.0)}, pieces, r, 3)
    shards = Shards((file, "") for file in sorted(tmp_path.iterdir()))
    assert torch.equal(shards.read("w"), whole["w"])
    assert shards.read("step") == 5.0
    for size in (1, 2, 4, 9):
        parts = [shards.read("w", r, size) for r in range(size)]
        assert torch.equal(torch.cat(parts), whole["w"])
        assert [len(p) for p in parts] == [len(rows_of(r, size, 7)) for r in range(size)]


def test_settings_of_ranks_can_change_when_a_run_is_resumed(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.create(Config.from_table(GAME))
    run.refuse_changes(Config.from_table(merge(GAME, FSDP)))
