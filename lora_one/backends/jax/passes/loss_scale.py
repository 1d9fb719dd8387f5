"""The loss scale of a program that computes in float16, see `lora_one.core.loss_scale`, and whether a program does."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_one.backends.checks import warn_of_underflow
from lora_one.core.loss_scale import UNSCALED, Limits, begin, error_above

STEP = 2.0**-4
# The search begins at the top: the scale is never raised.
LIMITS = Limits(first=2.0**24, least=2.0**-16, down=STEP, enough=math.inf)


class LossScale:
    """The factor of the losses: falls while gradients overflow, and never rises.

    Attributes:
        rounded_away: site -> the share of its gradient's norm that float16 lost in the first batch.
    """

    def __init__(self, computes_in_float16: bool):
        self._search = begin(LIMITS if computes_in_float16 else UNSCALED)
        self.rounded_away: dict[str, float] = {}

    @property
    def value(self) -> float:
        return self._search.value

    @property
    def is_last(self) -> bool:
        """Whether there is no smaller scale: a gradient that is not finite now is so at any scale."""
        return not self._search.can_fall

    @property
    def checked(self) -> bool:
        """Whether `check` was called, or need not be."""
        return self._search.is_settled

    def lower(self) -> None:
        self._search = self._search.after_overflow()

    def check(self, changes: Mapping[str, Any]) -> None:
        """Settle on the scale, and warn of layers whose gradients are too small for float16 at it.

        Args:
            changes: site -> relative change of its gradient from the next lower scale to this one.
        """
        self.rounded_away = {site: error_above(float(change), 1.0 / STEP) for site, change in changes.items()}
        self._search = self._search.after_finite(max(self.rounded_away.values(), default=0.0), room=1.0)
        warn_of_underflow(self.rounded_away, "or more is lost", "a model in bfloat16 or float32 keeps them")


def all_finite(tree: Any) -> jax.Array:
    """Whether all numbers of all arrays are, ()."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]))


def computes_in_float16(jaxpr: Any) -> bool:
    """Whether any value of a program is a float16, its inputs included, however deep."""
    return any(
        getattr(variable.aval, "dtype", None) == jnp.float16
        for inner in with_inner(jaxpr)
        for variables in (inner.invars, *(equation.outvars for equation in inner.eqns))
        for variable in variables
    )


def with_inner(jaxpr: Any) -> Iterator[Any]:
    """A program and all programs inside it: of loops, branches, compiled and differentiated functions."""
    yield jaxpr
    for equation in jaxpr.eqns:
        for inner in inner_programs(equation):
            yield from with_inner(inner)


def inner_programs(equation: Any) -> list[Any]:
    """The programs that an equation runs."""
    found = []
    for value in equation.params.values():
        for one in value if isinstance(value, (tuple, list)) else (value,):
            one = getattr(one, "jaxpr", one)  # closed or not
            if hasattr(one, "eqns"):
                found.append(one)
    return found
