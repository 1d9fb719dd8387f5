"""Check that an NNX stack is cut along its first axes where the sizes of its kernel do not show it.

`nnx.vmap` and `nnx.scan` may cut a kernel along any axis, and cut its factors along the same one. If the sizes show
another axis than the first, LoRA is refused when it is attached. If they leave it open, as for a kernel whose axes have
one size, the loss is differentiated once: the gradient of a factor must be the one that the kernel's gradient implies.
"""

from itertools import combinations
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_one.backends.interface import LossFn
from lora_one.backends.jax.layout import Layout
from lora_one.backends.jax.sites import Leaves, Site
from lora_one.errors import ModelError

from .binding import NnxBinding

# The first one that is no size of the kernel is taken: then a wrong cut mostly fails by its shapes already.
_TRIAL_RANKS = (3, 5, 7, 11, 13, 17, 19, 23)
_TOLERANCE = 0.1  # a gradient in bfloat16 is closer than this, and that of another cut is not


def is_ambiguous(layout: Layout) -> bool:
    """Return whether axes other than the first could be the stack, by their sizes."""
    count, shape = len(layout.stack), layout.shape
    if layout.stack != tuple(range(count)) or not count:
        return False
    axes = range(len(shape))
    others = (taken for taken in combinations(axes, count) if taken != layout.stack)
    return any(tuple(shape[i] for i in axes if i not in taken) == shape[count:] for taken in others)


def check_stacks(binding: NnxBinding, loss_fn: LossFn, batch: Any) -> None:
    """Raise ModelError for a stack that the model cuts along another axis than the first."""
    for name, site in binding.sites.items():
        if not is_ambiguous(site.layout):
            continue
        cause = None
        try:
            agrees = _gradients_agree(binding, loss_fn, batch, name, site)
        except (TypeError, ValueError) as error:  # shapes that do not fit each other
            agrees, cause = False, error
        if not agrees:
            raise ModelError(
                f"{name}: its kernel {site.layout.shape} must be stacked along axis 0, as (stack..., in..., out...), "
                "but the model cuts it along another: use nnx.vmap and nnx.scan with in_axes=0 and out_axes=0"
            ) from cause


def _gradients_agree(binding: NnxBinding, loss_fn: LossFn, batch: Any, name: str, site: Site) -> bool:
    """Return whether dL/db = native * a^T dL/dW for b = 0, as it is if factors and kernel are cut alike."""
    layout = site.layout
    rank = next(rank for rank in _TRIAL_RANKS if rank not in layout.shape)
    a = jnp.asarray(np.random.default_rng(0).standard_normal(layout.a_shape(rank)), jnp.float32)
    others = binding.factors()

    def loss(b: Any, kernel: Any) -> Any:
        return binding.loss(loss_fn, binding.with_kernel(name, kernel), {**others, name: Leaves(a, b)}, batch)

    b = jnp.zeros(layout.b_shape(rank), jnp.float32)
    with jax.default_matmul_precision("highest"):
        gradient_b, gradient_kernel = jax.jit(jax.grad(loss, argnums=(0, 1)))(b, binding.kernel(name))
        matrices = jnp.transpose(gradient_kernel, layout.stack + layout.ins + layout.outs).astype(jnp.float32)
        matrices = matrices.reshape(layout.count, layout.in_features, layout.out_features)
        expected = jnp.swapaxes(a.reshape(layout.count, layout.in_features, rank), 1, 2) @ matrices
    difference = jnp.linalg.norm(gradient_b.reshape(expected.shape) / site.native - expected)
    return not difference > _TOLERANCE * jnp.linalg.norm(expected)
