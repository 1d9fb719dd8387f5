"""What a pass makes of the batches' gradients: their sum, or a running SVD of it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from lora_one.backends.jax.ops import JaxOps
from lora_one.backends.jax.sites import Leaves
from lora_one.backends.jax.tap import open_tap
from lora_one.core.fold import FoldState, of_mean

from .loss_scale import all_finite

_OPS = JaxOps()

Gradients = dict[str, Leaves]  # site -> its factors, or their gradients


class Scale(NamedTuple):
    """A `LossScale` as the compiled steps get it."""

    value: Any  # (), float32
    is_last: Any  # (), bool


class Folding(NamedTuple):
    """The running SVD of a site."""

    state: FoldState  # of the sum over the batches so far
    calls: Any  # (), the most often that one batch renewed it: more than once means nothing


Folds = dict[str, Folding]  # by site


class Rule(NamedTuple):
    """The way in which the gradients of batches make a total. All functions are pure and traceable."""

    installed: Callable[[Any, Gradients, Scale], Gradients]  # total, factors -> what stands in the model
    taken_in: Callable[[Any, Gradients, Scale], Any]  # total, gradients -> new total
    linear: Callable[[Any], dict[str, tuple[Array, ...]]]  # total -> site -> arrays that are linear in the gradient


def _sum_with(total: Gradients, gradients: Gradients, scale: Scale) -> Gradients:
    return jax.tree.map(lambda sum, x: sum + x / scale.value.astype(x.dtype), total, gradients)


def _taps(folds: Folds, _: Gradients, scale: Scale) -> Gradients:
    nothing = jnp.zeros(0)  # stands where lora_b stands
    return {name: Leaves(open_tap(fold.state, scale.value), nothing) for name, fold in folds.items()}


def _renewed(folds: Folds, gradients: Gradients, _: Scale) -> Folds:
    taps = {name: leaves.a for name, leaves in gradients.items()}
    return {
        name: Folding(_selected(taps[name].calls > 0, taps[name].state, state), jnp.maximum(calls, taps[name].calls))
        for name, (state, calls) in folds.items()
    }


SUMS = Rule(installed=lambda _, factors, __: factors, taken_in=_sum_with, linear=dict)
FOLDS = Rule(installed=_taps, taken_in=_renewed, linear=lambda folds: {n: (f.state.tested,) for n, f in folds.items()})


def if_finite(new: Any, old: Any, scale: Scale) -> tuple[Any, Array]:
    """Return the new total, or the old one if the new is not finite and a smaller scale may help; and which it is."""
    finite = all_finite(new)
    return _selected(finite | scale.is_last, new, old), finite


def first_folds(states: dict[str, FoldState]) -> Folds:
    """Return the running SVDs before the first batch."""
    return {name: Folding(state, zeros_like(state.s, (), jnp.float32)) for name, state in states.items()}


def zeros_like(x: Array, shape: tuple[int, ...] | None = None, dtype: Any = None) -> Array:
    """Return zeros that are placed as x is: a step compiles anew for an array that is placed otherwise."""
    return jnp.zeros_like(x, dtype, shape, device=x.sharding if x.committed else None)


@jax.jit
def mean(total: Any, count: int) -> Any:
    """Return a tree of sums divided by the number of batches."""
    return jax.tree.map(lambda x: x / count, total)


@jax.jit
def mean_folds(folds: Folds, count: int) -> dict[str, FoldState]:
    """Return the states of the mean over the batches."""
    return {name: of_mean(_OPS, fold.state, count) for name, fold in folds.items()}


@jax.jit
def relative_changes(others: dict[str, tuple[Array, ...]], gradients: dict[str, tuple[Array, ...]]) -> dict[str, Array]:
    """Return |other - gradient| / |gradient| of each site, 0 for a gradient that is zero."""

    def norm(arrays: tuple[Array, ...]) -> Array:
        return jnp.sqrt(sum(jnp.sum(jnp.square(x / unit)) for x in arrays))

    changes = {}
    for name, arrays in gradients.items():
        unit = jnp.max(jnp.stack([jnp.max(jnp.abs(x), initial=0.0) for x in arrays]))
        unit = jnp.where(unit > 0, unit, 1.0)  # the squares of small numbers would be zero without a unit
        size = norm(arrays)
        change = norm(tuple(other - x for other, x in zip(others[name], arrays, strict=True)))
        changes[name] = jnp.where(size > 0, change / jnp.where(size > 0, size, 1.0), 0.0)
    return changes


def _selected(condition: Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda x, y: lax.select(condition, x, y), new, old)
