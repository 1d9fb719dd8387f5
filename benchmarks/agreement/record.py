"""One framework's run of a job, as NumPy arrays in the orientation of the spec."""

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import numpy as np

import lora_one
from lora_one.backends import backend_of
from lora_one.backends.interface import Session
from lora_one.core.factors import Factors
from lora_one.core.fold import FoldState
from lora_one.core.sides import Products, Sides
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
        "logits", of the first init batch; "loss", (), the mean over the init batches; "gradients/WEIGHT",
        (batches, ...): of each of them.
        "start/PASS/LAYER", (out, in): what the pass has seen of G; "singular values/LAYER", (r,).
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
    by_weight = {f"gradients/{name}": np.stack([each[name] for each in gradients]) for name in gradients[0]}
    return {"logits": logits[0], "loss": np.mean(losses), **by_weight}


def _started(model: Any, batches: list[Any], loss_fn: Any, job: Job) -> tuple[Any, Record]:
    """`lora_one.init`, as it is in `lora_one.api`, with an eye on its passes."""
    backend = backend_of(model)
    with backend.open_session(model, batches, loss_fn, job.config) as session:
        watched = _Watched(session)
        report = initialize(watched, job.config, backend.ops.name, time.perf_counter())
    spectra = {f"singular values/{layer.name}": np.array(layer.singular_values) for layer in report.layers}
    return session.model, watched.found | spectra


class _Watched:
    """A session that is looked at: what each pass has seen of the gradients."""

    def __init__(self, session: Session):
        self._session = session
        self._passes = 0
        self.found: Record = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def fold_pass(self, states: dict[str, FoldState]) -> Any:
        result, folded = self._session.fold_pass(states)
        self._passes += 1
        for layer, state in folded.items():
            self._record(layer, held(_as_numpy(self.ops, state)))
        return result, folded

    def sides_pass(self, sides: Mapping[str, Sides]) -> Any:
        result, products = self._session.sides_pass(sides)
        self._passes += 1
        for layer, of_layer in products.items():
            self._record(layer, read(_as_numpy(self.ops, sides[layer]), _as_numpy(self.ops, of_layer)))
        return result, products

    def _record(self, layer: str, seen: np.ndarray) -> None:
        self.found[f"start/{self._passes}/{layer}"] = seen


def _as_numpy(ops: Any, arrays: Any) -> Any:
    return type(arrays)(*(ops.to_numpy(x).astype(np.float64) for x in arrays))


def held(state: FoldState) -> np.ndarray:
    """What a fold holds of G, (out, in): U diag(S) V^T, whichever basis of close singular vectors it is in."""
    return (state.u * state.s) @ state.v.T


def read(sides: Sides, products: Products) -> np.ndarray:
    """What a pass reads of G, (out, in), by orthonormal sides V and U: all but the block outside both."""
    (v, u), (gv, gu) = sides, products
    return gv @ v.T + u @ gu.T - u @ (u.T @ gv) @ v.T


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
