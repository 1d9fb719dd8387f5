"""Find the axes of a Linen kernel that `nn.scan` and `nn.vmap` take away before its layer sees it.

flax's metadata interface tells them: where several axes have one size, the sizes do not.
"""

from typing import Any

import jax
from flax import struct
from flax.core import meta


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
