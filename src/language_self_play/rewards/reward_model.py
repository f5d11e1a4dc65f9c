"""The score of a sequence classifier with one label, which reads a chat or a pair of texts."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)

from language_self_play.chat import special_tokens, without
from language_self_play.config import Config, RewardModelReward
from language_self_play.errors import ConfigError, ModelError
from language_self_play.pretrained import (
    announce_hub,
    choose_device,
    choose_dtype,
    context_length,
    load_whole,
    read,
    resolve_model,
    vocabulary_size,
)
from language_self_play.rewards import Reward, checked
from language_self_play.row_batches import RowBatches

# Llama 3's template writes today's date, and a score must not change overnight: this is the day that
# it falls back on itself.
TEMPLATE_DATE = datetime(2024, 7, 26)
# Architectures that end so have a language model's head: transformers would draw the score's at random.
WITHOUT_SCORE = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration")
# Scores whose standard deviation is below this part of the largest one differ by rounding only.
ROUNDING = 1e-6


class Row(NamedTuple):
    """One pair as tokens; `types` tells query from answer in models that want to be told."""

    tokens: list[int]
    types: list[int] | None
    truncated: bool = False


class Reader:
    """(query, answer) as the reward model wants to read it, in at most `limit` tokens."""

    def __init__(self, tokenizer: Any, chat: bool, limit: int):
        self.tokenizer = tokenizer
        self.chat = chat
        self.limit = limit
        self.marks = special_tokens(tokenizer)
        if chat:
            self.marks += role_marks(self._render)

    def row(self, query: str, answer: str) -> Row:
        """The pair without marks that a player may have forged.

        If it is too long, the query's beginning is cut; once all of the query is gone, the
        answer's. The answer's end always stays.
        """
        query, answer = without(query, self.marks), without(answer, self.marks)
        row = self._encode(query, answer)
        if len(row.tokens) <= self.limit:
            return row

        def after(cut: int) -> Row:
            return self._encode(query[cut:], answer[max(0, cut - len(query)) :])

        cuts = range(len(query) + len(answer) + 1)
        fits = bisect_left(cuts, True, key=lambda cut: len(after(cut).tokens) <= self.limit)
        return after(fits)._replace(truncated=True)

    def _encode(self, query: str, answer: str) -> Row:
        if self.chat:
            # The template writes the special tokens, the first one among them.
            text = self._render([query, answer])
            found = self.tokenizer(text, add_special_tokens=False, verbose=False)
            return Row(found["input_ids"], None)
        found = self.tokenizer(query, answer, verbose=False)
        return Row(found["input_ids"], found.get("token_type_ids"))

    def _render(self, texts: Sequence[str]) -> str:
        messages = [
            {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)
        ]
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, strftime_now=TEMPLATE_DATE.strftime
        )


class RewardModel(Reward):
    """R(q, a) = the classifier's one logit for (q, a), bounded as `bound` says."""

    def __init__(self, name: str, section: RewardModelReward, dtype: str, reader: Reader):
        self.name = name
        self.section = section
        self.dtype = dtype if section.dtype == "auto" else section.dtype
        self.reader = reader
        self.batches: RowBatches = RowBatches(
            section.tokens_per_batch,
            f"reward.{name}",
            f"lower reward.{name}.max_tokens, or use a smaller reward model",
        )
        self.model: PreTrainedModel | None = None
        self.cost: dict[str, float] = {}

    def load(self, device: torch.device) -> None:
        """Load the weights. Raises ModelError, also for a model whose head has no weights."""
        section, setting = self.section, f"reward.{self.name}.path"
        dtype = choose_dtype(self.dtype, device)
        own = device if section.device == "auto" else choose_device(section.device)

        def load() -> tuple[PreTrainedModel, dict[str, Any]]:
            model, info = AutoModelForSequenceClassification.from_pretrained(
                resolve_model(section.path),
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=section.trust_remote_code,
                output_loading_info=True,
            )
            return model.to(own), info

        model = load_whole(section.path, load, setting)
        model.eval().requires_grad_(False)
        model.config.get_text_config().use_cache = False
        score_in_float32(model)
        self.model = model

    def __call__(
        self, queries: list[str], answers: list[list[str]], keys: list[str | None]
    ) -> list[list[float]]:
        """Each distinct pair is scored once. Raises NonFiniteError for a score that is not finite."""
        pairs = [[(q, a) for a in group] for q, group in zip(queries, answers, strict=True)]
        distinct = list(dict.fromkeys(pair for group in pairs for pair in group))
        score_of = dict(zip(distinct, self.score(distinct), strict=True))
        scores = [[score_of[pair] for pair in group] for group in pairs]
        # Before a bound hides an infinity, or spreads it over the step.
        checked(f"reward.{self.name}", scores, queries, answers)
        return bounded(scores, self.section.bound)

    def score(self, pairs: list[tuple[str, str]]) -> list[float]:
        """The unbounded score of each pair: what the model says of it alone, without padding.

        Raises MemoryLimitError if memory does not hold a pass over one pair.
        """
        rows = [self.reader.row(query, answer) for query, answer in pairs]
        self.cost = {
            "pairs": float(len(rows)),
            "tokens": float(sum(len(row.tokens) for row in rows)),
            "truncated": float(sum(row.truncated for row in rows)),
        }
        return self.batches.map(
            lambda places: self._forward([rows[i] for i in places]),
            [len(row.tokens) for row in rows],
        )

    @torch.inference_mode()
    def _forward(self, rows: list[Row]) -> list[float]:
        """Scores of rows that are padded on the right.

        A decoder's score is read at the last token other than config.pad_token_id, so padding with
        that very token leaves the place where it is for the row alone. Without one it is the last
        token; then padding is a token that occurs in no row.
        """
        assert self.model is not None, "load comes first"
        model, config = self.model, self.model.config.get_text_config()
        vocabulary = vocabulary_size(model)
        pad_id = config.pad_token_id
        if pad_id is None or not 0 <= pad_id < vocabulary:
            used = {token for row in rows for token in row.tokens}
            unused = next((i for i in range(vocabulary) if i not in used), None)
            if unused is None and len(rows) > 1:
                return [score for row in rows for score in self._forward([row])]
            pad_id = unused
        longest = max(len(row.tokens) for row in rows)

        def padded(values: list[list[int]], padding: int) -> Tensor:
            filled = [v + [padding] * (longest - len(v)) for v in values]
            return torch.tensor(filled, device=model.device)

        inputs = {
            "input_ids": padded([row.tokens for row in rows], pad_id or 0),
            "attention_mask": padded([[1] * len(row.tokens) for row in rows], 0),
        }
        if rows[0].types is not None:
            inputs["token_type_ids"] = padded([row.types or [] for row in rows], 0)
        stated, config.pad_token_id = config.pad_token_id, pad_id
        try:
            logits = model(**inputs).logits
        finally:
            config.pad_token_id = stated
        return logits.float().view(len(rows)).tolist()

    def costs(self) -> dict[str, float]:
        """Distinct pairs, their tokens, and how many pairs were cut, of the last call."""
        return self.cost

    def close(self) -> None:
        self.model = None


def build(name: str, section: RewardModelReward, config: Config) -> RewardModel:
    """The reward model with its tokenizer, without its weights.

    Raises ModelError for what is no reward model, ConfigError for settings that it can't have.
    """
    if section.device != "auto":
        try:
            choose_device(section.device)
        except ConfigError as error:
            raise ConfigError(f"reward.{name}.{error}") from None
    setting, remote_code = f"reward.{name}.path", section.trust_remote_code
    found = find(setting, section.path)
    model_config = read(
        section.path,
        lambda: AutoConfig.from_pretrained(found, trust_remote_code=remote_code),
        setting,
    )
    check_head(setting, section.path, model_config)
    tokenizer = read(
        section.path,
        lambda: AutoTokenizer.from_pretrained(found, trust_remote_code=remote_code),
        setting,
    )
    chat = reads_chat(name, section, tokenizer)
    limit = min(section.max_tokens, context_length(model_config), tokenizer.model_max_length)
    try:
        reader = Reader(tokenizer, chat, limit)
        reader.row("a query", "an answer")
        template = len(reader._encode("", "").tokens)
    except Exception as error:
        # A template is a program of the model's author; whatever it raises is its message.
        raise ModelError(
            f"{setting} = {section.path!r}: its {'chat template' if chat else 'tokenizer'} fails on a"
            f" query and an answer: {error}"
        ) from None
    if template >= limit:
        raise ConfigError(
            f"reward.{name}.max_tokens = {section.max_tokens}: of at most {limit} tokens, {template}"
            " are taken before there is a query or an answer; allow more, or use a model with a"
            " longer context"
        )
    return RewardModel(name, section, config.dtype, reader)


def find(setting: str, path: str) -> str:
    """The folder or hub id to load from; says so if the hub is asked.

    Raises ModelError for a folder without config or safetensors.
    """
    try:
        found = resolve_model(path)
    except ModelError as error:
        raise ModelError(f"{setting} = {error}") from None
    announce_hub(found)
    folder = Path(found)
    if not folder.is_dir():
        return found
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{setting} = {path!r}: is an adapter; merge it into its model and save that"
        )
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"{setting} = {path!r}: holds no safetensors, and other weights are not read; save the model"
            " again with save_pretrained"
        )
    return found


def check_head(setting: str, path: str, model_config: PreTrainedConfig) -> None:
    """Raises ModelError unless the model's config says that it has one score."""
    for architecture in model_config.architectures or []:
        if architecture.endswith(WITHOUT_SCORE):
            raise ModelError(
                f"{setting} = {path!r}: is a {architecture}, which has no score head; a reward model is"
                " a sequence classifier with one label"
            )
    if model_config.num_labels != 1:
        raise ModelError(
            f"{setting} = {path!r}: its head has {model_config.num_labels} labels; a reward model has"
            " one, the score"
        )


def reads_chat(name: str, section: RewardModelReward, tokenizer: Any) -> bool:
    """Whether pairs go through the chat template. Raises ConfigError if it is asked for and absent."""
    if tokenizer.chat_template:
        return section.format != "pair"
    if section.format == "chat":
        raise ConfigError(
            f'reward.{name}.format = "chat": the tokenizer of {section.path!r} has no chat template; use'
            ' "pair" if the model was trained on pairs of texts'
        )
    if section.format == "auto" and tokenizer.num_special_tokens_to_add(pair=True) == 0:
        raise ConfigError(
            f'reward.{name}.format = "auto": the tokenizer of {section.path!r} has no chat template and'
            ' puts nothing between two texts; "pair" runs them together'
        )
    return False


def role_marks(render: Callable[[Sequence[str]], str]) -> list[str]:
    """What a chat template writes between messages in plain characters, such as `### Response:`.

    Lines of letters alone, such as `assistant`, and of none, such as `---`, are too common to count.
    """
    texts = ["qzxa", "qzxb", "qzxc", "qzxd"]
    try:
        rest = render(texts)
    except Exception:
        return []  # A template for one exchange; nothing in it would begin another.
    marks = []
    for text in texts:
        before, found, rest = rest.partition(text)
        if not found:
            return []
        marks.append(before)
    lines = {line.strip() for between in marks[1:] for line in between.splitlines()}
    return sorted(
        line
        for line in lines
        if any(map(str.isalpha, line)) and not line.replace(" ", "").isalpha()
    )


def score_in_float32(model: PreTrainedModel) -> None:
    """Compute the last layer in float32.

    In bfloat16 scores from 16 to 32 come in steps of 1/8, and answers would tie.
    """
    heads = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 1]
    for head in heads[-1:]:
        head.float()
        head.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(), *inputs[1:]))


def bounded(scores: list[list[float]], bound: str) -> list[list[float]]:
    """Scores of a step, (N, G), as `bound` says.

    none          s
    sigmoid       1 / (1 + exp(-s)), from 0 to 1 (J-ZERO bounds R so)
    standardize   (s - mean) / std, both over all N · G scores; 0 if they are all equal
    """
    scores_NG = torch.tensor(scores, dtype=torch.float64)
    match bound:
        case "sigmoid":
            scores_NG = scores_NG.sigmoid()
        case "standardize":
            std = scores_NG.std(correction=0)
            equal = std <= ROUNDING * scores_NG.abs().max()
            scores_NG = (scores_NG - scores_NG.mean()) / torch.where(equal, torch.inf, std)
    return scores_NG.tolist()
