"""What NumPy in float64 makes of one framework's gradients: everything of LoRA-One but the model."""

import numpy as np

from lora_one.backends import load_backend
from lora_one.core.factors import Factors, normalized_factors
from lora_one.core.fold import TEST_COLUMNS, finish_fold, fold, of_mean, read_both_sides, start_fold
from lora_one.core.omega import draw_omega
from lora_one.core.sides import Products, Sides
from lora_one.core.step import adamw, start_pair

from .job import Job
from .record import Record, held, read

_OPS = load_backend("numpy").ops


def reference(record: Record, job: Job) -> Record:
    """The fold, spectrum and start from the recorded gradients of the weights; the steps from those of the factors.

    Returns:
        The entries of `record` that are computed without a model.
    """
    found = {}
    for name in (key.removeprefix("A0/") for key in record if key.startswith("A0/")):
        found |= _start(record, job, name) | _steps(record, job, name)
    return found


def _start(record: Record, job: Job, layer: str) -> Record:
    gradients = record[f"gradients/{layer}.weight"].astype(np.float64)  # (batches, out, in)
    g, config = gradients.mean(axis=0), job.config
    width = min(config.rank + config.oversample, *g.shape)
    omega = draw_omega(config.seed, layer, g.shape[1], width)
    state = start_fold(_OPS, omega, g.shape[0], draw_omega(config.seed, f"{layer}, test", g.shape[1], TEST_COLUMNS))
    for of_batch in gradients:
        state = fold(_OPS, state, of_batch)
    state = of_mean(_OPS, state, len(gradients))
    found = {f"start/1/{layer}": held(state)}
    for number in range(2, config.passes + 1):
        products = Products(g @ state.v, g.T @ state.u)
        found[f"start/{number}/{layer}"] = read(Sides(state.v, state.u), products)
        state = read_both_sides(_OPS, state, products)
    spectrum = finish_fold(_OPS, state, config.rank)
    found[f"singular values/{layer}"] = spectrum.s
    found[f"A0/{layer}"], found[f"B0/{layer}"] = normalized_factors(_OPS, spectrum, config.first_gamma, config.balance)
    return found


def _steps(record: Record, job: Job, layer: str) -> Record:
    """Each step from the recorded factors before it: left to itself, the recursion would double a rounding error every
    few steps, as the preconditioner depends on the factors, while the recorded gradients do not react.
    """
    before = [np.concatenate([record[f"{name}0/{layer}"][None], record[f"{name}/{layer}"][:-1]]) for name in "AB"]
    gradients = [record[f"g{name}/{layer}"] for name in "AB"]
    state, after = None, []
    for *pair, gradient_A, gradient_B in zip(*(x.astype(np.float64) for x in (*before, *gradients)), strict=True):
        state = state or start_pair(_OPS, Factors(*pair))
        moved, state = adamw(_OPS, Factors(*pair), Factors(gradient_A, gradient_B), state, job.learning_rate)
        after.append(moved)
    lora_A, lora_B = map(np.stack, zip(*after, strict=True))
    weight = record[f"weight/{layer}.weight"].astype(np.float64)
    merged = weight + job.config.scaling * lora_B[-1] @ lora_A[-1]
    return {f"A/{layer}": lora_A, f"B/{layer}": lora_B, f"merged/{layer}.weight": merged}
