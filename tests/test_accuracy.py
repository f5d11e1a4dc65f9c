"""Accuracy in the arena: exact probabilities, and greedy decoding without decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from language_self_play.arena.questions import held_out_problems
from language_self_play.arena.tasks import Problem
from language_self_play.chat import Chat
from language_self_play.errors import MemoryLimitError
from language_self_play.evaluate.accuracy import (
    Accuracy,
    QuestionResult,
    arena_accuracy,
    evaluation_batches,
)
from out_of_memory import OUT_OF_MEMORY, limit_rows

TOKENS_AT_ONCE = 2_000


def test_an_answers_probability_is_the_product_over_its_tokens_and_any_stop_token(
    tiny_llama: Any, tokenizer: Any
):
    stops = tokenizer.convert_tokens_to_ids(["<|end|>", "!", "?"])
    results = arena_accuracy(
        tiny_llama, Chat(tokenizer, stops, {}), evaluation_batches(TOKENS_AT_ONCE)
    ).results
    problems = held_out_problems()
    assert [(r.query, r.answer) for r in results] == [(q, p.answer) for q, p in problems]
    assert [(r.tier, r.task) for r in results] == [(p.tier, p.task) for _, p in problems]
    found, expected = [], []
    for result in results[::10]:
        prompt = tokenizer.encode(f"<|user|>{result.query}<|assistant|>")
        answer = tokenizer.convert_tokens_to_ids(list(result.answer))
        sequence = torch.tensor([prompt + answer])
        with torch.no_grad():
            logits = tiny_llama(sequence, attention_mask=torch.ones_like(sequence)).logits[0]
        p = logits.double().softmax(-1)[len(prompt) - 1 :].tolist()
        product = sum(p[len(answer)][stop] for stop in stops)
        for place, token in enumerate(answer):
            product *= p[place][token]
        found.append(result.probability)
        expected.append(product)
    found, expected = torch.tensor(found).log(), torch.tensor(expected).log()
    assert expected.std() > 1
    assert_close(found, expected, rtol=0, atol=1e-4)


def test_the_number_of_tokens_at_once_changes_nothing(tiny_llama: Any, chat: Chat):
    few, many = (
        arena_accuracy(tiny_llama, chat, evaluation_batches(n)).results for n in (200, 20_000)
    )
    assert [r.greedy for r in few] == [r.greedy for r in many]
    few, many = (torch.tensor([r.probability for r in results]).log() for results in (few, many))
    assert_close(few, many, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", OUT_OF_MEMORY)
def test_without_memory_batches_are_halved_and_accuracy_is_the_same(
    tiny_llama: Any, chat: Chat, kind: str
):
    batches = evaluation_batches(20_000)
    whole = arena_accuracy(tiny_llama, chat, batches)
    rows = limit_rows(tiny_llama, 8, OUT_OF_MEMORY[kind])
    halved = arena_accuracy(tiny_llama, chat, batches)
    refused = [n for n in rows if n > 8]
    assert max(rows) == max(refused) > 16
    assert sum(n for n in rows if n <= 8) == len(held_out_problems())  # each question once
    for one, other in zip(whole.results, halved.results, strict=True):
        assert (one.query, one.greedy) == (other.query, other.greedy)
    few, many = (torch.tensor([r.probability for r in a.results]).log() for a in (whole, halved))
    assert_close(few, many, rtol=0, atol=1e-4)
    assert_close(few.exp(), many.exp(), rtol=0, atol=1e-5)
    assert batches.tokens < batches.configured
    del rows[:]
    assert arena_accuracy(tiny_llama, chat, batches).results == halved.results
    assert max(rows) <= 8  # at once: the size is kept


def test_one_question_that_memory_does_not_hold_says_so(tiny_llama: Any, chat: Chat):
    limit_rows(tiny_llama, 0, OUT_OF_MEMORY["torch"])
    with pytest.raises(MemoryLimitError, match=r"^the arena's accuracy: no memory left for a pass"):
        arena_accuracy(tiny_llama, chat, evaluation_batches(20_000))


def test_greedy_is_what_greedy_decoding_gives(
    tiny_llama: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
):
    stops = tokenizer.convert_tokens_to_ids(["<|end|>", "!", "?"])
    with torch.no_grad():
        tiny_llama.lm_head.weight[stops] *= 3  # so that greedy decoding stops now and then
    problems, expected = [], []
    for query, problem in held_out_problems()[::6]:
        prompt = torch.tensor([tokenizer.encode(f"<|user|>{query}<|assistant|>")])
        generated = tiny_llama.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=8,
            eos_token_id=stops,
            pad_token_id=tokenizer.pad_token_id,
        )[0, prompt.shape[1] :].tolist()
        text = tokenizer.decode(generated[:-1], skip_special_tokens=True)
        if generated[-1] not in stops or tokenizer.encode(text) != generated[:-1]:
            continue
        # The answer to reversing a text is the text reversed: questions whose answer is what greedy
        # decoding gives, the same without its end, and with one more letter.
        for answer in {text, text[:-1], text + "a"}:
            if answer:
                problems.append((query, Problem("reverse", problem.tier, (answer[::-1],))))
                expected.append(answer == text)
    assert 20 < sum(expected) < len(expected) - 20
    monkeypatch.setattr("language_self_play.evaluate.accuracy.held_out_problems", lambda: problems)
    results = arena_accuracy(
        tiny_llama, Chat(tokenizer, stops, {}), evaluation_batches(TOKENS_AT_ONCE)
    ).results
    assert [r.greedy for r in results] == expected


def result(tier: str, probability: float, greedy: bool) -> QuestionResult:
    return QuestionResult("q", "a", tier, "add", probability, greedy)


def test_metrics_are_means_with_intervals_over_all_and_by_tier():
    accuracy = Accuracy(
        [
            result("hard", 0.4, False),
            result("easy", 1.0, True),
            result("hard", 0.2, True),
            result("easy", 0.4, True),
        ]
    )
    assert accuracy.tiers() == ["easy", "hard"]
    # With z = 1.959964, half-widths of means are z · √(Σ(x - mean)² / (n - 1) / n):
    # 0.4 1 0.2 0.4, mean 0.5: √(0.36 / 3 / 4) = 0.173205; 1 0.4, mean 0.7: √(0.18 / 2) = 0.3;
    # 0.4 0.2, mean 0.3: √(0.02 / 2) = 0.1.
    # Those of shares p are Wilson's, z · √(p (1 - p) / n + z² / 4n²) / (1 + z² / n):
    # 3 of 4: z · √(0.046875 + 0.060023) / 1.960365; 2 of 2: z · √0.240091 / 2.920729;
    # 1 of 2: z · √(0.125 + 0.240091) / 2.920729.
    expected = {
        "eval/sampled_accuracy": 0.5,
        "eval/sampled_accuracy_ci95": 0.339476,
        "eval/sampled_accuracy/easy": 0.7,
        "eval/sampled_accuracy_ci95/easy": 0.587989,
        "eval/sampled_accuracy/hard": 0.3,
        "eval/sampled_accuracy_ci95/hard": 0.195996,
        "eval/greedy_accuracy": 0.75,
        "eval/greedy_accuracy_ci95": 0.326885,
        "eval/greedy_accuracy/easy": 1.0,
        "eval/greedy_accuracy_ci95/easy": 0.328810,
        "eval/greedy_accuracy/hard": 0.5,
        "eval/greedy_accuracy_ci95/hard": 0.405469,
    }
    assert accuracy.metrics() == pytest.approx(expected, rel=1e-5)
