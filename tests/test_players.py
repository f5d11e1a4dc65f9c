"""The two players: what a valid query is, and which answers are learned from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from language_self_play.advantages import challenger_advantages
from language_self_play.chat import Chat
from language_self_play.config import Challenger, Sampling, Solver
from language_self_play.errors import ConfigError, LspError
from language_self_play.players import (
    ChallengerPrompt,
    answer_queries,
    pose_queries,
    truncation_penalties,
)
from language_self_play.sampling.transformers import TransformersSampler
from language_self_play.types import Completion, Group, Posed

CUT = "CUT"  # A text that ends with this mark is one that the length limit cut off.


class ScriptedSampler:
    """Returns given texts as completions, and remembers what it was asked for."""

    def __init__(self, chat: Chat, texts: list[str], context_length: int = 100):
        self.chat = chat
        self.context_length = context_length
        self.texts = texts
        self.calls: list[dict[str, Any]] = []

    def sync(self, model: Any, step: int) -> None:
        raise AssertionError("players don't sync")

    def sample(
        self, prompts: list[list[int]], n: int, role: str, settings: Sampling, max_tokens: int
    ) -> list[Group]:
        self.calls.append(
            {"prompts": prompts, "n": n, "role": role, "settings": settings, "max": max_tokens}
        )
        texts = iter(self.texts)
        return [Group(p, [self._completion(next(texts)) for _ in range(n)]) for p in prompts]

    def _completion(self, text: str) -> Completion:
        tokens = self.chat.tokenizer.encode(text.removesuffix(CUT), add_special_tokens=False)
        reason = "length" if text.endswith(CUT) else "stop"
        return Completion(tokens, text.removesuffix(CUT), [-1.0] * len(tokens), reason)


@pytest.fixture
def pose(chat: Chat) -> Callable[..., Posed]:
    """pose("27+48", "", template="{a}+{b}"): what is read out of these completions."""

    def run(
        *texts: str,
        template: str = "",
        system_prompt: str | None = None,
        held_out: tuple[str, ...] = (),
        context_length: int = 100,
        chat: Chat = chat,
    ) -> Posed:
        settings = Challenger(num_queries=max(2, len(texts)))
        sampler = ScriptedSampler(chat, list(texts), context_length)
        prompt = ChallengerPrompt("Pose one task.", "adding", template)
        return pose_queries(sampler, prompt, settings, system_prompt, held_out.__contains__)

    return run


# ---------------------------------------------------------------- Challenger


@pytest.mark.parametrize(
    ("text", "template", "reason"),
    [
        ("27+48", "", None),
        ("27+48", "{a}+{b}", None),
        ("27+48" + CUT, "", "truncated"),
        ("", "", "empty"),
        (" \n", "", "empty"),
        ("<template>27+48", "", "tags"),
        ("27+48</template>", "{a}+{b}", "tags"),
        ("27-48", "{a}+{b}", "template"),
        ("{a}+48", "{a}+{b}", "template"),
        ("+48", "{a}+{b}", "template"),
        ("1" * 98, "", "too_long"),
        ("1" * 97, "", None),
        ("{a}" + CUT, "{a}+{b}", "truncated"),
    ],
)
def test_a_malformed_query_is_invalid_for_a_named_reason(pose, text, template, reason):
    # A conversation is <|user|>, the query's characters and <|assistant|>; the context 100 tokens,
    # of which one must be left for the answer.
    posed = pose(text, "1+1", template=template)
    query, other = posed.all_queries
    assert (query.valid, query.reason) == (reason is None, reason)
    assert query.text == text.removesuffix(CUT).strip()
    assert other.valid
    assert posed.queries == [q.text for q in (query, other) if q.valid]
    assert posed.valid == [reason is None, True]


def test_an_unsolvable_query_is_valid(pose):
    assert pose("1-2", "gibberish").queries == ["1-2", "gibberish"]


def test_invalid_queries_stay_in_the_group(pose):
    posed = pose("1+1", "", "2+2" + CUT, "3+3")
    assert posed.role == "challenger"
    assert posed.valid == [True, False, False, True]
    assert posed.queries == ["1+1", "3+3"]
    assert posed.texts == [["1+1", "", "2+2", "3+3"]]
    assert posed.held_out == []
    assert {q.task for q in posed.all_queries} == {"adding"}


def test_held_out_queries_are_counted_and_leave_the_group(pose):
    posed = pose("1+1", "2+2", "", "2+2", "3+3", held_out=("2+2",))
    assert posed.queries == ["1+1", "3+3"]
    assert posed.valid == [True, False, True]
    assert posed.texts == [["1+1", "", "3+3"]]
    assert [(q.text, q.valid, q.reason) for q in posed.held_out] == [("2+2", False, "held_out")] * 2


def test_a_malformed_query_is_not_held_out(pose):
    posed = pose("2+2" + CUT, "1+1", held_out=("2+2",))
    assert posed.held_out == []
    assert [q.reason for q in posed.all_queries] == ["truncated", None]


def test_the_held_out_check_sees_the_query_as_the_solver_would(pose):
    assert len(pose(" 2+2\n", "1+1", held_out=("2+2",)).held_out) == 1


def test_without_a_valid_query_nothing_is_answered_and_no_advantage_is_left(pose, chat):
    posed = pose("", "3+3" + CUT, "2+2", held_out=("2+2",))
    assert posed.queries == []
    assert posed.valid == [False, False]
    solved = answer_queries(ScriptedSampler(chat, []), posed.queries, Solver(group_size=2))
    assert solved.groups == solved.answers == []
    nothing = truncation_penalties(solved, Solver(truncated="penalize"))
    assert nothing.shape == (0, 0)
    assert challenger_advantages(nothing, nothing, posed.valid).tolist() == [0.0, 0.0]


def test_queries_that_are_all_held_out_leave_an_empty_group(pose):
    posed = pose("2+2", "2+2", held_out=("2+2",))
    assert (posed.queries, posed.valid, posed.texts) == ([], [], [[]])
    assert len(posed.held_out) == 2


def test_the_system_prompt_takes_its_place_in_the_context(pose, tokenizer):
    template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    chat = Chat(tokenizer, [3], {"chat_template": template})
    # 50 characters, the mark of the assistant's turn, and 48 or 49 characters before them.
    fits = pose("1" * 50, "1+1", chat=chat, system_prompt="s" * 48)
    assert fits.all_queries[0].reason is None
    exceeds = pose("1" * 50, "1+1", chat=chat, system_prompt="s" * 49)
    assert exceeds.all_queries[0].reason == "too_long"


def test_one_prompt_is_sampled_with_the_challengers_settings(chat):
    sampler = ScriptedSampler(chat, ["1+1"] * 5)
    settings = Challenger(num_queries=5, max_tokens=17, temperature=0.3)
    prompt = ChallengerPrompt("Pose one task.", "", "")
    posed = pose_queries(sampler, prompt, settings, None, lambda query: False)
    expected = {"n": 5, "role": "challenger", "settings": settings, "max": 17}
    assert sampler.calls == [expected | {"prompts": [chat.encode("Pose one task.")]}]
    assert posed.temperature == 0.3
    assert posed.groups[0].prompt == chat.encode("Pose one task.")


def test_a_challenger_prompt_that_fills_the_context_is_refused(chat):
    sampler = ScriptedSampler(chat, ["1+1"] * 2, context_length=20)
    # Two role marks and 18 characters are 20 tokens; one must be left for the query.
    long = ChallengerPrompt("x" * 18, "", "")
    with pytest.raises(ConfigError, match=r"challenger\.prompt: takes 20 tokens.*only 20"):
        pose_queries(sampler, long, Challenger(num_queries=2), None, lambda query: False)
    short = ChallengerPrompt("x" * 17, "", "")
    pose_queries(sampler, short, Challenger(num_queries=2), None, lambda query: False)


# ---------------------------------------------------------------- Solver


def test_every_query_is_a_plain_user_message_sampled_with_the_solvers_settings(chat):
    sampler = ScriptedSampler(chat, ["2", "3", "4", "5", "6", "7"])
    settings = Solver(group_size=3, max_tokens=9, temperature=0.4)
    solved = answer_queries(sampler, ["1+1", "2+2"], settings)
    prompts = [chat.tokenizer.encode(f"<|user|>{q}<|assistant|>") for q in ("1+1", "2+2")]
    expected = {"prompts": prompts, "n": 3, "role": "solver", "settings": settings, "max": 9}
    assert sampler.calls == [expected]
    assert solved.role == "solver"
    assert solved.temperature == 0.4
    assert solved.answers == [["2", "3", "4"], ["5", "6", "7"]]


ANSWERS = ["2", "3" + CUT, "4" + CUT, "5"]
QUERIES = ["1+1", "2+2"]


@pytest.mark.parametrize(
    ("truncated", "keep", "penalties"),
    [
        ("keep", None, [[0.0, 0.0], [0.0, 0.0]]),
        ("mask", [[True, False], [False, True]], [[0.0, 0.0], [0.0, 0.0]]),
        ("penalize", None, [[0.0, 0.7], [0.7, 0.0]]),
    ],
)
def test_answers_that_are_cut_off_are_kept_masked_or_penalized(chat, truncated, keep, penalties):
    settings = Solver(group_size=2, truncated=truncated, truncation_penalty=0.7)
    solved = answer_queries(ScriptedSampler(chat, ANSWERS), QUERIES, settings)
    assert solved.keep == keep
    torch.testing.assert_close(truncation_penalties(solved, settings), torch.tensor(penalties))


def test_a_query_that_fills_the_context_is_refused_in_one_sentence(make_model, chat):
    # GRPO's queries come from the user's file and may be of any length.
    model = make_model("gpt2", context=20)
    sampler = TransformersSampler(model, chat, seed=0, batch_size=8)
    with pytest.raises(LspError):
        answer_queries(sampler, ["1" * 30], Solver(group_size=2))
