"""DoRA's magnitudes of NNX layers, as an adapter on disk has them: one vector for each matrix of a stack."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from lora_one.backends.jax.placement import put, replicated
from lora_one.backends.jax.sites import Site
from lora_one.checkpoint.adapter import LoraLayer
from lora_one.checkpoint.tensors import STORED_NAMES, Tensor


def to_tensors(site: Site, m: Any) -> Sequence[Tensor | None]:
    """Return the magnitudes of each layer of a site's stack, (out,), from (stack..., out...); None without DoRA."""
    if m is None:
        return [None] * site.layout.count
    whole = np.asarray(put(m, replicated(site.sharding)))
    rows = whole.reshape(site.layout.count, site.layout.out_features)
    return [Tensor(row, STORED_NAMES[rows.dtype.name]) for row in rows]


def from_layers(site: Site, layers: Mapping[str, LoraLayer]) -> Array:
    """Return the inverse of `to_tensors` for an adapter with DoRA."""
    tensors = [layers[layer.name].magnitude for layer in site.layers()]
    rows = np.stack([tensor.array for tensor in tensors if tensor is not None])  # (n, out)
    return jnp.asarray(rows.reshape(site.layout.magnitude_shape))


def dora_problems(in_file: bool, in_model: Iterable[tuple[Site, Any, Any]], is_nnx: bool) -> list[str]:
    """Return where a folder has DoRA and the model has not, or the other way round.

    Args:
        in_file: whether the folder has DoRA.
        in_model: each site of the model's LoRA with its leaves and its magnitudes; None without DoRA.
        is_nnx: whether the model can have it.
    """
    if in_file and not is_nnx:
        return ["use_dora=True: on JAX, DoRA is for a flax.nnx.Module"]
    only = "only the file" if in_file else "only the model"
    return [f"{site.name}: {only} has DoRA's magnitudes here" for site, _, m in in_model if (m is not None) != in_file]
