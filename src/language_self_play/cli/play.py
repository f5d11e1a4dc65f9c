"""`lsp play`: watch a model play Challenger and Solver, or answer its queries yourself."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from language_self_play.cli import Parser, naming_model
from language_self_play.errors import ConfigError

if TYPE_CHECKING:
    from language_self_play.config import Config
    from language_self_play.game import Game

DESCRIPTION = """\
Watch a model pose queries as Challenger and answer them as Solver, each with its scores; or, with
--answer, answer the Challenger yourself and see who does better.

MODEL is a run folder, a model folder, a hub id, or `arena`. Prompts and rewards are those of the
run that the model comes from, of --recipe, or the defaults; flags such as --solver.temperature
change them."""

EPILOG = """\
examples:
  lsp play arena
  lsp play runs/arena/model --games 20
  lsp play runs/arena --answer"""

LEGEND = (
    "query  →  best answer  |  worst answer, each with its reward R and the model's own grade of its"
    " quality R_Q; V is the mean R of all answers."
)
UNITS_FIRST = " Numbers are answered units first (27+48 → 57)."
PAUSE_S = 0.7


def run(arguments: list[str]) -> int:
    parser = Parser(prog="lsp play", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--games", type=int, default=10, metavar="N", help="how many (default 10)")
    parser.add_argument("--answer", action="store_true", help="answer the Challenger yourself")
    parser.add_argument("--recipe", metavar="RECIPE", help="take prompts and rewards from here")
    if not {"-h", "--help"}.isdisjoint(arguments):
        parser.parse_args(["--help"])

    from language_self_play.cli.overrides import split_overrides
    from language_self_play.model_paths import resolve_model

    own, overrides = split_overrides(arguments, {"--games", "--answer", "--recipe"})
    options = parser.parse_args(own)
    if options.games < 1:
        raise ConfigError(f"--games {options.games}: must be at least 1")
    if isinstance(policy := overrides.get("policy"), dict) and "path" in policy:
        raise ConfigError(
            f"--policy.path {policy['path']}: the model to play is MODEL = {options.model!r}; name it there"
        )
    config = config_for(options.model, options.recipe, overrides)
    resolve_model(config.policy.path)  # a typing error is told before torch is imported

    from language_self_play.game import prepare

    with naming_model():
        game = prepare(config)
    play = answer_yourself if options.answer else watch
    play(game, options.games)
    return 0


def config_for(model: str, recipe: str | None, overrides: dict[str, Any]) -> Config:
    """The settings to play MODEL with, always as a game of LSP: both roles, and the self-reward."""
    from language_self_play.config import Config
    from language_self_play.model_paths import BUILT_IN_MODEL
    from language_self_play.recipe_files import load_recipe, merge
    from language_self_play.run_folder import RunFolder

    path = Path(model)
    run = RunFolder.holding(path)
    table: dict[str, Any] = {}
    if recipe is not None:
        table = load_recipe(recipe)
    elif run is not None:
        table = run.config()
        table.pop("device", None)  # where it was trained, which may be another machine
        model = str(run.newest_model()) if path == run.folder else model
    elif model == BUILT_IN_MODEL:
        table = load_recipe(BUILT_IN_MODEL)
    if table.get("reward"):
        played = Config.from_table(merge({"policy": {"path": model}}, table))
        if played.algorithm != "lsp" and any(r.kind == "arena" for r in played.reward.values()):
            # LSP-Zero says nothing about the judge, and GRPO nothing about the Challenger either.
            arena = load_recipe(BUILT_IN_MODEL)
            needed = ["self_reward", *(["challenger"] if played.algorithm == "grpo" else [])]
            table = merge(table, {name: arena[name] for name in needed})
    else:
        # Without a reward only the quality self-reward is shown.
        table["reward"] = {"none": {"kind": "python", "function": f"{__name__}:no_reward"}}
    table.pop("data", None)
    ours = {"policy": {"path": model}, "algorithm": "lsp"}
    return Config.from_table(merge(merge(table, ours), overrides))


def no_reward(queries: list[str], answers: list[str]) -> list[float]:
    """0 for everything: there is no verifier for a model without a run or a recipe."""
    return [0.0] * len(queries)


def watch(game: Game, num_games: int) -> None:
    """Print games as they are played."""
    from rich.console import Console
    from rich.text import Text

    from language_self_play.guard import refuse_nonfinite
    from language_self_play.players import answer_queries
    from language_self_play.progress import game_pieces, printable

    console = Console()
    console.print(LEGEND + (UNITS_FIRST if game.in_arena else ""), style="dim", highlight=False)
    shown = step = 0
    while shown < num_games:
        game.sync(step)
        posed = game.pose(step)
        assert posed is not None
        solved = answer_queries(game.sampler, posed.queries, game.config.solver)
        R, R_Q = (
            game.reward(posed.queries, solved.answers),
            game.self_reward(posed.queries, solved.answers),
        )
        refuse_nonfinite(posed, solved, R_Q)
        rows = iter(zip(solved.answers, R.tolist(), R_Q.tolist(), strict=True))
        for query in posed.all_queries[: num_games - shown]:
            text = Text(f"{shown + 1:>4}  ")
            if query.valid:
                texts, rewards, qualities = next(rows)
                answers = [
                    {"text": t, "reward": r, "quality": q}
                    for t, r, q in zip(texts, rewards, qualities, strict=True)
                ]
                for piece, style in game_pieces({"query": query.text, "answers": answers}):
                    text.append(piece, style)
            else:
                text.append(f"{printable(query.text)}  invalid: {query.reason}", "yellow")
            console.print(text)
            shown += 1
            if sys.stdout.isatty():
                time.sleep(PAUSE_S)
        step += 1


def answer_yourself(game: Game, num_games: int) -> None:
    """The Challenger asks the person; the Solver answers too, and both are scored."""
    from language_self_play.players import answer_queries
    from language_self_play.progress import printable

    units_first = game.in_arena
    if units_first:
        print(
            "Answer as usual (75 for 27+48); the arena and the Solver write the units first (57)."
            " An empty line skips."
        )
    person = solver = played = step = 0
    try:
        while played < num_games:
            game.sync(step)
            posed = game.pose(step)
            assert posed is not None
            for posed_query in posed.all_queries[: num_games - played]:
                query = posed_query.text
                print(f"\n{played + 1}/{num_games}  {printable(query)}")
                if not posed_query.valid:
                    print(f"  invalid: {posed_query.reason}")
                    played += 1
                    continue
                typed = input("  your answer: ").strip()
                if not typed:
                    continue
                mine = typed[::-1] if units_first and typed.isdecimal() else typed
                solved = answer_queries(game.sampler, [query], game.config.solver)
                theirs = solved.answers[0][0]
                R = game.reward([query], [[mine, theirs]])[0].tolist()
                print(f"  the Solver says {printable(theirs)}")
                print(f"  rewards: you {R[0]:.3g}, the Solver {R[1]:.3g}")
                person, solver, played = person + R[0], solver + R[1], played + 1
            step += 1
    except (EOFError, KeyboardInterrupt):
        print()
    if played:
        print(f"\nAfter {played} games: you {person:.3g}, the Solver {solver:.3g}.")
