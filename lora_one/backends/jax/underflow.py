"""float16 in a backward pass: gradients below 6e-8 become zero there, so the loss is scaled up and the gradients back.

By a power of two, so that no other number changes: the largest of a few for which every gradient is finite.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

FIRST, LEAST, STEP = 2.0**24, 2.0**-16, 2.0**-4


class LossScale:
    """What a loss is multiplied by before its backward pass. Falls while gradients overflow, and never rises."""

    def __init__(self, computes_in_float16: bool):
        self.value, self._least = (FIRST, LEAST) if computes_in_float16 else (1.0, 1.0)

    @property
    def is_last(self) -> bool:
        """Whether there is no smaller one: what is not finite now is so whatever the scale."""
        return self.value <= self._least

    def lower(self) -> None:
        self.value *= STEP


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
