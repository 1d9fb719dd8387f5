"""float16 in a backward pass: gradients below 6e-8 become zero there, so the loss is scaled up and the gradients back.

By a power of two, so that no other number changes: the largest of a few for which every gradient is finite.
"""

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_one.errors import UnderflowWarning

FIRST, LEAST, STEP = 2.0**24, 2.0**-16, 2.0**-4
TOLERATED = 0.01  # of a layer's gradient may be lost without a word


class LossScale:
    """What a loss is multiplied by before its backward pass. Falls while gradients overflow, and never rises."""

    def __init__(self, computes_in_float16: bool):
        self.value, self._least = (FIRST, LEAST) if computes_in_float16 else (1.0, 1.0)
        self.checked = False

    @property
    def is_last(self) -> bool:
        """Whether there is no smaller one: what is not finite now is so whatever the scale."""
        return self.value <= self._least

    def lower(self) -> None:
        self.value *= STEP

    def check(self, changes: Mapping[str, Any]) -> None:
        """Warn of layers whose gradients are too small for float16 at this scale too.

        Args:
            changes: how far off each layer's gradient is at the next lower scale, relative; here it is a STEP-th of it.
        """
        self.checked = True
        lost = {site: STEP * float(change) for site, change in changes.items() if STEP * float(change) > TOLERATED}
        if lost:
            worst = max(lost, key=lambda site: lost[site])
            warnings.warn(
                f"float16 cannot hold the gradients of {len(lost)} layers beside the others', at any loss scale; of "
                f"that of {worst} about {lost[worst]:.0%} or more is lost, and the report's shares are of the rest: a "
                "model in bfloat16 or float32 keeps them",
                UnderflowWarning,
                stacklevel=6,
            )


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
