"""The computation of the suite that makes a start of the first gradients of a training."""

from collections.abc import Sequence

import numpy as np

from lora_one.core import deferred
from lora_one.core.factors import Factors
from lora_one.core.ops import Array, Ops

from .types import Host, Params, View


def deferred_start(ops: Ops, inputs: Sequence[Array], params: Params) -> Sequence[Array]:
    """The factors after each gradient, their state, and whether AdamW may take over.

    Inputs are A, (r, in), and the gradients of the weight, each (out, in); or stacks of them.
    """
    lora_A, *gradients = inputs
    shape = gradients[0].shape
    pair = Factors(lora_A, ops.zeros((*shape[:-1], lora_A.shape[-2]), like=lora_A))
    state = deferred.start_state(ops, pair)
    results: list[Array] = []
    for step, g in enumerate(gradients, 1):
        gradient = Factors(
            ops.matmul(ops.matrix_transpose(pair.lora_B), g), ops.matmul(g, ops.matrix_transpose(pair.lora_A))
        )
        pair, state = deferred.start_step(ops, pair, gradient, state, params["gamma"], params["balance"])
        steps = ops.zeros((), like=lora_A) + float(step)
        results += [*pair, *state, ops.astype(deferred.settled(ops, steps, [state]), lora_A.dtype)]
    return results


def deferred_view(arrays: Host, inputs: Host, params: Params) -> View:
    """The products that the mathematics defines, by step."""
    view: View = {}
    for step in range(len(inputs) - 1):
        lora_A, lora_B, s, agreement, settled = arrays[5 * step : 5 * step + 5]
        first = s[..., :1]
        view |= {
            f"step {step + 1}: {name}": np.asarray(value)
            for name, value in {
                "B A": lora_B @ lora_A,
                "A A^T": lora_A @ lora_A.swapaxes(-1, -2),
                "B^T B": lora_B.swapaxes(-1, -2) @ lora_B,
                "S / S_1": s / np.where(first > 0, first, 1.0),
                "S_1": first / params["unit"],
                "agreement": agreement,
                "settled": settled,
            }.items()
        }
    return view
