"""One framework's run of a job, as NumPy arrays in the orientation of the spec."""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import numpy as np

import lora_one
from lora_one.backends import backend_of
from lora_one.backends.interface import Session
from lora_one.core.factors import Factors
from lora_one.core.sketch import Probe
from lora_one.initialization import initialize

from .job import Batch, Job

Record = dict[str, np.ndarray]  # see `record`


class Step(NamedTuple):
    """One training step: what was computed before it, and the factors after it."""

    loss: float
    gradients: dict[str, Factors]  # by layer
    factors: dict[str, Factors]


class Framework(Protocol):
    """A framework in one dtype. Weights go by transformers' names and are (out, in)."""

    name: str
    loss_fn: Any  # for `lora_one.init`; None for the backend's default

    def precision(self) -> AbstractContextManager[Any]:
        """Within it the dtype is what all arithmetic runs in."""
        ...

    def open(self, folder: Any) -> Any:
        """The model of a folder."""
        ...

    def batch(self, batch: Batch) -> Any:
        """A batch as the framework's users have it."""
        ...

    def weights(self, model: Any) -> dict[str, np.ndarray]:
        """All weights of a plain model."""
        ...

    def evaluate(self, model: Any, batch: Any) -> tuple[np.ndarray, float, dict[str, np.ndarray]]:
        """Logits, (rows, length, vocabulary), loss, and the gradient of every weight."""
        ...

    def factors(self, model: Any) -> dict[str, Factors]:
        """The LoRA factors by layer."""
        ...

    def train(self, model: Any, optimizer: Any, batches: list[Any]) -> Iterator[Step]:
        """A step a batch."""
        ...


def record(framework: Framework, job: Job) -> Record:
    """Run the job.

    Returns:
        "logits", of the first init batch; "loss", () and "gradient/WEIGHT", means over the init batches.
        "sketch/PASS/LAYER", (out, in): G as far as the passes so far have seen it; "singular values/LAYER", (r,).
        "A0/LAYER", "B0/LAYER": the start. "A/LAYER", "B/LAYER", (steps, ...): the factors after each step;
        "gA/LAYER", "gB/LAYER", (steps, ...): their gradients before it; "losses", (steps,).
        "weight/WEIGHT" and "merged/WEIGHT": the weights as they came, and with the trained adapter in them.
    """
    with framework.precision():
        init_batches = [framework.batch(batch) for batch in job.init_batches]
        train_batches = [framework.batch(batch) for batch in job.train_batches]
        model = framework.open(job.model)
        found = {f"weight/{name}": value for name, value in framework.weights(model).items()}
        found |= _evaluated(framework, model, init_batches)
        model, started = _started(framework.open(job.model), init_batches, framework.loss_fn, job)
        found |= started | _trained(framework, model, train_batches, job.learning_rate)
        merged = lora_one.merge(model)
        found |= {f"merged/{name}": value for name, value in framework.weights(merged).items()}
    return found


def _evaluated(framework: Framework, model: Any, batches: list[Any]) -> Record:
    logits, losses, gradients = zip(*(framework.evaluate(model, batch) for batch in batches), strict=True)
    mean = {f"gradient/{name}": sum(each[name] for each in gradients) / len(batches) for name in gradients[0]}
    return {"logits": logits[0], "loss": np.mean(losses), **mean}


def _started(model: Any, batches: list[Any], loss_fn: Any, job: Job) -> tuple[Any, Record]:
    """`lora_one.init`, as it is in `lora_one.api`, with an eye on its passes."""
    backend = backend_of(model)
    with backend.open_session(model, batches, loss_fn, job.config) as session:
        watched = _Watched(session)
        report = initialize(watched, job.config, backend.ops.name, time.perf_counter())
    spectra = {f"singular values/{layer.name}": np.array(layer.singular_values) for layer in report.layers}
    return session.model, watched.found | spectra


class _Watched:
    """A session whose probes, and the gradients that they brought, are looked at."""

    def __init__(self, session: Session):
        self._session = session
        self._passes: dict[str, list[tuple[Probe, np.ndarray]]] = defaultdict(list)
        self.found: Record = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def sketch_pass(self, probes: Mapping[str, Probe]) -> Any:
        result, gradients = self._session.sketch_pass(probes)
        for layer, gradient in gradients.items():
            given = probes[layer]._replace(factor=self.ops.to_numpy(probes[layer].factor).astype(np.float64))
            passes = self._passes[layer]
            passes.append((given, self.ops.to_numpy(gradient).astype(np.float64)))
            self.found[f"sketch/{len(passes)}/{layer}"] = seen(passes)
        return result, gradients


def seen(passes: list[tuple[Probe, np.ndarray]]) -> np.ndarray:
    """G projected on all directions that its last pass's side has probed, (out, in), whichever basis they came in.

    Args:
        passes: what each installed, and the gradient of the zero factor that it brought.
    """
    projected = 0.0
    for given, gradient in passes[::-2]:
        projected = projected + (gradient @ given.factor if given.side == "A" else given.factor @ gradient)
    return projected


def _trained(framework: Framework, model: Any, batches: list[Any], learning_rate: float) -> Record:
    optimizer = lora_one.optimizer(model, learning_rate=learning_rate, precondition=True)
    start = framework.factors(model)
    steps = list(framework.train(model, optimizer, batches))
    found = {"losses": np.array([step.loss for step in steps])}
    for layer, pair in start.items():
        for side, name in enumerate("AB"):
            found[f"{name}0/{layer}"] = pair[side]
            found[f"{name}/{layer}"] = np.stack([step.factors[layer][side] for step in steps])
            found[f"g{name}/{layer}"] = np.stack([step.gradients[layer][side] for step in steps])
    return found
