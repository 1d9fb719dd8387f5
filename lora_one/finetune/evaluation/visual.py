"""Benchmarks of image-text models: POPE, MME, GQA, ScienceQA (images) and MMMU.

Questions and rules are those of lmms-eval's tasks of the same names, on its data sets (`lmms-lab`). MMMU's answers are
written down, not scored: its rules draw at random where an answer cannot be read. The log is lmms-eval's own:
`lmms_eval --model from_log --model_args logs=OUT/lmms_eval --tasks pope,mmmu_val` scores it again.
"""

import ast
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from lora_one.errors import ConfigError
from lora_one.files.atomic import write_whole
from lora_one.finetune.data import Example, TokenSequence, encode
from lora_one.finetune.datasets import load_pictures, load_rows

from .visual_rules import Graded, gqa, letter, mme, options, pope, scienceqa

Row = dict[str, Any]

TURN = "USER: {} ASSISTANT:"  # LLaVA 1.5's, as in the recipe's training data
IMAGE = "<image>"
WORD = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


@dataclass(frozen=True)
class Kind:
    """What a benchmark is, without its data.

    Attributes:
        question: with an "<image n>" for each picture that the row has in "image_n", or none for its one "image".
        picture_config: the configuration that has the pictures, by "id"; rows name theirs in "imageId".
    """

    path: str
    config: str | None
    split: str
    question: Callable[[Row], str]
    target: Callable[[Row], str]
    score: Callable[[Graded], dict[str, float]]
    picture_config: str | None = None


class Benchmark:
    """A benchmark with its data."""

    max_new_tokens = 16  # lmms-eval's; what is scored is shorter

    def __init__(self, name: str, kind: Kind, limit: int | None):
        self.name, self._kind, self._limit = name, kind, limit
        rows = load_rows(kind.path, kind.config, kind.split)
        rows = rows if limit is None else rows.select(range(min(limit, len(rows))))
        texts = [column for column in rows.column_names if not re.fullmatch(r"image(_\d)?", column)]
        self._rows: list[Row] = list(rows.select_columns(texts))
        self._pictures = rows
        self._places = list(range(len(rows)))
        if kind.picture_config is not None:
            self._pictures = load_rows(kind.path, kind.picture_config, kind.split)
            place = {name: index for index, name in enumerate(self._pictures["id"])}
            self._places = [place[row["imageId"]] for row in self._rows]

    def encode(self, tokenizer: Any) -> list[TokenSequence]:
        """The questions in tokens, with the pictures that they ask about."""
        found = []
        for index, (row, place) in enumerate(zip(self._rows, self._places, strict=True)):
            text = self._kind.question(row)
            columns = [f"image_{number}" for number in re.findall(r"<image (\d)>", text)]
            text = re.sub(r"<image \d>", IMAGE, text) if columns else f"{IMAGE}\n{text}"
            pictures = partial(_load, self._pictures, place, columns or ["image"])
            example = Example(TURN.format(text), "?", f"{self.name}, row {index}", pictures)
            found.append(encode(tokenizer, example))
        return found

    def score(self, answers: Sequence[str]) -> dict[str, float]:
        """The benchmark's own metrics; none for one that is only written down."""
        return self._kind.score(list(zip(self._rows, (answer.strip() for answer in answers), strict=True)))

    def write_log(self, folder: Path, answers: Sequence[str], model: str | None) -> None:
        """`FOLDER/lmms_eval/NAME.json`, in the form that lmms-eval's model `from_log` reads."""
        log = {
            "args": {"model": "lora-one", "model_args": f"pretrained={model}", "limit": self._limit},
            "model_configs": {"task": self.name},
            "time": datetime.now().strftime("%m%d_%H%M"),
            "logs": [
                {"doc_id": index, "target": self._kind.target(row), "resps": [[answer]], "filtered_resps": [answer]}
                for index, (row, answer) in enumerate(zip(self._rows, answers, strict=True))
            ],
        }
        write_whole(folder / "lmms_eval" / f"{self.name}.json", json.dumps(log, indent=1) + "\n")


def open_benchmark(name: str, limit: int | None) -> Benchmark:
    """A benchmark and its data, at most `limit` rows.

    Raises:
        ConfigError: no such benchmark.
        BackendError, DataError: see `lora_one.finetune.datasets.load_rows`.
    """
    if name not in BENCHMARKS:
        raise ConfigError(f"visual must be of {', '.join(BENCHMARKS)}, got {name!r}")
    return Benchmark(name, BENCHMARKS[name], limit)


def _load(rows: Any, index: int, columns: Sequence[str]) -> list[Any]:
    return [picture for column in columns for picture in load_pictures(rows, index, column)]


def _word_question(row: Row) -> str:
    question: str = row["question"]
    return question.replace(" Please answer yes or no.", "").strip() + WORD


def _scienceqa_question(row: Row) -> str:
    context = f"Context: {row['hint']}\n" if row["hint"] else ""
    return f"{context}{row['question']}\n{options(row['choices'])}{LETTER}"


def _mmmu_question(row: Row) -> str:
    if row["question_type"] != "multiple-choice":
        return f"{row['question']}\n{WORD}"
    return f"{row['question']}\n{options(ast.literal_eval(row['options']))}\n{LETTER}"


def _answer(row: Row) -> str:
    return str(row["answer"])


def _not_scored(graded: Graded) -> dict[str, float]:
    return {}


BENCHMARKS = {
    "pope": Kind("lmms-lab/POPE", None, "test", _word_question, _answer, pope),
    "mme": Kind("lmms-lab/MME", None, "test", _word_question, _answer, mme),
    "gqa": Kind(
        "lmms-lab/GQA",
        "testdev_balanced_instructions",
        "testdev",
        _word_question,
        _answer,
        gqa,
        picture_config="testdev_balanced_images",
    ),
    "scienceqa_img": Kind("lmms-lab/ScienceQA", "ScienceQA-IMG", "test", _scienceqa_question, letter, scienceqa),
    "mmmu_val": Kind("lmms-lab/MMMU", None, "validation", _mmmu_question, _answer, _not_scored),
}
