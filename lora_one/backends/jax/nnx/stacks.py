"""Whether an NNX stack is cut along its first axes, where the sizes of its kernel do not tell.

`nnx.vmap` and `nnx.scan` may cut a kernel along any axis, and cut its factors there too. A kernel of other sizes is
refused when LoRA is attached. One whose axes have one size is tried: the factors' gradient must be the kernel's.
"""

from collections.abc import Callable
from itertools import combinations
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_one.backends.jax.layout import Layout
from lora_one.backends.jax.sites import Leaves, Site
from lora_one.errors import ModelError

from .binding import NnxBinding

_RANKS = (3, 5, 7, 11, 13, 17, 19, 23)  # one that no axis of the kernel has, so that a wrong cut mostly fails at once
_TOLERANCE = 0.1  # what bfloat16 leaves of a gradient is closer; another cut's is not


def is_ambiguous(layout: Layout) -> bool:
    """Whether other axes than the first could be the stack, by their sizes."""
    count, shape = len(layout.stack), layout.shape
    if layout.stack != tuple(range(count)) or not count:
        return False
    axes = range(len(shape))
    others = (taken for taken in combinations(axes, count) if taken != layout.stack)
    return any(tuple(shape[i] for i in axes if i not in taken) == shape[count:] for taken in others)


def check_stacks(binding: NnxBinding, loss_fn: Callable[[Any, Any], Any], batch: Any) -> None:
    """Raises ModelError for a stack that the model cuts along another axis than the first."""
    for name, site in binding.sites.items():
        if not is_ambiguous(site.layout):
            continue
        cause = None
        try:
            agrees = _agrees(binding, loss_fn, batch, name, site)
        except (TypeError, ValueError) as error:  # shapes that do not fit each other
            agrees, cause = False, error
        if not agrees:
            raise ModelError(
                f"{name}: its kernel {site.layout.shape} must be stacked along axis 0, as (stack..., in..., out...), "
                "but the model cuts it along another: use nnx.vmap and nnx.scan with in_axes=0 and out_axes=0"
            ) from cause


def _agrees(binding: NnxBinding, loss_fn: Callable[[Any, Any], Any], batch: Any, name: str, site: Site) -> bool:
    layout = site.layout
    rank = next(rank for rank in _RANKS if rank not in layout.shape)
    a = jnp.asarray(np.random.default_rng(0).standard_normal(layout.a_shape(rank)), jnp.float32)
    others = binding.factors()

    def loss(b: Any, kernel: Any) -> Any:
        return binding.loss(loss_fn, binding.with_kernel(name, kernel), {**others, name: Leaves(a, b)}, batch)

    b = jnp.zeros(layout.b_shape(rank), jnp.float32)
    with jax.default_matmul_precision("highest"):
        of_b, of_kernel = jax.jit(jax.grad(loss, argnums=(0, 1)))(b, binding.kernel(name))
        matrices = jnp.transpose(of_kernel, layout.stack + layout.ins + layout.outs).astype(jnp.float32)
        matrices = matrices.reshape(layout.count, layout.in_features, layout.out_features)
        expected = jnp.swapaxes(a.reshape(layout.count, layout.in_features, rank), 1, 2) @ matrices
    off = jnp.linalg.norm(of_b.reshape(expected.shape) / site.native - expected)
    return not off > _TOLERANCE * jnp.linalg.norm(expected)
