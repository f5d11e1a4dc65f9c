"""A model's answers to instructions, through the sampler; what is answered is kept as it comes."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path

from language_self_play.config import GREEDY, Policy, Rollout, Sampling
from language_self_play.evaluate.generation import generation
from language_self_play.evaluate.kept import KeptRecords, written_when
from language_self_play.pretrained import choose_device, resolve_model
from language_self_play.sampling import Sampler


@dataclass(frozen=True)
class Answering:
    """How answers are drawn. A temperature of 0 is greedy decoding."""

    temperature: float = 0.0
    max_tokens: int = 1024
    rollout: Rollout = field(default_factory=lambda: Rollout(batch_size=64))
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"

    @property
    def sampling(self) -> Sampling:
        return Sampling(temperature=self.temperature) if self.temperature else GREEDY

    @property
    def decisive(self) -> list[object]:
        """What of it decides on the answers: of an engine's settings the context alone."""
        plain = [getattr(self, f.name) for f in fields(self) if f.name != "rollout"]
        rollout = self.rollout
        served = [rollout.vllm.context] if rollout.engine == "vllm" else []
        return [*plain, rollout.engine, rollout.batch_size, *served]


def answer(
    section: Policy,
    system_prompt: str | None,
    instructions: Sequence[str],
    how: Answering,
    folder: Path,
    tell: Callable[[int, int], None] = lambda done, of: None,
) -> list[str]:
    """The model's answer to each instruction. Its weights are loaded only if some are missing.

    Batch by batch they are appended to answers-ENGINE-….jsonl in `folder`, where the next call with the
    same model and settings finds them, once no other process answers there. An instruction that leaves
    no room in the context gets an empty answer, and a warning. Raises ModelError, ConfigError or
    InputFileError.
    """
    with _alone(folder):
        return _answer(section, system_prompt, instructions, how, folder, tell)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Another command that answers in `folder` is waited for: then its answers are there."""
    number = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some file systems have no locks
            try:
                fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                warnings.warn(
                    f"{folder}: another command answers there, and is waited for", stacklevel=2
                )
                fcntl.flock(number, fcntl.LOCK_EX)
        yield
    finally:
        os.close(number)


def _answer(
    section: Policy,
    system_prompt: str | None,
    instructions: Sequence[str],
    how: Answering,
    folder: Path,
    tell: Callable[[int, int], None],
) -> list[str]:
    asked, engine = _identity(section, system_prompt, instructions, how), how.rollout.engine
    file, total = folder / f"answers-{engine}-{asked}.jsonl", len(instructions)
    size = how.rollout.batch_size
    kept = KeptRecords(file, {"asked": asked, "engine": engine}, size, total)
    tell(len(kept.records), total)
    if len(kept.records) == total:
        return [str(record["output"]) for record in kept.records]
    device = choose_device(how.device)
    too_long: list[str] = []
    with generation(section, how.rollout, device, how.dtype, how.seed) as (sampler, model):
        for start in range(len(kept.records), total, size):
            batch = instructions[start : start + size]
            sampler.sync(model, start)  # draws are functions of where the batch begins
            new, without_room = _answers_of(sampler, batch, system_prompt, how)
            too_long += without_room
            kept.add([{"output": text} for text in new])
            tell(len(kept.records), total)
    if too_long:
        warnings.warn(
            f"{len(too_long)} of the {total} instructions leave no room for an answer"
            f" in {section.path}'s context of {sampler.context_length} tokens, such as"
            f" {too_long[0][:60]!r}; they count as answered by nothing",
            stacklevel=2,
        )
    return [str(record["output"]) for record in kept.records]


def _answers_of(
    sampler: Sampler, instructions: Sequence[str], system_prompt: str | None, how: Answering
) -> tuple[list[str], list[str]]:
    """(an answer to each instruction, the instructions that the context does not hold)."""
    prompts = [sampler.chat.encode(text, system_prompt) for text in instructions]
    fitting = [i for i, prompt in enumerate(prompts) if len(prompt) < sampler.context_length]
    groups = sampler.sample(
        [prompts[i] for i in fitting], 1, "solver", how.sampling, how.max_tokens
    )
    answers = [""] * len(prompts)
    for i, group in zip(fitting, groups, strict=True):
        answers[i] = group.completions[0].text
    return answers, [instructions[i] for i in range(len(prompts)) if i not in set(fitting)]


def _identity(
    section: Policy, system_prompt: str | None, instructions: Sequence[str], how: Answering
) -> str:
    """A hash of all that decides on the answers; of a model in a folder also when it was written."""
    files = written_when(Path(resolve_model(section.path)))
    model = section.model_dump(exclude={"lora"})
    asked = [model, files, system_prompt, list(instructions), how.decisive]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:12]
