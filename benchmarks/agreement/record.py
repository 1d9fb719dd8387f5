"""One framework's run of a job, as NumPy arrays in the orientation of the spec."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import numpy as np

import lora_one
from lora_one.backends import backend_of
from lora_one.core.factors import Factors
from lora_one.core.ops import Ops
from lora_one.core.spectrum import SketchState, advance, draw_omega, probe, start

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
        found |= _sketched(framework.open(job.model), init_batches, framework.loss_fn, job)
        model, report = lora_one.init(framework.open(job.model), init_batches, framework.loss_fn, job.config)
        found |= {f"singular values/{layer.name}": np.array(layer.singular_values) for layer in report.layers}
        found |= _trained(framework, model, train_batches, job.learning_rate)
        merged = lora_one.merge(model)
        found |= {f"merged/{name}": value for name, value in framework.weights(merged).items()}
    return found


def _evaluated(framework: Framework, model: Any, batches: list[Any]) -> Record:
    logits, losses, gradients = zip(*(framework.evaluate(model, batch) for batch in batches), strict=True)
    mean = {f"gradient/{name}": sum(each[name] for each in gradients) / len(batches) for name in gradients[0]}
    return {"logits": logits[0], "loss": np.mean(losses), **mean}


def _sketched(model: Any, batches: list[Any], loss_fn: Any, job: Job) -> Record:
    """The passes of `lora_one.init`, one by one."""
    found = {}
    with backend_of(model).attach(model, batches, loss_fn, job.config) as session:
        ops, states = session.ops, {}
        for layer in session.layers:
            width = min(layer.rank + job.config.oversample, layer.out_features, layer.in_features)
            omega = draw_omega(job.config.seed, layer.name, layer.in_features, width)
            states[layer.name] = start(ops, ops.asarray(omega, like=session.like(layer.name)), layer.out_features)
        for number in range(1, job.config.passes + 1):
            _, gradients = session.sketch_pass({name: probe(ops, state) for name, state in states.items()})
            for name, gradient in gradients.items():
                states[name] = advance(ops, states[name], gradient)
                found[f"sketch/{number}/{name}"] = seen(ops, states[name])
    return found


def seen(ops: Ops, state: SketchState) -> np.ndarray:
    """G projected on all directions probed so far, (out, in), whichever basis of theirs was used."""
    if state.passes % 2 == 0:  # Q (Q^T G)
        out_side, in_side = ops.concat(state.left, axis=1), ops.concat(state.left_g, axis=0)
    else:  # (G V) V^T
        out_side, in_side = ops.concat(state.g_right, axis=1), ops.matrix_transpose(ops.concat(state.right, axis=1))
    return ops.to_numpy(out_side).astype(np.float64) @ ops.to_numpy(in_side).astype(np.float64)


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
