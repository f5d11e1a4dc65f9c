"""The quality self-reward R_Q: the reference model scores each (query, answer) pair from 0 to 7."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from language_self_play.chat import Chat
from language_self_play.config import Config, Sampling, SelfReward
from language_self_play.distributed import ALONE, Ranks
from language_self_play.errors import ConfigError
from language_self_play.policy import Policy
from language_self_play.prefill import Beginning, next_logits
from language_self_play.prompts import (
    MAX_SCORE,
    SCORE_PREFIX,
    criterion_prompt,
    judge_prompt,
    parse_score,
    rubric_criteria,
    rubric_text,
)
from language_self_play.row_batches import RowBatches
from language_self_play.sampling.transformers import TransformersSampler
from language_self_play.types import Group, Role

# Sampler.sample, of the reference.
Write = Callable[[list[list[int]], int, Role, Sampling, int], list[Group]]


class JudgeQuestions:
    """What the judge is asked, as tokens; everything that can be wrong with a rubric shows here.

    Raises ConfigError for a rubric that the mode can't use, the tokenizer can't score, or the
    context does not hold.
    """

    def __init__(self, settings: SelfReward, chat: Chat, context_length: int):
        self.chat = chat
        self.context_length = context_length
        self.rubric = rubric_text(settings.rubric)
        self.criteria: list[str] = []
        self.choices: list[int] = []
        empty = self.prompts([("", "")])
        if settings.mode == "criteria":
            self.criteria = rubric_criteria(self.rubric)
            self.choices = _next_tokens(chat, "", ["no", "yes", "No", "Yes"])
            empty = self.criterion_prompts([("", "")])
        elif settings.mode == "expected":
            digits = [str(s) for s in range(MAX_SCORE + 1)]
            self.choices = _next_tokens(chat, SCORE_PREFIX, digits)
        if not all(map(self.fits, empty)):
            raise ConfigError(
                f"self_reward.rubric = {settings.rubric!r}: takes {max(map(len, empty))} tokens, and"
                f" the model's context has only {context_length}; use a shorter rubric (`arena` is one for the"
                " arena's model)"
            )

    def prompts(self, pairs: list[tuple[str, str]], prefill: str = "") -> list[list[int]]:
        """The rubric about each (query, answer) pair."""
        return [
            self.chat.encode(judge_prompt(self.rubric, *self._plain(pair)), prefill=prefill)
            for pair in pairs
        ]

    def criterion_prompts(self, pairs: list[tuple[str, str]]) -> list[list[int]]:
        """For each pair one yes/no question a criterion."""
        return [
            self.chat.encode(criterion_prompt(criterion, *self._plain(pair)))
            for pair in pairs
            for criterion in self.criteria
        ]

    def _plain(self, pair: tuple[str, str]) -> tuple[str, str]:
        # A player that writes role marks must not speak to the judge with them.
        return self.chat.without_special(pair[0]), self.chat.without_special(pair[1])

    def fits(self, prompt: list[int]) -> bool:
        return len(prompt) < self.context_length


class QualityJudge:
    """Asks π_Ref about quality, in one of three modes. Equal pairs are asked about once.

    generate   it writes a justification and a score between tags (the paper's way); a reply
               without a score takes the mean of the batch's other scores
    expected   Σ_s s · p(s) over the digits 0 to 7, right after an opening score tag
    criteria   Σ_c p(yes) over the seven criteria

    `write` samples the replies where another engine than `sampler` holds π_Ref too.
    """

    def __init__(
        self,
        sampler: TransformersSampler,
        settings: SelfReward,
        tokens_at_once: int,
        as_reference: Callable[[], AbstractContextManager[PreTrainedModel]],
        write: Write | None = None,
    ):
        self.sampler = sampler
        self.write = write or sampler.sample
        self.as_reference = as_reference
        self.settings = settings
        self.batches = RowBatches(
            tokens_at_once,
            "self_reward",
            "use a shorter self_reward.rubric, or lower challenger.max_tokens or solver.max_tokens",
        )
        self.unparsable_fraction = 0.0
        self.questions = JudgeQuestions(settings, sampler.chat, sampler.context_length)

    def __call__(self, queries: list[str], answers: list[list[str]]) -> Tensor:
        """weight · R_Q of G answers to each of N queries, shape (N, G). Paper, Box 3."""
        pairs = [(q, a) for q, group in zip(queries, answers, strict=True) for a in group]
        distinct = list(dict.fromkeys(pairs))
        if not distinct:
            self.unparsable_fraction = 0.0
            return torch.zeros(0, 0)
        with self.as_reference() as self.sampler.model:
            scores = dict(zip(distinct, self.score(distinct), strict=True))
        rewards_NG = torch.tensor([scores[pair] for pair in pairs]).view(len(queries), -1)
        return self.settings.weight * rewards_NG

    def score(self, pairs: list[tuple[str, str]]) -> list[float]:
        """The score, 0 to 7, of each (query, answer) pair; without one, the others' mean."""
        match self.settings.mode:
            case "generate":
                scores = self._generate(pairs)
            case "expected":
                scores = self._expected(pairs)
            case "criteria":
                scores = self._criteria(pairs)
        known = [s for s in scores if s is not None]
        mean = sum(known) / len(known) if known else 0.0
        self.unparsable_fraction = 1 - len(known) / len(scores)
        return [mean if s is None else s for s in scores]

    def _generate(self, pairs: list[tuple[str, str]]) -> list[float | None]:
        prompts = self.questions.prompts(pairs)
        fitting = [i for i, prompt in enumerate(prompts) if self.questions.fits(prompt)]
        groups = self.write(
            [prompts[i] for i in fitting],
            1,
            "judge",
            Sampling(temperature=self.settings.temperature),
            self.settings.max_tokens,
        )
        scores: list[float | None] = [None] * len(pairs)
        for i, group in zip(fitting, groups, strict=True):
            [reply] = group.completions
            # What a damaged reference writes is no score, and no unparsable reply either.
            known = all(map(math.isfinite, reply.logprobs))
            scores[i] = parse_score(reply.text) if known else math.nan
        return scores

    def _expected(self, pairs: list[tuple[str, str]]) -> list[float | None]:
        rows = self._next_token(self.questions.prompts(pairs, SCORE_PREFIX))
        return [None if row is None else sum(s * p for s, p in enumerate(row)) for row in rows]

    def _criteria(self, pairs: list[tuple[str, str]]) -> list[float | None]:
        rows = self._next_token(self.questions.criterion_prompts(pairs))
        yes = [None if row is None else sum(row[1::2]) for row in rows]
        by_pair = [yes[i : i + MAX_SCORE] for i in range(0, len(yes), MAX_SCORE)]
        return [
            None if None in scores else sum(s for s in scores if s is not None)
            for scores in by_pair
        ]

    @torch.inference_mode()
    def _next_token(self, prompts: list[list[int]]) -> list[list[float] | None]:
        """Probabilities of the choices as the next token, renormalised over them.

        None for a prompt that the model's context does not hold. Each rank computes its share.
        """
        ranks = self.sampler.ranks
        share = ranks.share(len(prompts))
        own = json.dumps(self._next_token_of(prompts[share.start : share.stop]))
        return [row for part in ranks.gather(own.encode()) for row in json.loads(part)]

    def _next_token_of(self, prompts: list[list[int]]) -> list[list[float] | None]:
        model, pad_id = self.sampler.model, self.sampler.chat.pad_id
        result: list[list[float] | None] = [None] * len(prompts)
        fitting = [i for i, prompt in enumerate(prompts) if self.questions.fits(prompt)]
        asked = [prompts[i] for i in fitting]
        # All of them begin with the same instructions.
        shares = self.sampler.shares_prompts and len(asked) > 1
        beginning = Beginning(model, asked, pad_id) if shares else None
        skipped = beginning.length if beginning else 0

        def probabilities(places: list[int]) -> list[list[float]]:
            some = [asked[i] for i in places]
            if beginning and skipped:
                logits = beginning.next_logits(some)
            else:
                logits = next_logits(model, some, pad_id)
            return logits[:, self.questions.choices].float().softmax(-1).tolist()

        rows = self.batches.map(probabilities, [len(prompt) - skipped for prompt in asked])
        for i, row in zip(fitting, rows, strict=True):
            result[i] = row
        return result


def build_judge(
    config: Config, policy: Policy, write: Write | None = None, ranks: Ranks = ALONE
) -> QualityJudge:
    """The reference model as judge. Its randomness is a stream of its own."""
    tokens = config.learner.tokens_per_micro_batch
    # A judge's prompt may be much longer than a player's: a batch is bounded by its tokens, too.
    sampler = TransformersSampler(
        policy.whole,
        policy.chat,
        config.seed,
        config.rollout.batch_size,
        prompt_tokens=tokens,
        ranks=ranks,
    )
    return QualityJudge(sampler, config.self_reward, tokens, policy.as_whole_reference, write)


def _next_tokens(chat: Chat, prefill: str, words: list[str]) -> list[int]:
    """The token with which each word goes on after `prefill`, as the assistant would write it.

    Raises ConfigError if the tokenizer does not tell the words apart by their first tokens.
    """
    before = chat.encode("a query", prefill=prefill)
    tokens = []
    for word in words:
        whole = chat.encode("a query", prefill=prefill + word)
        if whole[: len(before)] == before and len(whole) > len(before):
            tokens.append(whole[len(before)])
    if len(set(tokens)) < len(words):
        raise ConfigError(
            f"self_reward.mode: the tokenizer has no token of its own for each of {words} after"
            f' {prefill!r}; use mode = "generate"'
        )
    return tokens
