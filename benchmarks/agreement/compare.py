"""How far two records are apart, and how far they may be."""

from collections.abc import Iterator

import numpy as np

from .record import Record

LOSSES = "losses, worst step"

# Relative to the norm of the whole array, for the worst array. float32 has an eps of 1.2e-7. A forward pass makes some
# of it; a backward pass more, where a gradient is the difference of larger terms; B A ten times that, where singular
# values are close to each other. After Adam it is a matter of the rate: an entry of which the gradient is all rounding
# steps by the whole learning rate, up or down.
_FLOAT32 = {
    "logits": 1e-5,
    "loss": 1e-6,
    "gradient of the weights": 1e-4,
    "start, pass 1": 1e-4,
    "start, pass 2": 1e-4,
    "start, pass 3": 1e-4,
    "singular values": 1e-4,
    "B0 A0": 1e-3,
    "effective weights, start": 1e-5,
    LOSSES: 1e-4,
    "effective weights, end": 1e-3,
}
TOLERANCES = {"float32": _FLOAT32, "float64": dict.fromkeys(_FLOAT32, 1e-10)}
GIVEN_GRADIENTS = {"float32": 1e-5, "float64": 1e-10}  # all that NumPy computes from one framework's own gradients


def errors(record: Record, other: Record, scaling: float) -> dict[str, float]:
    """The worst relative error of each quantity, in the order of `TOLERANCES`, that both records have.

    A start is compared as what its passes have seen of G: the singular values of two such matrices differ by no more
    than the matrices do (Weyl). Not as columns: their signs, and the vectors of close singular values, are a matter of
    taste.

    Args:
        scaling: s in W + s B A.
    """
    found: dict[str, float] = {}
    for quantity, array, expected in _arrays(record, other, scaling):
        difference = np.asarray(array, np.float64) - expected
        error = float(np.linalg.norm(difference) / (np.linalg.norm(expected) or 1.0))
        found[quantity] = max(found.get(quantity, 0.0), error)
    if "losses" in record and "losses" in other:
        found[LOSSES] = float(loss_errors(record, other).max())
    return {quantity: found[quantity] for quantity in _FLOAT32 if quantity in found}


def loss_errors(record: Record, other: Record) -> np.ndarray:
    """The relative difference of the loss at each step, (steps,)."""
    return np.abs(record["losses"] - other["losses"]) / np.abs(other["losses"])


def _arrays(record: Record, other: Record, scaling: float) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(quantity, array, expected) of everything that both have."""
    for key in record.keys() & other.keys():
        kind, _, name = key.partition("/")
        if kind in ("logits", "loss"):
            yield kind, record[key], other[key]
        elif kind == "gradients":
            yield "gradient of the weights", record[key], other[key]
        elif kind == "start":
            yield f"start, pass {name[0]}", record[key], other[key]
        elif kind == "singular values":
            yield kind, record[key], other[key]
        elif kind == "merged":
            yield "effective weights, end", record[key], other[key]
        elif kind == "A0":
            products = [each[f"B0/{name}"].astype(np.float64) @ each[key] for each in (record, other)]
            yield "B0 A0", *products
            weight = record[f"weight/{name}.weight"]
            yield "effective weights, start", *(weight + scaling * product for product in products)


def other_way(record: Record, other: Record, learning_rate: float) -> int:
    """How many factor entries the first step of AdamW moved otherwise than in the other record.

    That step is the learning rate times the sign of the preconditioned gradient, wherever this is above Adam's eps: an
    entry of which it is all rounding may go either way.
    """
    return sum(
        int((np.abs(record[key][0].astype(np.float64) - other[key][0]) > 0.5 * learning_rate).sum())
        for key in record
        if key.startswith(("A/", "B/"))
    )
