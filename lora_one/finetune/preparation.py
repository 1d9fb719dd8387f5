"""What a job needs before it starts: the examples, the model, and the training sequences."""

import itertools
from collections.abc import Iterable
from pathlib import Path

from lora_one import demo
from lora_one.errors import DataError

from .data import Example, read_examples
from .datasets import Rows
from .encoding import TokenSequence, cut_all, encode
from .fit import check_sequences
from .progress import Progress
from .recipe import Recipe
from .source import Source
from .tuners.interface import Tuner
from .tuners.loading import load_tuner


def prepare(recipe: Recipe, progress: Progress) -> tuple[Tuner, list[TokenSequence], list[Example]]:
    """Load the model and the data of a recipe.

    Returns:
        The tuner with its model, the training sequences, and the test items.

    Raises:
        DataError, ModelError, BackendError, ConfigError: see `read_examples`, `Rows` and the backend's `open_tuner`.
    """
    # The data comes first, so that an error in it does not wait for a large model to load.
    examples = open_examples(recipe.data or demo.TRAIN)
    test = recipe.test or (demo.TEST if recipe.model is None else None)
    tests = list(open_examples(test)) if test else []
    progress.say("Loading the model")
    tuner = load_tuner(recipe.backend).open_tuner(Path(recipe.model or demo.MODEL), recipe.dtype, recipe.device)
    return tuner, _encode_all(tuner, examples, recipe, progress), tests


def open_examples(data: str | Path | Source) -> Iterable[Example]:
    """Return the examples of a JSON Lines file or of a source; those of a source are made one by one."""
    return Rows(data) if isinstance(data, Source) else read_examples(data)


def _encode_all(tuner: Tuner, examples: Iterable[Example], recipe: Recipe, progress: Progress) -> list[TokenSequence]:
    encoded = (encode(tuner.tokenizer, example) for example in examples)
    if isinstance(recipe.data, Source):
        whole = list(itertools.islice(_short_enough(encoded, recipe.data.max_tokens), recipe.data.max_examples))
    else:
        whole = list(encoded)
    sequences = cut_all(whole, recipe.max_length, tuner.separate)
    if not sequences:
        raise DataError("the training data must hold at least one example, got none: look at its filters and lengths")
    if len(sequences) < len(whole):
        lost = len(whole) - len(sequences)
        progress.warn(f"{lost} of {len(whole)} examples have a prompt that fills max_length: they are left out")
    remark = check_sequences(sequences, tuner.tokenizer, tuner.limits, tuner.separate)
    if remark is not None:
        progress.warn(remark)
    return sequences


def _short_enough(sequences: Iterable[TokenSequence], max_tokens: int | None) -> Iterable[TokenSequence]:
    return (sequence for sequence in sequences if max_tokens is None or len(sequence.tokens) < max_tokens)
