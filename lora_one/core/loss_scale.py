"""The search for the power of two that a loss is multiplied by where a model computes in float16.

float16 ends at 2^-24, about 6e-8, and the gradients of a mean over thousands of tokens lie below it. The gradients of
2^k times the loss are 2^k times as large, and dividing by 2^k in float32 is exact. The search decides k from the
backward passes of the first batch: lower while gradients overflow, higher while a layer loses too much and the largest
gradient leaves room. Later batches can only lower it. Running the passes, and measuring them, is the framework's part.
"""

import math
from typing import NamedTuple


class Limits(NamedTuple):
    """The scales that a framework tries, and what it is content with."""

    first: float  # the scale of the first pass
    least: float  # at this scale and below, an infinite gradient is the model's own
    down: float  # what the scale is multiplied by after an overflow
    enough: float  # relative error of a layer's gradient up to which the scale is not raised
    raises: int = 0  # how often the scale may be raised
    small_room: float = 1.0  # factor to the largest allowed gradient up to which raising is not worth a pass


# For models without float16: there is only one scale, so the search is settled from the start.
UNSCALED = Limits(first=1.0, least=1.0, down=1.0, enough=math.inf)


class ScaleSearch(NamedTuple):
    """The state of a search: a new one comes from each pass."""

    limits: Limits
    value: float  # the scale of the next pass
    raises_left: int
    is_settled: bool  # whether the gradients of a finite pass at `value` can be used

    @property
    def can_fall(self) -> bool:
        """Return whether a lower scale may be tried after an overflow."""
        return self.value > self.limits.least

    def after_overflow(self) -> "ScaleSearch":
        """Lower the scale, and never raise it again."""
        return self._replace(value=self.value * self.limits.down, raises_left=0)

    def after_finite(self, error: float, room: float) -> "ScaleSearch":
        """Settle on the scale, or raise it.

        Args:
            error: the largest relative error of a layer's gradient at this scale.
            room: the factor by which the scale may rise before the largest gradient is too large.
        """
        if error <= self.limits.enough or room <= self.limits.small_room or self.raises_left == 0:
            return self._replace(is_settled=True)
        return self._replace(value=self.value * 2.0 ** math.floor(math.log2(room)), raises_left=self.raises_left - 1)


def begin(limits: Limits) -> ScaleSearch:
    """Return the state of a search before its first pass."""
    return ScaleSearch(limits, limits.first, limits.raises, is_settled=limits.first <= limits.least)


def error_above(error: float, ratio: float) -> float:
    """Return a gradient's relative error from that at a scale `ratio` times lower: rounding errors are absolute."""
    return error / ratio
