"""Files of AlpacaEval: instructions, a model's answers, annotations, difficulties. Read and written.

A file is a JSON array of objects or one object a line, plain or gzip (`.gz`). Every mistake in one is
named by its row. What is written is read by alpaca_eval, and the other way round.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from language_self_play.durable import replace_text
from language_self_play.errors import InputFileError
from language_self_play.evaluate.win_rate import BASELINE_WINS, MODEL_WINS, TIE
from language_self_play.hub import look_for_hub
from language_self_play.recipe_files import read_text
from language_self_play.wording import counted

# The answers of gpt4_1106_preview, AlpacaEval 2.0's baseline, to its 805 instructions.
HUB_DATASET, HUB_FILE = "tatsu-lab/alpaca_eval", "alpaca_eval_gpt4_baseline.json"
# The instructions' data sets.
SUBSETS = ("helpful_base", "koala", "oasst", "selfinstruct", "vicuna")
# What a model that answers a second time is called.
OWN_COPY = " (own copy)"
INSTRUCTION_COLUMNS = ("instruction", "prompt", "query", "question")
# What each kind of file must be, for who named another.
A_FILE_OF = "name a JSON or JSONL file whose rows have"
PROMPTS = f"{A_FILE_OF} a column {', '.join(INSTRUCTION_COLUMNS[:-1])} or {INSTRUCTION_COLUMNS[-1]}"
ANSWERS = f"{A_FILE_OF} the columns instruction and output"
ANNOTATIONS = f"{A_FILE_OF} the columns instruction, output_1, output_2, generator_1, generator_2 and preference"
DIFFICULTIES = "name a CSV or JSON file of difficulties"


class Output(NamedTuple):
    """One answer, and the subset that its instruction belongs to, where there are subsets."""

    instruction: str
    output: str
    generator: str
    dataset: str | None = None


class Annotation(NamedTuple):
    """One judged pair: the baseline's answer, the model's, and the preference for the model's, 1 to 2.

    The preferences in either order are there where a judge was asked both ways.
    """

    instruction: str
    output_1: str
    generator_1: str
    output_2: str
    generator_2: str
    preference: float
    annotator: str
    dataset: str | None = None
    baseline_first: float | None = None
    model_first: float | None = None

    @property
    def orders(self) -> tuple[float, float] | None:
        """The preferences when the baseline's answer is shown first, and when the model's is."""
        if self.baseline_first is None or self.model_first is None:
            return None
        return self.baseline_first, self.model_first

    @property
    def strict_win(self) -> float:
        """The share of its judgements that name the model: of both orders, or of the one preference."""
        judgements = self.orders or (self.preference,)
        return sum(judgement > TIE for judgement in judgements) / len(judgements)


# ---------------------------------------------------------------- reading


def read_instructions(path: Path, setting: str) -> list[Output]:
    """The file's instructions, with the answers that it may hold. Raises InputFileError.

    Its column is the first of `instruction`, `prompt`, `query` and `question` that a row has.
    """
    outputs = []
    for place, row in _rows(path, setting, PROMPTS):
        column = next((c for c in INSTRUCTION_COLUMNS if c in row), None)
        if column is None:
            raise InputFileError(f"{place}: has no prompt{_columns(row)}; {PROMPTS}")
        instruction = _text(row, column, place)
        if not instruction.strip():
            raise InputFileError(f"{place}: {column!r} is empty")
        outputs.append(Output(instruction, str(row.get("output") or ""), "", _dataset(row, place)))
    _refuse_repeats(path, [o.instruction for o in outputs])
    return outputs


def read_outputs(path: Path, setting: str) -> list[Output]:
    """A model's answers, as alpaca_eval's model_outputs. Raises InputFileError.

    Needs the columns `instruction` and `output`; `generator` is the model's name, the file's if absent.
    """
    outputs = []
    for place, row in _rows(path, setting, ANSWERS):
        generator = _text(row, "generator", place) if row.get("generator") else _stem(path)
        instruction, output = _text(row, "instruction", place), _text(row, "output", place)
        outputs.append(Output(instruction, output, generator, _dataset(row, place)))
    _refuse_repeats(path, [o.instruction for o in outputs])
    names = sorted({o.generator for o in outputs})
    if len(names) > 1:
        raise InputFileError(
            f"{path}: holds answers of {len(names)} generators, {names[0]!r} and {names[1]!r} among"
            " them; keep one model's"
        )
    return outputs


def in_order(path: Path, outputs: Sequence[Output], instructions: Sequence[Output]) -> list[Output]:
    """The file's answers in the order of the instructions. Raises InputFileError unless they match."""
    by_text = {output.instruction: output for output in outputs}
    missing = [i.instruction for i in instructions if i.instruction not in by_text]
    wanted = {i.instruction for i in instructions}
    extra = [text for text in by_text if text not in wanted]
    for what, texts in (("no answer to", missing), ("answers beside", extra)):
        if texts:
            raise InputFileError(
                f"{path}: has {what} the {len(instructions)} instructions of this evaluation:"
                f" {len(texts)} of them, such as {texts[0][:60]!r}; give both sides the same"
                " instructions (and a file with just these, if fewer are meant)"
            )
    return [by_text[i.instruction]._replace(dataset=i.dataset) for i in instructions]


def read_annotations(path: Path, setting: str) -> tuple[list[Annotation], list[str]]:
    """(judged pairs, the instructions of rows without a preference, because a judge gave none).

    Raises InputFileError for a missing column, a preference outside 1 … 2, or an instruction twice.
    """
    annotations, unjudged = [], []
    for place, row in _rows(path, setting, ANNOTATIONS):
        texts = [_text(row, c, place) for c in ("instruction", "output_1", "output_2")]
        names = [_text(row, c, place) for c in ("generator_1", "generator_2")]
        if "preference" not in row:
            raise InputFileError(f"{place}: has no column 'preference'{_columns(row)}")
        preference = row["preference"]
        if preference is None or (isinstance(preference, float) and math.isnan(preference)):
            unjudged.append(texts[0])
            continue
        annotations.append(
            Annotation(
                texts[0],
                texts[1],
                names[0],
                texts[2],
                names[1],
                _preference(row, "preference", place),
                str(row.get("annotator") or ""),
                _dataset(row, place),
                *(
                    None if row.get(order) is None else _preference(row, order, place)
                    for order in ("baseline_first", "model_first")
                ),
            )
        )
    if not annotations:
        rows = counted(len(unjudged), "row")
        raise InputFileError(f"{path}: holds {rows}, and none with a preference")
    _refuse_repeats(path, [a.instruction for a in annotations])
    for side in ("generator_1", "generator_2"):
        generators = sorted({getattr(a, side) for a in annotations})
        if len(generators) > 1:
            raise InputFileError(
                f"{path}: {side} is {generators[0]!r} in one row and {generators[1]!r} in another;"
                " keep the annotations of one pair of models"
            )
    return annotations, unjudged


def read_difficulties(path: Path, instructions: Sequence[str], setting: str) -> list[float]:
    """The difficulty of each of `instructions`, from a CSV or JSON table. Raises InputFileError.

    A CSV has a first line of names; the key is its column `instruction` or `index`, else the first,
    the value `instruction_difficulty` or `difficulty`, else the second. A JSON file is one object. A key
    is the instruction's text, or its number from 0 in the order of `instructions`.
    """
    table = _difficulty_table(path, setting)
    by_text = all(i in table for i in instructions)
    if by_text:
        return [table[i] for i in instructions]
    if set(table) == {str(i) for i in range(len(instructions))}:
        return [table[str(i)] for i in range(len(instructions))]
    missing = [i for i in instructions if i not in table]
    raise InputFileError(
        f"{setting} {path}: has no difficulty for {len(missing)} of the {len(instructions)}"
        f" instructions, such as {missing[0][:60]!r}; keys are the instructions' texts, or their numbers"
        f" from 0 to {len(instructions) - 1} (--instructions names the file that they count in)"
    )


def _difficulty_table(path: Path, setting: str) -> dict[str, float]:
    text = _contents(path, setting, DIFFICULTIES)
    pairs: list[tuple[str, Any, str]] = []  # key, value, where
    if text.lstrip().startswith("{"):
        table = _parsed(text, f"{path}")
        pairs = [(key, value, f"{path}, {key[:60]!r}") for key, value in table.items()]
    else:
        rows = csv.DictReader(io.StringIO(text), strict=True)
        names = [name for name in rows.fieldnames or [] if name is not None]
        if len(names) < 2:
            raise InputFileError(
                f"{setting} {path}: neither a JSON object nor a CSV file with two columns"
            )
        key = next((n for n in ("instruction", "index") if n in names), names[0])
        values = ("instruction_difficulty", "difficulty")
        value = next((n for n in values if n in names), names[1])
        try:
            pairs = [(str(r[key]), r[value], f"{path}:{rows.line_num}") for r in rows]
        except csv.Error as error:
            raise InputFileError(f"{path}:{rows.line_num}: not CSV: {error}") from None
    found: dict[str, float] = {}
    for key, value, place in pairs:
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number) or isinstance(value, bool):
            raise InputFileError(f"{place}: {value!r} is no difficulty; it must be a finite number")
        if found.setdefault(key, number) != number:
            raise InputFileError(
                f"{place}: {key[:60]!r} has two difficulties, {found[key]} and {number}"
            )
    return found


def hub_baseline() -> Path:
    """AlpacaEval's instructions with its baseline's answers, from the hub or its cache here.

    Raises InputFileError where neither can be had.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    look_for_hub()
    try:
        return Path(hf_hub_download(HUB_DATASET, HUB_FILE, repo_type="dataset"))
    except Exception as error:
        # The client raises errors of many kinds: no network, no access, no such file.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputFileError(
            f"{HUB_FILE} of {HUB_DATASET} can't be had from the hub ({reason}); name files by"
            " --instructions and --baseline"
        ) from None


def _rows(path: Path, setting: str, wanted: str) -> Iterable[tuple[str, Mapping[str, Any]]]:
    """(where it stands, the row) of every row. Raises InputFileError, also for none."""
    text = _contents(path, setting, wanted)
    if not text.strip():
        raise InputFileError(f"{setting} {path}: the file is empty")
    if text.lstrip().startswith("["):
        rows = [(f"{path}, row {i}", row) for i, row in enumerate(_parsed(text, f"{path}"), 1)]
    else:
        lines = [
            (f"{path}:{i}", line) for i, line in enumerate(text.split("\n"), 1) if line.strip()
        ]
        rows = [(place, _parsed(line, place)) for place, line in lines]
    if not rows:
        raise InputFileError(f"{setting} {path}: holds no rows")
    for place, row in rows:
        if not isinstance(row, Mapping):
            raise InputFileError(f"{place}: not a JSON object")
    return rows


def _contents(path: Path, setting: str, wanted: str) -> str:
    if os.path.isdir(path):
        raise InputFileError(f"{setting} {path}: is a folder; {wanted}")
    if path.suffix != ".gz":
        try:
            return read_text(path).removeprefix("\ufeff")
        except InputFileError as error:
            raise InputFileError(f"{setting} {error}") from None
    try:
        with gzip.open(path, "rt", encoding="utf-8-sig", newline="\n") as stream:
            return stream.read()
    except FileNotFoundError:
        raise InputFileError(f"{setting} {path}: no such file") from None
    except (OSError, EOFError, ValueError) as error:
        raise InputFileError(f"{setting} {path}: can't be unpacked ({error})") from None


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputFileError(f"{place}: not valid JSON: {getattr(error, 'msg', error)}") from None


def _text(row: Mapping[str, Any], column: str, place: str) -> str:
    if column not in row:
        raise InputFileError(f"{place}: has no column {column!r}{_columns(row)}")
    if not isinstance(row[column], str):
        raise InputFileError(
            f"{place}: column {column!r} holds {row[column]!r}, which is not a text"
        )
    return row[column]


def _dataset(row: Mapping[str, Any], place: str) -> str | None:
    return None if row.get("dataset") is None else _text(row, "dataset", place)


def _columns(row: Mapping[str, Any]) -> str:
    return f", its columns are {', '.join(map(str, row)) or 'none'}"


def _preference(row: Mapping[str, Any], column: str, place: str) -> float:
    value = _number(row[column])
    if value == 0:
        return TIE  # as older files write it
    if value is None or not BASELINE_WINS <= value <= MODEL_WINS:
        raise InputFileError(
            f"{place}: {column} = {row[column]!r}; must be a number from 1 (the baseline's answer is"
            " better) to 2 (the model's)"
        )
    return value


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def _refuse_repeats(path: Path, instructions: Sequence[str]) -> None:
    seen: dict[str, int] = {}
    for number, instruction in enumerate(instructions, 1):
        if instruction in seen:
            raise InputFileError(
                f"{path}, row {number}: repeats the instruction of row {seen[instruction]},"
                f" {instruction[:60]!r}; keep one"
            )
        seen[instruction] = number


def _stem(path: Path) -> str:
    return path.name.split(".")[0] or path.name


# ---------------------------------------------------------------- writing


def write_outputs(file: Path, outputs: Sequence[Output]) -> None:
    """Write answers as alpaca_eval's `--model_outputs` reads them. Raises OSError."""
    replace_text(file, _array([_present(o) for o in outputs]))


def write_annotations(file: Path, annotations: Sequence[Annotation]) -> None:
    """Write judged pairs as alpaca_eval writes its annotations. Raises OSError."""
    replace_text(file, _array([_present(a) for a in annotations]))


def write_leaderboard(file: Path, name: str, row: Mapping[str, Any]) -> None:
    """Write one model's figures with the columns of alpaca_eval's leaderboards. Raises OSError."""
    stream = io.StringIO()
    table = csv.writer(stream, lineterminator="\n")
    table.writerow(["", *row])
    table.writerow([name, *("" if value is None else value for value in row.values())])
    replace_text(file, stream.getvalue())


def _present(row: Output | Annotation) -> dict[str, Any]:
    return {name: value for name, value in row._asdict().items() if value is not None}


def _array(rows: list[dict[str, Any]]) -> str:
    return json.dumps(rows, indent=1) + "\n"
