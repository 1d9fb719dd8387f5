"""A tap: it stands where lora_a stands, and the backward pass through its layer renews the layer's running SVD.

The layer's product becomes the identity y -> y, whose backward rule folds dy and x into the state. JAX returns the
renewed state as the "cotangent" of the old one, so jit, remat and the sites need to know nothing of it. Cotangents of
several calls are summed, which means nothing for a state: `calls`, whose cotangent is the number of calls, shows it.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.xla_metadata import set_xla_metadata
from jax.tree_util import register_dataclass

from lora_one.core.fold import FoldState, fold
from lora_one.core.gradient import RowProduct
from lora_one.core.ops import as_one_program

from .ops import JaxOps

FOLDED = "folded by lora_one"  # the name that a renewed state has in a jaxpr

_OPS = JaxOps()


@register_dataclass
@dataclass(frozen=True)
class Tap:
    """A layer's running SVD during a fold pass. As a gradient, it holds the renewed one.

    Attributes:
        state: of one layer, without a leading axis.
        scale: what the loss is multiplied by, ().
        calls: 0, (); as a gradient, the number of times that the state was renewed.
    """

    state: FoldState
    scale: Array
    calls: Array

    def __getitem__(self, index: Any) -> "Tap":
        """Return the tap itself: layers read their variables by `[...]`."""
        return self

    def watch(self, y: Array, x: Array) -> Array:
        """Return y. The backward pass renews the state by the rows of both.

        Args:
            y: the output of the layer; its last axes are the output features.
            x: the input; its last axes are the input features, and the others are those of y.
        """
        rows = x.reshape(-1, self.state.v.shape[-2])  # (T, in)
        return _watched(y.reshape(-1, self.state.u.shape[-2]), rows, self).reshape(y.shape)

    def watch_weight(self, weight: Array) -> Array:
        """Return a weight, (out, in). The backward pass renews the state by the gradient of all its uses."""
        return _watched(weight, None, self)


def open_tap(state: FoldState, scale: Array) -> Tap:
    """Return the tap of a layer for one batch."""
    return Tap(state, scale, jnp.zeros((), jnp.float32))


@jax.custom_vjp
def _watched(y: Array, x: Array | None, tap: Tap) -> Array:
    return y


def _forward(y: Array, x: Array | None, tap: Tap) -> tuple[Array, Any]:
    return y, (x, tap)


def _backward(residuals: Any, dy: Array) -> tuple[Array, None, Tap]:
    x, tap = residuals
    dtype = tap.state.s.dtype
    wide = dy.astype(dtype) / tap.scale.astype(dtype)
    gradient = wide if x is None else RowProduct(wide, x.astype(dtype))
    with _compiled_once_per_shape():
        state = as_one_program(_OPS, fold)(tap.state, gradient)
    renewed = jax.tree.map(lambda array: checkpoint_name(array, FOLDED), state)
    return dy, None, Tap(renewed, jnp.zeros_like(tap.scale), jnp.ones_like(tap.calls))


def _compiled_once_per_shape() -> AbstractContextManager[Any]:
    """Return a context in which XLA keeps functions apart on a CPU: inlined, each layer's would be compiled anew."""
    return set_xla_metadata(inlineable="false") if jax.default_backend() == "cpu" else nullcontext()


_watched.defvjp(_forward, _backward)
