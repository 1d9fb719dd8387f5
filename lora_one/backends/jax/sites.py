"""Where LoRA sits in a JAX model, whatever kind of model that is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from lora_one.backends.interface import Layer
from lora_one.core.factors import Factors
from lora_one.errors import ModelError

from .layout import Layout


class Leaves(NamedTuple):
    """The two factor arrays of a site, in Flax's orientation, or something about each of them."""

    a: Any  # (stack..., in..., r)
    b: Any  # (stack..., r, out...)


@dataclass(frozen=True)
class Site:
    """A kernel with LoRA factors: one layer of the spec for each matrix in it.

    Attributes:
        name: path of the layer, dotted.
        layout: of the kernel.
        rank: r.
        scaling: s of the spec.
        native: what the layer itself multiplies x a b by; the rest of `scaling` is folded into lora_b.
        width: columns that a probe of this layer must have, where the layer fixes them; None if any number goes.
        dtype: of the factors.
        sharding: of the kernel, see `kernel_sharding`.
        stored: the factors in the shapes that the layer keeps them in, where these are not those of `Layout`.
    """

    name: str
    layout: Layout
    rank: int
    scaling: float
    native: float
    width: int | None
    dtype: Any
    sharding: Sharding | None
    stored: Callable[[Leaves], Leaves] | None = None

    def layers(self) -> list[Layer]:
        """What the spec sees, in the order of the stack."""
        n, layout = self.layout.count, self.layout
        names = [f"{self.name}.{i}" for i in range(n)] if layout.stack else [self.name]
        return [Layer(name, layout.out_features, layout.in_features, self.rank, self.scaling) for name in names]

    def shardings(self) -> Leaves:
        """Where the factors belong: lora_a with the kernel's input axes, lora_b with its output axes. Or None, None."""
        if not isinstance(self.sharding, NamedSharding):
            return Leaves(self.sharding, self.sharding)
        mesh, spec = self.sharding.mesh, tuple(self.sharding.spec)
        return Leaves(
            NamedSharding(mesh, PartitionSpec(*self.layout.a_spec(spec))),
            NamedSharding(mesh, PartitionSpec(*self.layout.b_spec(spec))),
        )

    def place(self, leaves: Leaves) -> Leaves:
        """The factors where they belong, in the shapes that the layer keeps them in."""
        placed = Leaves(*(_put(x, where) for x, where in zip(leaves, self.shardings(), strict=True)))
        return placed if self.stored is None else self.stored(placed)

    def whole(self, leaves: Leaves) -> Leaves:
        """The factors, or their gradients, in full on each device: they are thin, and QR needs whole columns."""
        everywhere = replicated(self.sharding)
        return Leaves(*(_put(x, everywhere) for x in leaves))

    def trained(self, pairs: list[Factors]) -> Leaves:
        """The arrays to train, from one pair of the spec a matrix."""
        a, b = self.layout.leaves(pairs)
        # In one multiplication after the last rounding: a layer with native == scaling gets exactly B.
        b = b if self.scaling == self.native else b * (self.scaling / self.native)
        return self.place(Leaves(a.astype(self.dtype), b.astype(self.dtype)))

    def spec_pairs(self, leaves: Leaves) -> list[Factors]:
        """The inverse of `trained`: pairs for which scaling * B A is what the layer adds."""
        pairs = self.layout.pairs(*self.whole(leaves))
        if self.scaling == self.native:
            return pairs
        return [Factors(pair.lora_A, pair.lora_B * (self.native / self.scaling)) for pair in pairs]


class Binding(Protocol):
    """One kind of model with LoRA in it. Its frozen arrays and its factors are handed around apart from each other."""

    model: Any  # what `init` returns
    sites: dict[str, Site]
    frozen: Any  # pytree: all arrays of the model but the factors
    attached: bool  # whether LoRA is new here, and was not found in the model

    def weight_names(self) -> tuple[list[str | None], set[str]]:
        """(the path of each leaf of `frozen`, or None if it is no parameter of two axes; those that have LoRA)."""
        ...

    def loss(self, loss_fn: Callable[[Any, Any], Any], frozen: Any, factors: dict[str, Leaves], batch: Any) -> Any:
        """The user's loss with these arrays in the model. Pure and traceable."""
        ...

    def factors(self) -> dict[str, Leaves]:
        """The factors that are in the model now."""
        ...

    def write(self, site: str, leaves: Leaves) -> None:
        """Put factors into the model."""
        ...

    def finish(self) -> None:
        """Restore what was changed for the passes only (train/eval mode)."""
        ...

    def undo(self) -> None:
        """Restore the model as it was found."""
        ...


def kernel_sharding(kernel: Any) -> Sharding | None:
    """Where an array was put, with one entry an axis if that is a mesh; None where JAX's default device is meant.

    None matters: arrays put on a device by name and arrays that are there by default compile differently.
    """
    if isinstance(kernel, jax.core.Tracer) or not _placed(kernel):
        return None
    if not isinstance(kernel.sharding, NamedSharding):
        return kernel.sharding
    spec = (*kernel.sharding.spec, *[None] * (kernel.ndim - len(kernel.sharding.spec)))
    return NamedSharding(kernel.sharding.mesh, PartitionSpec(*spec))


def _placed(kernel: Any) -> bool:
    """Whether an array was put somewhere, or an abstract one says where it will be."""
    return (
        kernel.sharding is not None if isinstance(kernel, jax.ShapeDtypeStruct) else getattr(kernel, "committed", False)
    )


def check_concrete(what: str, arrays: Any, traced: bool = False) -> None:
    """Raises ModelError for weights that are shapes alone, and while tracing too unless that is fine."""
    for leaf in jax.tree.leaves(arrays):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise ModelError(
                f"{what} needs the model's weights, got shapes alone (nnx.eval_shape): load the weights first, or hand "
                "in a model that has them"
            )
        if isinstance(leaf, jax.core.Tracer) and not traced:
            raise ModelError(f"{what} needs the model's weights and cannot be traced: call it outside of jit")


def replicated(sharding: Sharding | None) -> Sharding | None:
    """A whole copy on each device of a sharding."""
    return NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else sharding


def _put(x: Array, where: Sharding | None) -> Array:
    return x if where is None else jax.device_put(x, where)


def factor_dtype(kernel: Any) -> Any:
    """The dtype to train factors in: float32 or wider, as PEFT and mlx-lm do it.

    In bfloat16 an entry keeps 8 bits, and the updates of a small learning rate are lost in rounding.
    """
    return jnp.float64 if kernel.dtype == jnp.float64 else jnp.float32


def is_matrix(leaf: Any) -> bool:
    """Whether an array may be a weight of a linear map: two axes or more, floating, or quantised to a byte."""
    byte = jnp.issubdtype(leaf.dtype, jnp.integer) and leaf.dtype.itemsize == 1
    return leaf.ndim >= 2 and (byte or jnp.issubdtype(leaf.dtype, jnp.floating))
