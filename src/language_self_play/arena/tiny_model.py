"""The arena's tiny chat model: its words, its chat template, its architecture and its three skills.

The skills are told apart by the prompt alone, as Challenger, Solver and judge are in the paper:

    <|user|>Pose one task.<|assistant|>27+48<|end|>
    <|user|>27+48<|assistant|>57<|end|>
    <|user|>Judge 27+48 => 57<|assistant|><score>7</score><|end|>
"""

from __future__ import annotations

import re
import string
from typing import TYPE_CHECKING

from language_self_play.arena.tasks import Unsolvable, parse

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedTokenizerFast

PAD, USER, ASSISTANT, END = "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"
POSE_PROMPT = "Pose one task."
JUDGE_PROMPT = "Judge {query} => {answer}"
SCORE_REPLY = "<score>{score}</score>"

# Everything else is spelled in characters.
WORDS = ("reverse ", "sort ", POSE_PROMPT, "Judge ", " => ", "<score>", "</score>")

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<|user|>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '<|assistant|>' + message['content'] + '<|end|>' }}"
    "{% else %}{{ raise_exception('The arena model knows only user and assistant messages.') }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

MAX_POSITIONS = 128


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character of printable ASCII, and one for each of WORDS and the role marks."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = sorted(set(string.printable) - set("\t\r\x0b\x0c"))
    vocabulary = [PAD, USER, ASSISTANT, END, *WORDS, *characters]
    tokenizer = Tokenizer(
        models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token=" ")
    )
    longest_first = sorted(WORDS, key=len, reverse=True)
    pieces = "|".join(map(re.escape, longest_first)) + r"|[\s\S]"
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pieces), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_POSITIONS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """The architecture: a Llama of about 0.7 M parameters."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )


def judge_score(query: str, answer: str) -> int:
    """The score that the judge is taught to give, an additive 0 to 7 as in the paper's Box 3.

    1 the task can be identified; 1 the query is well posed (the parser admits it); then for the
    response 1 for the right kind of characters, 1 for the right length and 3 for being correct.
    An ill-posed query has no useful response, so it scores at most 1.
    """
    try:
        expected = parse(query).answer
    except Unsolvable as reason:
        return 0 if str(reason) == "unknown form" else 1
    if answer == expected:
        return 7
    right_kind = answer.isdecimal() if expected.isdecimal() else answer.isalpha()
    return 2 + right_kind + (len(answer) == len(expected))
