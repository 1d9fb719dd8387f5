"""The start that an optimizer makes for a model: whether it makes one, and the report of it."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import NamedSharding

from lora_one.backends.interface import Layer
from lora_one.backends.waiting import deferred_start, report_of, warn_of_plain_layers
from lora_one.config import Config
from lora_one.core.deferred import StartState
from lora_one.errors import ModelError
from lora_one.report.deferred import DeferredReport, StartSteps

from .deferred import Start
from .layout import Layout
from .nnx.dora import DoraMagnitude
from .pairs import ModelPair, Path, entry_of, model_pairs
from .sites import check_concrete


def model_start(model: Any, start_steps: StartSteps | None) -> tuple[Start | None, dict[Path, Layout]]:
    """Return the start that an optimizer is to make for a model, and the layouts of the model's pairs.

    Raises:
        ConfigError: an invalid number of steps.
        ModelError: no LoRA in the model, or a start is asked for and B is not zero.
    """
    report = report_of(model)
    pairs = model_pairs(model, Config() if report is None else report.config)
    if start_steps not in (None, 0) and isinstance(model, nnx.Module) and _has_magnitudes(model):
        raise ModelError(
            "a start from the first steps is for LoRA without DoRA on JAX, since optax never sees the base weights: "
            "pass batches to init, and leave start_steps out"
        )

    def layers() -> list[Layer]:
        return [layer for pair in pairs.values() for layer in pair.site.layers()]

    def already_trained() -> list[str]:
        factors = [pair.leaves.b for pair in pairs.values()]
        check_concrete("a start from the first steps", factors)
        nonzero = jax.device_get([jnp.any(b != 0) for b in factors])
        return [pair.site.name for pair, trained in zip(pairs.values(), nonzero, strict=True) if trained]

    layouts = {path: pair.site.layout for path, pair in pairs.items()}
    decided = deferred_start(model, start_steps, "jax", layers, already_trained)
    if decided is None:
        return None, layouts
    decided.report.refresh = jax.effects_barrier  # what the last step told may be on its way
    folds = {path: pair.site.scaling / pair.site.native for path, pair in pairs.items()}
    telling = _telling(decided.report, pairs)
    shardings = [pair.leaves.b.sharding for pair in pairs.values()]
    mesh = next((sharding.mesh for sharding in shardings if isinstance(sharding, NamedSharding)), None)
    return Start(decided.gamma, decided.balance, decided.least, decided.most, folds, telling, mesh), layouts


def _has_magnitudes(model: nnx.Module) -> bool:
    return any(isinstance(variable, DoraMagnitude) for _, variable in nnx.iter_graph(model))


def _telling(report: DeferredReport, pairs: Mapping[Path, ModelPair]) -> Callable[[list[Path]], Callable[..., None]]:
    """Return what fills the report in: see `lora_one.backends.jax.deferred.Telling`."""
    index = {layer.name: i for i, layer in enumerate(report.layers)}
    places = {path: [index[layer.name] for layer in pair.site.layers()] for path, pair in pairs.items()}

    def tell(paths: list[Path]) -> Callable[..., None]:
        order = [place for path in paths for place in _place_of(path, places)]

        def record(steps: Array, done: Array, starts: tuple[StartState, ...]) -> None:
            if (int(steps), bool(done)) == (report.steps, report.done):
                return  # another device of this process has told it
            readings: list[Any] = [([0.0] * layer.rank, 0.0) for layer in report.layers]
            # As NumPy's: to index JAX's would start another computation in the middle of this one.
            read = [reading for kind in starts for reading in zip(*map(np.asarray, kind), strict=True)]
            for place, reading in zip(order, read, strict=True):
                readings[place] = reading
            report.record(int(steps), bool(done), readings)
            warn_of_plain_layers(report, warnings.warn)  # no line of the user's is on this stack

        return record

    return tell


def _place_of(path: Path, places: Mapping[Path, list[int]]) -> list[int]:
    """Return the places of a pair's layers in the report.

    Raises:
        ModelError: the model has no such pair.
    """
    of_layers = entry_of(path, places)
    if of_layers is None:
        raise ModelError(f"the optimizer was made for another model: that has no {'.'.join(path)}_a")
    return of_layers
