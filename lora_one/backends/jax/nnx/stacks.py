"""Find the axes that an NNX stack is cut along where the sizes of its kernel do not show them.

`nnx.vmap` and `nnx.scan` may cut a kernel along any axis, and cut its factors along the same one. If the sizes leave
open which, as for a kernel whose axes have one size, the loss is differentiated: the gradient of a factor must be the
one that the kernel's gradient implies.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_one.backends.interface import LossFn
from lora_one.backends.jax.layout import Layout
from lora_one.backends.jax.sites import Leaves
from lora_one.errors import ModelError

from .binding import NnxBinding
from .inject import Lifts, linear_layers
from .layers import adapted_kind

# The first one that is no size of the kernel is taken: then a wrong cut mostly fails by its shapes already.
_TRIAL_RANKS = (3, 5, 7, 11, 13, 17, 19, 23)
_TOLERANCE = 0.1  # a gradient in bfloat16 is closer than this, and that of another cut is not


def ambiguous_stacks(binding: NnxBinding) -> dict[str, list[Layout]]:
    """Return the layouts that a stack's kernel may have, by site, where there are several."""
    several = {}
    for name, layer in linear_layers(binding.model).items():
        known = adapted_kind(layer)
        if known is not None and len(layouts := known[1].layouts(layer)) > 1:
            several[name] = layouts
    return several


def find_stacks(binding: NnxBinding, stacks: dict[str, list[Layout]], loss_fn: LossFn, batch: Any) -> dict[str, Lifts]:
    """Return the axes of the stacks that are not cut as the first of their possible layouts says.

    LoRA is taken out of the model for it: attach it again afterwards.

    Raises:
        ModelError: none of the layouts is that of the model.
    """
    binding.undo()
    chosen: dict[str, Lifts] = {}
    for name, layouts in stacks.items():
        for layout in layouts:
            if _is_cut_so(binding.alone(name, layout.lifts), loss_fn, batch, name):
                break
        else:
            raise ModelError(
                f"{name}: its kernel {layouts[0].shape} must be stacked along an axis that its factors have too: use "
                "nnx.vmap and nnx.scan with in_axes=0 and out_axes=0"
            )
        if layout != layouts[0]:
            chosen[name] = layout.lifts
    return chosen


def _is_cut_so(binding: NnxBinding, loss_fn: LossFn, batch: Any, name: str) -> bool:
    try:
        return _gradients_agree(binding, loss_fn, batch, name, binding.sites[name].layout)
    except (TypeError, ValueError):  # shapes that do not fit each other
        return False
    finally:
        binding.undo()


def _gradients_agree(binding: NnxBinding, loss_fn: LossFn, batch: Any, name: str, layout: Layout) -> bool:
    """Return whether dL/db = native * a^T dL/dW for b = 0, as it is if factors and kernel are cut alike."""
    rank = next(rank for rank in _TRIAL_RANKS if rank not in layout.shape)
    n, ins, outs, native = layout.count, layout.in_features, layout.out_features, binding.sites[name].native
    a = jnp.asarray(np.random.default_rng(0).standard_normal((n, ins, rank)), jnp.float32)
    zeros = jnp.zeros((n, rank, outs), jnp.float32)

    def loss(b: Any, kernel: Any) -> Any:
        factors = {name: Leaves(*layout.from_matrices(a, b))}
        return binding.loss(loss_fn, binding.with_kernel(name, kernel), factors, batch)

    with jax.default_matmul_precision("highest"):
        gradient_b, gradient_kernel = jax.jit(jax.grad(loss, argnums=(0, 1)))(zeros, binding.kernel(name))
        matrices = jnp.transpose(gradient_kernel, layout.stack + layout.ins + layout.outs).astype(jnp.float32)
        expected = jnp.swapaxes(a, 1, 2) @ matrices.reshape(n, ins, outs)
    difference = jnp.linalg.norm(gradient_b / native - expected)
    return not difference > _TOLERANCE * jnp.linalg.norm(expected)
