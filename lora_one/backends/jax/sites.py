"""The places of LoRA in a JAX model, the same for every kind of model."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from lora_one.backends.interface import Layer, LossFn
from lora_one.core.factors import Factors
from lora_one.errors import ModelError

from .layout import Layout
from .placement import put, replicated


class Leaves(NamedTuple):
    """The two factor arrays of a site in Flax's orientation, or one value for each of them."""

    a: Any  # (stack..., in..., r)
    b: Any  # (stack..., r, out...)


@dataclass(frozen=True)
class Site:
    """A kernel with LoRA factors: one layer of the spec for each matrix in it.

    Attributes:
        name: dotted path of the layer.
        layout: the meaning of the kernel's axes.
        rank: r.
        scaling: s of the spec.
        native: the layer itself multiplies x a b by this number; scaling / native is folded into lora_b.
        width: the number of columns that the factors of this layer must have; None if any number works.
        dtype: dtype of the factors.
        sharding: sharding of the kernel, see `kernel_sharding`.
    """

    name: str
    layout: Layout
    rank: int
    scaling: float
    native: float
    width: int | None
    dtype: Any
    sharding: Sharding | None

    def layers(self) -> list[Layer]:
        """Return the layers of the spec, in the order of the stack."""
        n, layout = self.layout.count, self.layout
        names = [f"{self.name}.{i}" for i in range(n)] if layout.stack else [self.name]
        module = self.name if layout.stack else ""
        return [Layer(name, layout.out_features, layout.in_features, self.rank, self.scaling, module) for name in names]

    def shardings(self) -> Leaves:
        """Return the shardings of the factors: lora_a's follows the kernel's input axes, lora_b's the output axes."""
        if not isinstance(self.sharding, NamedSharding):
            return Leaves(self.sharding, self.sharding)
        mesh, spec = self.sharding.mesh, tuple(self.sharding.spec)
        return Leaves(
            NamedSharding(mesh, PartitionSpec(*self.layout.a_spec(spec))),
            NamedSharding(mesh, PartitionSpec(*self.layout.b_spec(spec))),
        )

    def place(self, leaves: Leaves) -> Leaves:
        """Return the factors with their own shardings."""
        return Leaves(*(put(x, sharding) for x, sharding in zip(leaves, self.shardings(), strict=True)))

    def whole(self, leaves: Leaves) -> Leaves:
        """Return factors, or their gradients, complete on each device: they are thin, and QR needs whole columns."""
        return Leaves(*(put(x, replicated(self.sharding)) for x in leaves))

    def trained(self, pairs: list[Factors]) -> Leaves:
        """Return the arrays to train from the spec's pairs, one per matrix."""
        a, b = self.layout.leaves(pairs)
        # In one multiplication after the last rounding: a layer with native == scaling gets exactly B.
        b = b if self.scaling == self.native else b * (self.scaling / self.native)
        return self.place(Leaves(a.astype(self.dtype), b.astype(self.dtype)))

    def spec_pairs(self, leaves: Leaves) -> list[Factors]:
        """Return pairs for which scaling * B A is what the layer adds: the inverse of `trained`."""
        pairs = self.layout.pairs(*self.whole(leaves))
        if self.scaling == self.native:
            return pairs
        return [Factors(pair.lora_A, pair.lora_B * (self.native / self.scaling)) for pair in pairs]


class Binding(Protocol):
    """A model with LoRA in it, whose frozen arrays and factors can be exchanged separately."""

    model: Any  # what `init` returns
    sites: dict[str, Site]
    attached: bool  # True if we attached LoRA, False if the model came with it

    @property
    def frozen(self) -> Any:
        """A pytree: all arrays of the model except the factors."""
        ...

    def weight_names(self) -> tuple[list[str | None], set[str]]:
        """Return a name per leaf of `frozen`, None where it is no weight matrix; and the names that have LoRA."""
        ...

    def loss(self, loss_fn: LossFn, frozen: Any, factors: dict[str, Leaves], batch: Any) -> Any:
        """Return the user's loss with these arrays in the model. Pure and traceable."""
        ...

    def factors(self) -> dict[str, Leaves]:
        """Return the factors that are in the model now."""
        ...

    def write(self, site: str, leaves: Leaves) -> None:
        """Put factors into the model."""
        ...

    def finish(self) -> None:
        """Restore what was changed for the passes only (train/eval mode)."""
        ...

    def undo(self) -> None:
        """Restore the model to the state in which it was given."""
        ...


def check_concrete(what: str, arrays: Any, traced: bool = False) -> None:
    """Raise ModelError for weights that are only shapes, and for traced ones unless `traced` allows them."""
    for leaf in jax.tree.leaves(arrays):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise ModelError(
                f"{what} needs the model's weights, got shapes alone (nnx.eval_shape): load the weights first, or hand "
                "in a model that has them"
            )
        if isinstance(leaf, jax.core.Tracer) and not traced:
            raise ModelError(f"{what} needs the model's weights and cannot be traced: call it outside of jit")


def factor_dtype(kernel: Array) -> Any:
    """Return the dtype to train factors in: float32 or wider, as in PEFT and mlx-lm.

    A bfloat16 number has 8 significant bits: rounding would swallow the updates of a small learning rate.
    """
    return jnp.float64 if kernel.dtype == jnp.float64 else jnp.float32


def is_matrix(leaf: Any) -> bool:
    """Return whether an array may be a linear map's weight: at least two axes, floating or quantised to a byte."""
    byte = jnp.issubdtype(leaf.dtype, jnp.integer) and leaf.dtype.itemsize == 1
    return leaf.ndim >= 2 and (byte or jnp.issubdtype(leaf.dtype, jnp.floating))


def key_names(path: Iterable[Any]) -> tuple[str, ...]:
    """Return the keys of a path as strings, for paths of `jax.tree_util` and of `nnx` alike."""
    return tuple(_key_name(key) for key in path)


def dotted(path: Iterable[Any]) -> str:
    """Return a path as one name, its keys joined by dots."""
    return ".".join(key_names(path))


def _key_name(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
