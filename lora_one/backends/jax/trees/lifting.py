"""Find the axes of a Linen kernel that `nn.scan` and `nn.vmap` take away before its layer sees it.

flax's metadata interface tells them: where several axes have one size, the sizes do not.
"""

from typing import Any

import jax
from flax import struct
from flax.core import meta

from lora_one.backends.jax.layout import Layout


class Tracked(struct.PyTreeNode, meta.AxisMetadata[Any]):
    """A kernel on the way to its layer.

    Attributes:
        value: the kernel.
        lifts: the axes taken from it so far, outermost first. Each is an index, perhaps negative, into the axes that
            were left, as the transformation was told it.
    """

    value: Any
    lifts: tuple[int, ...] = struct.field(pytree_node=False, default=())

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> "Tracked":
        return self.replace(value=val)

    def remove_axis(self, index: int, params: dict[Any, Any]) -> "Tracked":
        return self.replace(lifts=(*self.lifts, index))

    def add_axis(self, index: int, params: dict[Any, Any]) -> "Tracked":
        return self.replace(lifts=self.lifts[:-1])


def tracked(params: Any, last: str) -> Any:
    """Return a tree of parameters in which every leaf called `last` is tracked."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: Tracked(leaf) if getattr(path[-1], "key", None) == last else leaf, params
    )


def lifted(inner: Layout, shape: tuple[int, ...], lifts: tuple[int, ...]) -> Layout:
    """Return the layout of a kernel as it is stored.

    Args:
        inner: layout of the kernel as its layer sees it.
        shape: shape in which it is stored.
        lifts: see `Tracked`.

    Raises:
        ValueError: the kernel or its factors cannot be cut as the transformations cut them.
    """
    left, taken = list(range(len(shape))), []
    for axis in lifts:
        taken.append(left.pop(axis))
    if tuple(shape[axis] for axis in left) != inner.shape:
        raise ValueError(f"its kernel is stored as {shape} and called as {inner.shape}: nn.map_variables is not known")
    for depth, axis in enumerate(reversed(lifts)):
        for ndim in (len(inner.a_shape(1)) + depth, len(inner.b_shape(1)) + depth):
            if not -ndim - 1 <= axis <= ndim:
                raise ValueError(
                    f"its kernel {shape} is stacked along axis {axis}, which its factors, of {ndim} axes here, do "
                    "not have: stack along axis 0"
                )
    stack, ins, outs = (tuple(left[axis] for axis in group) for group in (inner.stack, inner.ins, inner.outs))
    return Layout(shape, (*taken, *stack), ins, outs, lifts)
