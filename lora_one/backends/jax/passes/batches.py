"""Check batches and losses, and separate a batch's arrays from the rest of it."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lora_one.errors import BatchError


def check_loss(loss: Any, index: int) -> Array:
    """Return a user's traced loss as a scalar.

    Raises:
        BatchError: anything else: a loss with auxiliary output, a vector, an integer.
    """
    if isinstance(loss, (float, int, np.ndarray)) and not isinstance(loss, bool):
        raise BatchError(
            f"batch {index}: the loss must depend on the target layers, got a constant {type(loss).__name__}: is it "
            "computed outside of JAX?"
        )
    if not isinstance(loss, Array) or loss.size != 1:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Array) else type(loss).__name__
        raise BatchError(f"batch {index}: the loss must be a scalar array, got {got}: return the mean over the batch")
    if not jnp.issubdtype(loss.dtype, jnp.floating):
        raise BatchError(f"batch {index}: the loss must be floating, got {loss.dtype}")
    return loss.reshape(())


def arrays_and_rest(batch: Any) -> tuple[list[Any], Any]:
    """Separate the arrays of a batch from everything else in it.

    Returns:
        The arrays, which change from batch to batch; and the rest, hashable, for which a function is compiled.

    Raises:
        BatchError: a leaf that is neither an array nor hashable.
    """
    leaves, structure = jax.tree.flatten(batch)
    arrays = tuple(is_array(leaf) for leaf in leaves)
    others = tuple(None if array else leaf for leaf, array in zip(leaves, arrays, strict=True))
    try:
        hash(others)
    except TypeError as error:
        kinds = sorted({type(leaf).__name__ for leaf, array in zip(leaves, arrays, strict=True) if not array})
        raise BatchError(
            f"a batch must be a pytree of JAX or NumPy arrays, got leaves of type {', '.join(kinds)}: convert them"
        ) from error
    return [leaf for leaf, array in zip(leaves, arrays, strict=True) if array], (structure, arrays, others)


def rejoin(arrays: list[Any], rest: Any) -> Any:
    """Return the batch that `arrays_and_rest` separated."""
    structure, are_arrays, others = rest
    remaining = iter(arrays)
    leaves = [next(remaining) if array else other for array, other in zip(are_arrays, others, strict=True)]
    return jax.tree.unflatten(structure, leaves)


def is_array(leaf: Any) -> bool:
    """Return whether a leaf of a batch or of a model is data, not a setting."""
    return isinstance(leaf, (Array, np.ndarray, np.generic))


def fingerprint(batch: Any) -> str:
    """Return a text that is the same in all processes for one batch: of its shapes, and of the numbers on the host.

    An array of several processes is the same for all of them.
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        if is_array(leaf):
            digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}".encode())
            if not isinstance(leaf, Array) or leaf.is_fully_addressable:
                digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()
