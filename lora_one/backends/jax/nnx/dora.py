"""DoRA in NNX layers: a parameter more, the magnitudes m of the outputs, beside lora_a and lora_b.

y = (m / ||W + s B A||) (x W + s x a b) + bias, with the norm of each output's column of the kernel. As in PEFT and
mlx-lm, no gradient passes through the norm.
"""

from functools import partial
from typing import Any

import jax
from flax import nnx
from jax import Array

from lora_one.backends.jax.layout import Layout
from lora_one.backends.jax.ops import JaxOps
from lora_one.backends.jax.tap import Tap
from lora_one.core.dora import effective_weight, magnitudes

_OPS = JaxOps()


class DoraMagnitude(nnx.LoRAParam):
    """The magnitudes of a layer with DoRA, (stack..., out...). As an nnx.LoRAParam it is trained with the factors."""


@partial(jax.jit, static_argnums=0)
def magnitudes_of(layout: Layout, kernel: Array, a: Array, b: Array, scale: Any) -> Array:
    """Return the norms of W + s B A, (stack..., out...), in float32 or wider."""
    m = magnitudes(_OPS, layout.of_kernel(kernel), layout.stacked(a, b), scale)  # (n, out)
    return m.reshape(layout.magnitude_shape)


@partial(jax.jit, static_argnums=0)
def effective_kernel(layout: Layout, kernel: Array, a: Array, b: Array, scale: Any, m: Array) -> Array:
    """Return the kernel that a layer with DoRA computes with, rounded once to the kernel's dtype."""
    m = m.reshape(layout.count, layout.out_features)
    effective = effective_weight(_OPS, layout.of_kernel(kernel), layout.stacked(a, b), scale, m)  # (n, out, in)
    return layout.as_kernel(effective).astype(kernel.dtype)


def with_magnitudes(layer: Any, y: Array, layout: Layout) -> Array:
    """Return a layer's output with its magnitudes; the output itself without DoRA, or where a tap reads W's gradient.

    Args:
        layer: an `nnx.Linear` or `nnx.LinearGeneral` with LoRA.
        y: x W + s x a b + bias, (..., out...).
        layout: of its kernel, a single matrix.
    """
    m, a = getattr(layer, "kernel_lora_m", None), layer.kernel_lora_a[...]
    if m is None or isinstance(a, Tap):
        return y
    norms = magnitudes_of(layout, layer.kernel[...], a, layer.kernel_lora_b[...], layer.kernel_lora_scale)
    product = y if layer.bias is None else y - layer.bias[...].astype(y.dtype)
    return y + ((m[...] / jax.lax.stop_gradient(norms) - 1.0) * product).astype(y.dtype)
