"""Numbers that are not finite: where they are, in words, and the batch that they spoilt, in a file.

A step with such a number learns nothing: no weight and no moment of AdamW changes. Its record leaves the
number out, its games have null for it, `guard/skipped` counts it and an event says why.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from language_self_play.durable import replace_text
from language_self_play.errors import NonFiniteError, RunFolderError
from language_self_play.run_folder import RunFolder
from language_self_play.types import Completion, Groups, Posed, Solved

if TYPE_CHECKING:
    from torch import Tensor

    from language_self_play.chat import Chat
    from language_self_play.metrics import Turn

# (role, its place): the Challenger's completion, or the Solver's group.
Place = tuple[str, int]
MAX_NAMED = 3
QUERY_SHOWN = 60


def places_of_logprobs(*played: Groups | None) -> list[Place]:
    """Where the sampler's log-probs are not finite."""
    places: list[Place] = []
    for groups in played:
        if groups is None:
            continue
        by_place: list[list[Completion]] = [group.completions for group in groups.groups]
        if groups.role == "challenger":
            by_place = [[completion] for completion in groups.completions()]
        for i, completions in enumerate(by_place):
            if not all(math.isfinite(p) for c in completions for p in c.logprobs):
                places.append((groups.role, i))
    return places


def refuse_nonfinite(posed: Posed | None, solved: Solved, R_Q_NG: Tensor) -> None:
    """Raises NonFiniteError for log-probs of the sampler's, or a self-reward, that is not finite."""
    if places := places_of_logprobs(posed, solved):
        raise NonFiniteError(
            "the sampler's log-probs are not finite; the weights are damaged or the learning rate is"
            " too high",
            places,
        )
    bad = [i for i, row in enumerate(R_Q_NG.tolist()) if not all(map(math.isfinite, row))]
    if bad:
        raise NonFiniteError(
            "the quality self-reward is not finite; the reference model's weights are damaged, or"
            " dtype has too small a range for it",
            [("solver", i) for i in bad],
        )


def in_words(places: Iterable[Place], posed: Posed | None, queries: list[str]) -> str:
    """`solver, game 3 ('27+48')`: the games concerned, by their index in the step's games."""
    of_query = list(range(len(queries)))
    if posed is not None:
        of_query = [i for i, valid in enumerate(posed.valid) if valid]
    named: dict[str, list[str]] = {}
    for role, place in places:
        index = place if role == "challenger" else of_query[place]
        query = queries[place] if role != "challenger" or posed is None else ""
        if role == "challenger" and posed is not None:
            query = posed.all_queries[place].text
        shown = ascii(query[:QUERY_SHOWN])
        named.setdefault(role, []).append(f"game {index} ({shown})")
    words = []
    for role, games in named.items():
        more = len(games) - MAX_NAMED
        rest = [f"{more} more"] if more > 0 else []
        words.append(f"{role}, {', '.join([*games[:MAX_NAMED], *rest])}")
    return "; ".join(words)


def write_batch(run: RunFolder, turn: Turn, chat: Chat) -> Path:
    """Write nonfinite/step-000012.json: all that the step played and would have learned from.

    What is not finite is a string in it, such as "nan". Raises RunFolderError.
    """
    file = run.folder / "nonfinite" / f"step-{turn.step:06d}.json"
    batch = {
        "step": turn.step,
        "reason": turn.result.skipped,
        "rewards": turn.R_NG.tolist(),
        "qualities": turn.R_Q_NG.tolist(),
        "groups": [
            group
            for played in (turn.posed, turn.solved)
            if played is not None
            for group in _groups(played, chat)
        ],
    }
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_text(file, json.dumps(_strict(batch), indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise RunFolderError(f"{file}: can't be written ({error.strerror})") from None
    return file


def _groups(played: Groups, chat: Chat) -> list[dict[str, Any]]:
    advantages: list[Any] = [[None] * len(group.completions) for group in played.groups]
    if played.advantages is not None and played.advantages.numel():
        advantages = played.advantages.view(len(played.groups), -1).tolist()
    return [
        {
            "role": played.role,
            "temperature": played.temperature,
            "prompt": chat.decode([group.prompt])[0],
            "completions": [
                {"advantage": advantage, **completion._asdict()}
                for completion, advantage in zip(group.completions, row, strict=True)
            ],
        }
        for group, row in zip(played.groups, advantages, strict=True)
    ]


def _strict(value: Any) -> Any:
    """`value` as strict JSON has it: numbers that are not finite as their names."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    return value
