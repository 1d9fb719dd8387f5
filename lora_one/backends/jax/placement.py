"""The places of arrays: on JAX's default device, on a named device, or sharded over a mesh."""

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jax import Array, lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec, Sharding


def full_spec(spec: Iterable[Any], ndim: int) -> tuple[Any, ...]:
    """Return a partition spec with one entry per axis: JAX leaves out the last entries where they are None."""
    entries = tuple(spec)
    return (*entries, *[None] * (ndim - len(entries)))


def kernel_sharding(kernel: Any) -> Sharding | None:
    """Return the sharding of an array, on a mesh with one entry per axis; None for JAX's default device.

    None is not the same as that device by name: the two compile differently.
    """
    if isinstance(kernel, jax.core.Tracer) or not _is_placed(kernel):
        return None
    if not isinstance(kernel.sharding, NamedSharding):
        return kernel.sharding
    return NamedSharding(kernel.sharding.mesh, PartitionSpec(*full_spec(kernel.sharding.spec, kernel.ndim)))


def replicated(sharding: Sharding | None) -> Sharding | None:
    """Return the sharding that puts a whole copy on each device of the given one."""
    return NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else sharding


def put(x: Any, sharding: Sharding | None) -> Any:
    """Return `x` with the given sharding; None leaves it where it is.

    Args:
        x: an array; every process must hand in the same where the sharding is of several processes.
        sharding: the place.
    """
    if sharding is None:
        return x
    if jax.process_count() == 1 or sharding.is_fully_addressable or not _is_on_host(x):
        return jax.device_put(x, sharding)
    host = np.asarray(x)  # device_put would send it to all other processes, to compare it
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def explicit_sharding(x: Array) -> NamedSharding | None:
    """Return the sharding of x as a type on a mesh with Explicit axes; None elsewhere: the compiler decides."""
    sharding = getattr(jax.typeof(x), "sharding", None)
    types = getattr(getattr(sharding, "mesh", None), "axis_types", None) or ()
    return sharding if AxisType.Explicit in types else None


def whole(x: Array, mesh: Any = None) -> Array:
    """Return an array with a whole copy on each device, inside of jit.

    Args:
        x: the array.
        mesh: where it is, if that is known; by default the mesh of `jax.set_mesh`. Without any, the compiler decides.
    """
    if explicit_sharding(x) is not None:
        return jax.sharding.reshard(x, PartitionSpec())
    current = jax.sharding.get_abstract_mesh()
    if not current.empty:
        auto = all(kind == AxisType.Auto for kind in current.axis_types)  # not inside of shard_map
        return lax.with_sharding_constraint(x, PartitionSpec()) if auto else x
    return x if mesh is None else lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec()))


def resharded(x: Array, like: Array) -> Array:
    """Return x, of the shape of another array, sharded as that is on a mesh with Explicit axes."""
    sharding = explicit_sharding(like)
    return x if sharding is None else jax.sharding.reshard(x, sharding)


def _is_on_host(x: Any) -> bool:
    """Return whether this process holds all of an array."""
    return isinstance(x, np.ndarray) or (not isinstance(x, jax.core.Tracer) and x.is_fully_addressable)


def _is_placed(kernel: Any) -> bool:
    """Return whether an array was put somewhere, or an abstract array says where it will be."""
    return (
        kernel.sharding is not None if isinstance(kernel, jax.ShapeDtypeStruct) else getattr(kernel, "committed", False)
    )
