"""The arena's tiny chat model: its words, its chat template, its size and what its judge is taught."""

from __future__ import annotations

import string

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from language_self_play.arena.tiny_model import (
    WORDS,
    build_config,
    build_tokenizer,
    judge_score,
)

FUZZ = settings(max_examples=200, deadline=None, database=None, derandomize=True)
MARKS = ("<|pad|>", "<|user|>", "<|assistant|>", "<|end|>")


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


# ---------------------------------------------------------------- words


@FUZZ
@given(
    st.text(string.digits + string.ascii_letters + string.punctuation + " \n", max_size=40)
    | st.lists(st.sampled_from([*WORDS, "reverse", "sort", " ", "7", "kite"])).map("".join)
)
def test_text_of_printable_characters_survives_encoding_and_decoding(tokenizer, text):
    assume(not any(mark in text for mark in MARKS))
    tokens = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(tokens) == text
    assert tokenizer.decode(tokens, skip_special_tokens=True) == text


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("27+48", ["2", "7", "+", "4", "8"]),
        ("reverse kite", ["reverse ", "k", "i", "t", "e"]),
        ("sort kite", ["sort ", "k", "i", "t", "e"]),
        ("Pose one task.", ["Pose one task."]),
        ("Judge 2*3 => 6", ["Judge ", "2", "*", "3", " => ", "6"]),
        ("<score>7</score>", ["<score>", "7", "</score>"]),
        ("reverse", ["r", "e", "v", "e", "r", "s", "e"]),
        ("Pose", ["P", "o", "s", "e"]),
        ("a\nb", ["a", "\n", "b"]),
        ("<|user|>27<|end|>", ["<|user|>", "2", "7", "<|end|>"]),
    ],
)
def test_words_are_one_token_each_and_everything_else_is_spelled(tokenizer, text, tokens):
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.convert_ids_to_tokens(ids) == tokens


def test_what_is_not_printable_ascii_becomes_a_space(tokenizer):
    ids = tokenizer.encode("\u00e9\t\u4e2d", add_special_tokens=False)
    assert tokenizer.convert_ids_to_tokens(ids) == [" ", " ", " "]


def test_the_role_marks_are_skipped_when_text_is_read_back(tokenizer):
    ids = tokenizer.encode("<|assistant|>57<|end|><|pad|>", add_special_tokens=False)
    assert len(ids) == 5
    assert tokenizer.decode(ids, skip_special_tokens=True) == "57"


def test_padding_is_on_the_left_with_its_own_token(tokenizer):
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|pad|>", "<|end|>")
    rows = tokenizer(["7", "27"], padding=True, add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(rows[0]) == ["<|pad|>", "7"]


# ---------------------------------------------------------------- chat template


@pytest.mark.parametrize(
    ("user", "assistant"),
    [
        ("Pose one task.", "27+48"),
        ("27+48", "57"),
        ("Judge 27+48 => 57", "<score>7</score>"),
    ],
)
def test_the_chat_template_renders_each_skill_exactly(tokenizer, user, assistant):
    question = [{"role": "user", "content": user}]
    prompt = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    assert prompt == f"<|user|>{user}<|assistant|>"
    conversation = [*question, {"role": "assistant", "content": assistant}]
    whole = tokenizer.apply_chat_template(conversation, tokenize=False)
    assert whole == f"<|user|>{user}<|assistant|>{assistant}<|end|>"


def test_the_chat_template_refuses_a_system_message(tokenizer):
    from jinja2 import TemplateError

    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1"}]
    with pytest.raises(TemplateError, match="knows only user and assistant messages"):
        tokenizer.apply_chat_template(messages, tokenize=False)


# ---------------------------------------------------------------- architecture


def test_the_model_has_the_684_thousand_parameters_that_its_docstring_rounds_to_0_7_million(
    tokenizer,
):
    import torch
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(build_config(tokenizer))
    # 4 marks + 7 words + 96 characters = 107 tokens. Embedding and head: 2 · 107 · 128 = 27,392.
    # A layer: attention 4 · 128² + MLP 3 · 128 · 256 + two norms 256 = 164,096. Last norm: 128.
    assert sum(p.numel() for p in model.parameters()) == 27_392 + 4 * 164_096 + 128 == 683_904


# ---------------------------------------------------------------- judge


@pytest.mark.parametrize(
    ("query", "answer", "score"),
    [
        ("27+48", "57", 7),
        ("27+48", "75", 4),  # identified, well posed, a number, of the right length
        ("27+48", "5", 3),  # a number, too short
        ("27+48", "ab", 3),  # of the right length, but letters
        ("27+48", "abc", 2),
        ("27+48", "", 2),
        ("27+48", "57 ", 2),
        ("sort kite", "eikt", 7),
        ("sort kite", "eitk", 4),
        ("sort kite", "eikte", 3),
        ("sort kite", "1234", 3),
        ("reverse kite", "etik", 7),
        ("137*0", "0", 7),
        # Ill-posed, whatever the answer: 1 if one can tell what is meant, 0 if one can't.
        ("3-5", "2", 1),
        ("007+1", "8", 1),
        ("10000+1", "10001", 1),
        ("reverse a", "a", 1),
        ("1+2+3+4", "01", 0),
        ("hello", "hello", 0),
        ("", "", 0),
    ],
)
def test_the_judge_is_taught_an_additive_score_of_query_and_answer(query, answer, score):
    assert judge_score(query, answer) == score
