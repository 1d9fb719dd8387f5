"""LoRA on the model of a run: started by LoRA-One or in the usual way, or attached again for a resumed run."""

import random
import warnings

from lora_one import api
from lora_one.backends import load_backend
from lora_one.errors import InitWarning
from lora_one.initialization import initialize_without_data
from lora_one.progress import Counted
from lora_one.report import Report

from .encoding import TokenSequence
from .progress import Progress
from .recipe import Recipe
from .tuners.interface import Tuner


def start(tuner: Tuner, sequences: list[TokenSequence], recipe: Recipe, progress: Progress) -> Report | None:
    """Attach LoRA to the tuner's model and start it as the recipe says.

    Returns:
        The report of the initialisation; None for a plain start.
    """
    if recipe.plain:
        progress.say("Plain LoRA start")
        tuner.model = load_backend(recipe.backend).attach_plain(tuner.model, recipe.config)
        return None
    reading = "LoRA-One: reading the gradient"
    progress.say(reading)
    count = min(len(sequences), recipe.init_batches * recipe.batch_size)
    sample = random.Random(recipe.seed).sample(sequences, count)
    batches = tuner.batches(sample, recipe.batch_size)

    def tell(number: int, done: int) -> None:
        if number > 1 and not done:
            progress.say(f"{reading}, pass {number}")
        progress.part(done, len(batches))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", InitWarning)
        tuner.model, report = api.init(
            tuner.model, Counted(batches, tell), tuner.loss_fn, recipe.config, recipe.backend, progress=False
        )
    for warning in caught:
        if issubclass(warning.category, InitWarning):
            progress.warn(str(warning.message))
        else:  # another library's warning
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    progress.report(report)
    return report


def attach_again(tuner: Tuner, recipe: Recipe, report: Report | None) -> None:
    """Attach LoRA to the layers that a resumed run had it on, at its ranks. The factors come from the checkpoint.

    Args:
        report: of the run's start; None for a plain one.
    """
    backend = load_backend(recipe.backend)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InitWarning)  # the run reported them when it began
        if report is None or recipe.config.rank_max is None:
            tuner.model = backend.attach_plain(tuner.model, recipe.config)
            return
        with backend.open_session(tuner.model, None, None, recipe.config) as session:
            session.set_ranks({layer.name: layer.rank for layer in report.layers})
            initialize_without_data(session, recipe.config, recipe.backend)
        tuner.model = session.model
