"""The quality self-reward R_Q: the reference model scores each (query, answer) pair from 0 to 7."""

from __future__ import annotations

import torch
from torch import Tensor

from language_self_play.config import Config, Sampling, SelfReward
from language_self_play.errors import ConfigError
from language_self_play.packing import pad_left
from language_self_play.policy import Chat, Policy
from language_self_play.prompts import (
    MAX_SCORE,
    SCORE_PREFIX,
    criterion_prompt,
    judge_prompt,
    parse_score,
    rubric_criteria,
    rubric_text,
)
from language_self_play.sampling.transformers import TransformersSampler


class QualityJudge:
    """Asks π_Ref about quality, in one of three modes. Equal pairs are asked about once.

    generate   it writes a justification and a score between tags (the paper's way); a reply
               without a score takes the mean of the batch's other scores
    expected   Σ_s s · p(s) over the digits 0 to 7, right after an opening score tag
    criteria   Σ_c p(yes) over the seven criteria
    """

    def __init__(self, sampler: TransformersSampler, settings: SelfReward, tokens_at_once: int):
        self.sampler = sampler
        self.settings = settings
        self.tokens_at_once = tokens_at_once
        self.unparsable_fraction = 0.0  # of the last call's replies, in mode generate
        self.rubric = rubric_text(settings.rubric)
        if settings.mode == "criteria":
            self.criteria = rubric_criteria(self.rubric)
            self.choices = [[_first_token(sampler.chat, w) for w in ("no", "yes")]]
            self.choices += [[_first_token(sampler.chat, w) for w in ("No", "Yes")]]
        elif settings.mode == "expected":
            self.digits = [_first_token(sampler.chat, str(s)) for s in range(MAX_SCORE + 1)]

    def __call__(self, queries: list[str], answers: list[list[str]]) -> Tensor:
        """weight · R_Q of G answers to each of N queries, shape (N, G). Paper, Box 3."""
        pairs = [(q, a) for q, group in zip(queries, answers, strict=True) for a in group]
        distinct = list(dict.fromkeys(pairs))
        if not distinct:
            return torch.zeros(0, 0)
        scores = dict(zip(distinct, self.score(distinct), strict=True))
        rewards_NG = torch.tensor([scores[pair] for pair in pairs]).view(len(queries), -1)
        return self.settings.weight * rewards_NG

    def score(self, pairs: list[tuple[str, str]]) -> list[float]:
        """The score, 0 to 7, of each (query, answer) pair."""
        match self.settings.mode:
            case "generate":
                return self._generate(pairs)
            case "expected":
                return self._expected(pairs)
            case "criteria":
                return self._criteria(pairs)

    def _generate(self, pairs: list[tuple[str, str]]) -> list[float]:
        prompts = self._prompts(pairs)
        settings = Sampling(temperature=self.settings.temperature)
        groups = self.sampler.sample(prompts, 1, "judge", settings, self.settings.max_tokens)
        scores = [parse_score(group.completions[0].text) for group in groups]
        known = [s for s in scores if s is not None]
        mean = sum(known) / len(known) if known else 0.0
        self.unparsable_fraction = 1 - len(known) / len(scores)
        return [mean if s is None else float(s) for s in scores]

    def _expected(self, pairs: list[tuple[str, str]]) -> list[float]:
        probabilities = self._next_token(self._prompts(pairs, SCORE_PREFIX), self.digits)
        return (probabilities @ torch.arange(MAX_SCORE + 1.0)).tolist()

    def _criteria(self, pairs: list[tuple[str, str]]) -> list[float]:
        prompts = [
            self.sampler.chat.encode(criterion_prompt(criterion, query, answer))
            for query, answer in pairs
            for criterion in self.criteria
        ]
        flat = [token for pair in self.choices for token in pair]
        probabilities = self._next_token(prompts, flat)
        yes = probabilities[:, 1::2].sum(-1)
        return yes.view(len(pairs), MAX_SCORE).sum(-1).tolist()

    def _prompts(self, pairs: list[tuple[str, str]], prefill: str = "") -> list[list[int]]:
        return [
            self.sampler.chat.encode(judge_prompt(self.rubric, q, a), prefill=prefill)
            for q, a in pairs
        ]

    @torch.inference_mode()
    def _next_token(self, prompts: list[list[int]], choices: list[int]) -> Tensor:
        """Probabilities of `choices` as the next token, renormalised over them."""
        model, chat = self.sampler.model, self.sampler.chat
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        result = torch.empty(len(prompts), len(choices))
        start = 0
        while start < len(order):
            # Sorted by length: the last row of a batch is its longest.
            end = start + 1
            while end < len(order) and (
                (end + 1 - start) * len(prompts[order[end]]) <= self.tokens_at_once
            ):
                end += 1
            rows = order[start:end]
            tokens, mask = pad_left([prompts[i] for i in rows], chat.pad_id, model.device)
            logits = model(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=(mask.cumsum(-1) - 1).clamp_min(0),
                logits_to_keep=1,
            ).logits[:, -1]
            result[rows] = logits[:, choices].float().softmax(-1).cpu()
            start = end
        return result


def build_judge(config: Config, policy: Policy) -> QualityJudge:
    """The reference model as judge. Its randomness is a stream of its own."""
    assert policy.reference is not None, "LSP loads a reference"
    sampler = TransformersSampler(
        policy.reference, policy.chat, config.seed, config.rollout.batch_size
    )
    return QualityJudge(sampler, config.self_reward, config.learner.tokens_per_micro_batch)


def _first_token(chat: Chat, word: str) -> int:
    tokens = chat.encode_reply(word)
    if not tokens:
        raise ConfigError(
            f'self_reward.mode: the tokenizer has no token for {word!r}; use mode = "generate"'
        )
    return tokens[0]
