"""Benchmarks of image-text models: POPE, MME, GQA, ScienceQA (images) and MMMU.

Questions and rules are those of lmms-eval's tasks of the same names, on its data sets (`lmms-lab`). MMMU's answers are
written to the log but not scored here, because its rules draw at random where an answer cannot be read. The log has
lmms-eval's own format: `lmms_eval --model from_log --model_args logs=OUT/lmms_eval --tasks pope,mmmu_val` scores it
again.
"""

import ast
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path

from lora_one.errors import ConfigError
from lora_one.files.atomic import write_whole
from lora_one.finetune.data import Example
from lora_one.finetune.datasets import load_pictures, load_rows
from lora_one.finetune.encoding import TokenSequence, encode
from lora_one.finetune.template import Tokenizer

from .visual_rules import Graded, Row, gqa, letter, mme, options, pope, scienceqa

PROMPT = "USER: {} ASSISTANT:"  # LLaVA 1.5's, as in the recipe's training data
IMAGE = "<image>"
ASK_WORD = "\nAnswer the question using a single word or phrase."
ASK_LETTER = "\nAnswer with the option's letter from the given choices directly."


@dataclass(frozen=True)
class BenchmarkSpec:
    """The description of a benchmark, without its data.

    Attributes:
        path: the name of the data set on the hub.
        config: the configuration of the data set; None is the default one.
        split: the split that is asked.
        question: row -> question. It has an "<image n>" for each picture that the row has in "image_n", or no such mark
            if the row has a single picture in "image".
        target: row -> expected answer, for the log.
        score: rows with the answers given to them -> metric -> value.
        picture_config: the configuration that holds the pictures by their "id", which rows name in "imageId"; None if
            the rows hold their pictures themselves.
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

    max_new_tokens = 16  # lmms-eval's; scored answers are shorter

    def __init__(self, name: str, spec: BenchmarkSpec, limit: int | None):
        self.name, self._spec, self._limit = name, spec, limit
        rows = load_rows(spec.path, spec.config, spec.split)
        rows = rows if limit is None else rows.select(range(min(limit, len(rows))))
        texts = [column for column in rows.column_names if not re.fullmatch(r"image(_\d)?", column)]
        self._rows: list[Row] = list(rows.select_columns(texts))
        self._pictures = rows
        self._picture_rows = list(range(len(rows)))  # question -> its row in `_pictures`
        if spec.picture_config is not None:
            self._pictures = load_rows(spec.path, spec.picture_config, spec.split)
            row_of = {name: index for index, name in enumerate(self._pictures["id"])}
            self._picture_rows = [row_of[row["imageId"]] for row in self._rows]

    def encode(self, tokenizer: Tokenizer) -> list[TokenSequence]:
        """Return the questions in tokens, with their pictures."""
        questions = []
        for index, (row, picture_row) in enumerate(zip(self._rows, self._picture_rows, strict=True)):
            text = self._spec.question(row)
            columns = [f"image_{number}" for number in re.findall(r"<image (\d)>", text)]
            text = re.sub(r"<image \d>", IMAGE, text) if columns else f"{IMAGE}\n{text}"
            pictures = partial(load_pictures, self._pictures, picture_row, columns or ["image"])
            example = Example(PROMPT.format(text), "?", f"{self.name}, row {index}", pictures, as_written=True)
            questions.append(encode(tokenizer, example))
        return questions

    def score(self, answers: Sequence[str]) -> dict[str, float]:
        """Return the benchmark's own metrics; none if it is only written to the log."""
        return self._spec.score(list(zip(self._rows, (answer.strip() for answer in answers), strict=True)))

    def write_log(self, folder: Path, answers: Sequence[str], model: str | None) -> None:
        """Write `FOLDER/lmms_eval/NAME.json`, which lmms-eval's model `from_log` reads."""
        log = {
            "args": {"model": "lora-one", "model_args": f"pretrained={model}", "limit": self._limit},
            "model_configs": {"task": self.name},
            "time": datetime.now().strftime("%m%d_%H%M"),
            "logs": [
                {"doc_id": index, "target": self._spec.target(row), "resps": [[answer]], "filtered_resps": [answer]}
                for index, (row, answer) in enumerate(zip(self._rows, answers, strict=True))
            ],
        }
        write_whole(folder / "lmms_eval" / f"{self.name}.json", json.dumps(log, indent=1) + "\n")


def open_benchmark(name: str, limit: int | None) -> Benchmark:
    """Load a benchmark with at most `limit` of its rows; None loads all.

    Raises:
        ConfigError: there is no benchmark of this name.
        BackendError, DataError: see `lora_one.finetune.datasets.load_rows`.
    """
    if name not in BENCHMARKS:
        raise ConfigError(f"visual must be of {', '.join(BENCHMARKS)}, got {name!r}")
    return Benchmark(name, BENCHMARKS[name], limit)


def _word_question(row: Row) -> str:
    question: str = row["question"]
    return question.replace(" Please answer yes or no.", "").strip() + ASK_WORD


def _scienceqa_question(row: Row) -> str:
    context = f"Context: {row['hint']}\n" if row["hint"] else ""
    return f"{context}{row['question']}\n{options(row['choices'])}{ASK_LETTER}"


def _mmmu_question(row: Row) -> str:
    if row["question_type"] != "multiple-choice":
        return f"{row['question']}\n{ASK_WORD}"
    return f"{row['question']}\n{options(ast.literal_eval(row['options']))}\n{ASK_LETTER}"


def _answer(row: Row) -> str:
    return str(row["answer"])


def _not_scored(graded: Graded) -> dict[str, float]:
    return {}


BENCHMARKS = {
    "pope": BenchmarkSpec("lmms-lab/POPE", None, "test", _word_question, _answer, pope),
    "mme": BenchmarkSpec("lmms-lab/MME", None, "test", _word_question, _answer, mme),
    "gqa": BenchmarkSpec(
        "lmms-lab/GQA",
        "testdev_balanced_instructions",
        "testdev",
        _word_question,
        _answer,
        gqa,
        picture_config="testdev_balanced_images",
    ),
    "scienceqa_img": BenchmarkSpec(
        "lmms-lab/ScienceQA", "ScienceQA-IMG", "test", _scienceqa_question, letter, scienceqa
    ),
    "mmmu_val": BenchmarkSpec("lmms-lab/MMMU", None, "validation", _mmmu_question, _answer, _not_scored),
}
