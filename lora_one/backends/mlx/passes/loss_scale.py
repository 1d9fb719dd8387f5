"""The loss scale of a float16 model: a power of two, so large that its backward pass does not underflow.

The gradient of a mean over thousands of tokens is below float16's range, which is why float16 training scales the loss.
Powers of two are exact: while nothing under- or overflows, two scales give the same bits once they are taken out again.
So a comparison of two tells whether the lower one is enough, layer by layer.
"""

import warnings
from collections.abc import Callable, Mapping

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from lora_one.backends.mlx.tree import flat
from lora_one.errors import UnderflowWarning

FIRST = 2.0**15  # the largest power of two in float16: a loss in float16 can have it as its gradient
STEP = 2.0**5
LAST = 2.0**60
SAME = 1e-3  # the change in a layer's gradient, relative, at which a scale is enough
TOLERATED = 1e-2  # above it, the user is told

Summaries = dict[str, np.ndarray]  # by site: a vector that is linear in the layer's gradient


class LossScale:
    """What the loss is multiplied by before the backward pass: 1 for models without float16."""

    def __init__(self, model: nn.Module):
        self.is_needed = any(array.dtype == mx.float16 for array in flat(model.parameters()).values())
        self.value = FIRST if self.is_needed else 1.0
        self._errors: dict[str, float] | None = None  # by site: what underflow does to its gradient, relative

    def fit(self, summaries_at: Callable[[float], Summaries]) -> None:
        """Fit the scale to another batch: the first raises it as far as it helps, each lowers it until it fits.

        Args:
            summaries_at: the batch's gradients with the loss at a scale, which is taken out of them.
        """
        found = summaries_at(self.value)
        while not _finite(found) and self.value > 1.0:
            self.value /= STEP
            found = summaries_at(self.value)
            if self._errors is not None:
                self._errors = {site: error * STEP for site, error in self._errors.items()}
        if self._errors is None:
            self._raise(found, summaries_at)

    def _raise(self, found: Summaries, summaries_at: Callable[[float], Summaries]) -> None:
        below: Summaries | None = None
        while True:
            above = summaries_at(self.value * STEP)
            errors = _changes(found, above)
            if not _finite(above):
                break
            if max(errors.values()) <= SAME or self.value >= LAST:
                self._errors = errors
                return
            below, found, self.value = found, above, self.value * STEP
        # Of a layer that overflows above: what this scale loses is a STEP-th of what the one below does.
        lower = _changes(summaries_at(self.value / STEP) if below is None else below, found)
        self._errors = {site: error if np.isfinite(error) else lower[site] / STEP for site, error in errors.items()}

    def warn(self) -> None:
        """Warn, as an UnderflowWarning, of gradients that no scale brings into float16's range."""
        lost = {site: error for site, error in (self._errors or {}).items() if error > TOLERATED}
        if lost:
            worst = max(lost, key=lambda site: lost[site])
            warnings.warn(
                f"float16 cannot hold the gradients of {len(lost)} layers beside the others', at any loss scale; "
                f"of that of {worst} about {min(lost[worst], 1.0):.0%} is lost, and the report's shares are of what is "
                "left: model.set_dtype(mx.bfloat16), or mx.float32, before init keeps them",
                UnderflowWarning,
                stacklevel=2,
            )


def summary(gradient: mx.array) -> mx.array:
    """A random combination of a gradient's columns."""
    return gradient @ mx.random.normal((gradient.shape[-1],), key=mx.random.key(0), dtype=gradient.dtype)


def _finite(summaries: Mapping[str, np.ndarray]) -> bool:
    return all(np.isfinite(x).all() for x in summaries.values())


def _changes(lower: Summaries, upper: Summaries) -> dict[str, float]:
    """How far each layer's gradient at the lower scale is from that at the upper, relative; nan if it overflows."""
    changes = {}
    with np.errstate(invalid="ignore"):
        for site, x in upper.items():
            size = float(np.linalg.norm(x))
            changes[site] = float(np.linalg.norm(lower[site] - x)) / size if size else 0.0
    return changes
