"""The loss scale of an MLX model in float16, see `lora_one.core.loss_scale`, found by comparing two scales.

Powers of two are exact: while nothing under- or overflows, two scales give the same gradients to the bit once they are
divided by the scale. So the change of a layer's gradient from one scale to the next is what the lower one loses.
"""

from collections.abc import Callable, Mapping

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from lora_one.backends.checks import warn_of_underflow
from lora_one.backends.mlx.ops import MlxOps
from lora_one.backends.mlx.tree import flat
from lora_one.core.gradient import RowProduct, times
from lora_one.core.loss_scale import UNSCALED, Limits, begin, error_above

FIRST = 2.0**15  # the largest power of two in float16: a loss in float16 can have it as its gradient
STEP = 2.0**5
# At most 9 raises, to 2^60; a relative change of 1e-3 is small enough.
LIMITS = Limits(first=FIRST, least=1.0, down=1.0 / STEP, enough=1e-3, raises=9)

Summaries = dict[str, np.ndarray]  # by layer: a vector that is linear in the layer's gradient


class LossScale:
    """The factor of the losses before their backward passes: 1 for models without float16.

    Attributes:
        is_needed: whether the model has parameters in float16.
        is_fitted: whether the scale is final: from the end of the first pass on, or from the start if none is needed.
        rounded_away: layer -> the share of its gradient's norm that float16 loses at this scale, once it is fitted.
    """

    def __init__(self, model: nn.Module):
        self.is_needed = any(array.dtype == mx.float16 for array in flat(model.parameters()).values())
        self.is_fitted = not self.is_needed
        self._search = begin(LIMITS if self.is_needed else UNSCALED)
        self.rounded_away: dict[str, float] = {}

    @property
    def value(self) -> float:
        return self._search.value

    def fit(self, summaries_at: Callable[[float], Summaries]) -> None:
        """Fit the scale to another batch: the first raises it as far as it helps, each lowers it until it fits.

        Args:
            summaries_at: computes the batch's gradients with the loss at a scale, and divides them by the scale.
        """
        current = summaries_at(self.value)
        while not _finite(current) and self._search.can_fall:
            self._search = self._search.after_overflow()
            current = summaries_at(self.value)
            self.rounded_away = {layer: error * STEP for layer, error in self.rounded_away.items()}
        if not self._search.is_settled:
            self._raise(current, summaries_at)

    def _raise(self, current: Summaries, summaries_at: Callable[[float], Summaries]) -> None:
        """Raise the scale until it is enough, or the one above overflows, and keep what is lost at it."""
        below: Summaries | None = None
        while True:
            above = summaries_at(self.value * STEP)
            errors = _changes(current, above)
            room = STEP if _finite(above) else 1.0
            self._search = self._search.after_finite(max(errors.values(), default=0.0), room)
            if self._search.is_settled:
                break
            below, current = current, above
        self.rounded_away = errors
        if room == 1.0:  # a layer that overflows above has no error yet: it comes from the scale below
            errors_below = _changes(summaries_at(self.value / STEP) if below is None else below, current)
            self.rounded_away = {
                layer: error if np.isfinite(error) else error_above(errors_below[layer], STEP)
                for layer, error in errors.items()
            }

    def finish(self) -> None:
        """End the fitting, and warn of gradients that no scale brings into float16's range."""
        self.is_fitted = True
        remedy = "model.set_dtype(mx.bfloat16), or mx.float32, before init keeps them"
        warn_of_underflow(self.rounded_away, "is lost", remedy)


def summary(rows: RowProduct) -> mx.array:
    """Return a random combination of the columns of a gradient, (out, 1)."""
    _, in_features = rows.shape
    return times(MlxOps(), rows, mx.random.normal((in_features, 1), key=mx.random.key(0), dtype=rows.x.dtype))


def _finite(summaries: Mapping[str, np.ndarray]) -> bool:
    return all(np.isfinite(x).all() for x in summaries.values())


def _changes(lower: Summaries, upper: Summaries) -> dict[str, float]:
    """Return each layer's relative change from the lower scale to the upper; nan if the upper overflows."""
    changes = {}
    with np.errstate(invalid="ignore"):
        for layer, x in upper.items():
            size = float(np.linalg.norm(x))
            changes[layer] = float(np.linalg.norm(lower[layer] - x)) / size if size else 0.0
    return changes
