"""What a job needs before it starts: the examples, the model, and the sequences to train on and to hold out."""

import itertools
import random
from collections.abc import Iterable
from dataclasses import dataclass
from operator import length_hint
from pathlib import Path

from lora_one import demo
from lora_one.errors import ConfigError, DataError

from .data import Example, read_examples
from .datasets import Rows
from .encoding import TokenSequence, encode
from .fit import check_sequences
from .packing import check_apart, pack
from .progress import Progress
from .recipe import Recipe
from .source import Source
from .tuners.interface import Tuner
from .tuners.loading import load_tuner


@dataclass(frozen=True)
class Prepared:
    """A model with its data.

    Attributes:
        tuner: the model.
        sequences: what to train on; packed rows if the recipe says so.
        held_out: what the loss is measured on; there may be none.
        tests: the test items.
    """

    tuner: Tuner
    sequences: list[TokenSequence]
    held_out: list[TokenSequence]
    tests: list[Example]


def prepare(recipe: Recipe, progress: Progress) -> Prepared:
    """Load the model and the data of a recipe.

    Raises:
        DataError, ModelError, BackendError, ConfigError: see `read_examples`, `Rows` and the backend's `open_tuner`.
    """
    # The data comes first, so that an error in it does not wait for a large model to load.
    examples = open_examples(recipe.data or demo.TRAIN)
    valid = _held_out_data(recipe)
    held_out = open_examples(valid) if valid else []
    test = recipe.test or (demo.TEST if recipe.model is None else None)
    tests = list(open_examples(test)) if test else []
    progress.say("Loading the model")
    tuner = load_tuner(recipe.backend).open_tuner(Path(recipe.model or demo.MODEL), recipe.dtype, recipe.device)
    tuner.check(recipe)
    sequences = _encode_all(tuner, examples, recipe.data, recipe, progress)
    validation = _encode_all(tuner, held_out, valid, recipe, progress, "held-out example") if valid else []
    if recipe.valid_share:
        sequences, validation = _split(sequences, recipe)
    if recipe.eval_every is not None and not validation:
        raise ConfigError(
            "eval_every needs held-out data: give valid, valid_share, or a folder with train.jsonl and valid.jsonl"
        )
    if recipe.packing and recipe.max_length is not None:
        sequences = pack(sequences, recipe.max_length)
        check_apart(lambda rows: tuner.mean_loss(tuner.batches(rows, len(rows))), sequences, recipe.dtype)
    return Prepared(tuner, sequences, validation, tests)


def open_examples(data: str | Path | Source) -> Iterable[Example]:
    """Return the examples of a JSON Lines file or of a source; those of a source are made one by one."""
    return Rows(data) if isinstance(data, Source) else read_examples(data)


def _held_out_data(recipe: Recipe) -> str | Path | Source | None:
    """Return the data that the recipe names, or the valid.jsonl beside the training data."""
    if recipe.valid is not None or recipe.valid_share or not isinstance(recipe.data, str):
        return recipe.valid
    file = Path(recipe.data) / "valid.jsonl"
    return file if file.is_file() else None


def _encode_all(
    tuner: Tuner,
    examples: Iterable[Example],
    data: str | Path | Source | None,
    recipe: Recipe,
    progress: Progress,
    what: str = "example",
) -> list[TokenSequence]:
    progress.say(f"Encoding the {what}s")
    encoded = (encode(tuner.tokenizer, example, recipe.loss_on, recipe.chat_template) for example in examples)
    if isinstance(data, Source):
        whole = list(itertools.islice(_short_enough(encoded, data.max_tokens), data.max_examples))
    else:
        whole = []
        for sequence in encoded:
            whole.append(sequence)
            progress.part(len(whole), length_hint(examples))
    sequences = _cut(whole, recipe.max_length, tuner.separate, what, progress)
    if not sequences:
        raise DataError(f"the data must hold at least one {what}, got none: look at its filters and lengths")
    for sequence in sequences:
        if sequence.pictures is not None and not tuner.reads_pictures:
            raise DataError(f"{sequence.where}: pictures need a model of images and text, with the backend torch")
    remark = check_sequences(sequences, tuner.tokenizer, tuner.limits, tuner.separate)
    if remark is not None:
        progress.warn(remark)
    return sequences


def _cut(
    whole: list[TokenSequence], length: int | None, separate: bool, what: str, progress: Progress
) -> list[TokenSequence]:
    """Return the sequences cut to `length` tokens, and say how many that has touched, and left nothing of to learn."""
    if length is None:
        return whole
    short = [sequence.cut(length, separate) for sequence in whole]
    kept = [sequence for sequence in short if sequence is not None]
    lost = len(whole) - len(kept)
    cut = sum(after is not before for before, after in zip(whole, short, strict=True)) - lost
    if cut:
        progress.warn(f"{cut} of {len(whole)} {what}s are longer than max_length {length}: they are cut")
    if lost:
        progress.warn(f"{lost} of {len(whole)} {what}s have a prompt that fills max_length: they are left out")
    return kept


def _split(sequences: list[TokenSequence], recipe: Recipe) -> tuple[list[TokenSequence], list[TokenSequence]]:
    """Return the sequences to train on and the share to hold out, at least one of each."""
    count = round((recipe.valid_share or 0.0) * len(sequences))
    if len(sequences) < 2:
        raise DataError("valid_share needs at least two examples, got one: give valid instead")
    count = min(max(1, count), len(sequences) - 1)
    chosen = set(random.Random(recipe.seed).sample(range(len(sequences)), count))
    return (
        [sequence for index, sequence in enumerate(sequences) if index not in chosen],
        [sequence for index, sequence in enumerate(sequences) if index in chosen],
    )


def _short_enough(sequences: Iterable[TokenSequence], max_tokens: int | None) -> Iterable[TokenSequence]:
    return (sequence for sequence in sequences if max_tokens is None or len(sequence.tokens) < max_tokens)
