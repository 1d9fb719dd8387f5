"""Models that are not NNX modules: Linen modules with their variables, and parameters in any pytree.

Both are values: `lora_one.init` returns a new one, whose `lora` is a pytree of its own that optax trains, and leaves
the caller's arrays as they are.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, struct
from jax import Array

from lora_one.backends.jax.layout import Layout
from lora_one.errors import ConfigError, ModelError

from .lifting import tracked
from .linen import PARAM, intercepted, with_factors

Lora = dict[str, dict[str, Array]]  # layer -> {"<param>_lora_a": ..., "<param>_lora_b": ...}


class LinenModel(struct.PyTreeNode):
    """A Linen module with its variables, called as one function; LoRA beside its Dense, DenseGeneral and Einsum layers.

    Its `loss_fn(model, batch)` calls `model(...)`, with the arguments of `module.apply` after the variables. To train:
    `jax.grad(lambda lora: loss_fn(model.replace(lora=lora), batch))(model.lora)`.

    Attributes:
        module: the flax.linen.Module.
        variables: as `module.init` returns them: {"params": ...} and other collections.
        lora: the factors, by layer; filled by `lora_one.init`.
        scaling: s in W x + s B A x.
    """

    module: linen.Module = struct.field(pytree_node=False)
    variables: Any
    lora: Lora = struct.field(default_factory=dict)
    scaling: float = struct.field(pytree_node=False, default=1.0)
    layouts: tuple[tuple[str, str, Layout], ...] = struct.field(pytree_node=False, default=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`module.apply(variables, ...)` with LoRA."""
        layouts = {name: layout for name, _, layout in self.layouts}
        variables = {**self.variables, "params": with_factors(self.variables["params"], self.lora, layouts)}
        with linen.intercept_methods(intercepted(self.scaling)):
            return self.module.apply(variables, *args, **kwargs)


class TrackedLinenModel(LinenModel):
    """A `LinenModel` without LoRA while its layers are looked at: see `lora_one.backends.jax.trees.linen.recording`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        variables = {**self.variables, "params": tracked(self.variables["params"], PARAM)}
        return self.module.apply(variables, *args, **kwargs)


class PytreeModel(struct.PyTreeNode):
    """Parameters in any pytree, an Equinox module included; LoRA by substitution: W becomes W + s B A.

    Its `loss_fn(params, batch)` gets the parameters, as `effective()` returns them. To train:
    `jax.grad(lambda lora: loss_fn(model.replace(lora=lora).effective(), batch))(model.lora)`. Substitution forms the
    gradient of each W on the way to its factors', so it takes the memory that full training takes.

    Attributes:
        params: the parameters.
        axes: what the axes of a weight are, by a regular expression that its whole path must match: a letter an axis,
            "i" for input, "o" for output, "s" for a stack of matrices. By default a leaf of two axes called "weight" is
            "oi" (Equinox), and one called "kernel" is "io" (Flax).
        lora: the factors, by path of the weight; filled by `lora_one.init`.
        scaling: s in W + s B A.
    """

    params: Any
    axes: Mapping[str, str] = struct.field(pytree_node=False, default_factory=dict)
    lora: Lora = struct.field(default_factory=dict)
    scaling: float = struct.field(pytree_node=False, default=1.0)
    layouts: tuple[tuple[str, str, Layout], ...] = struct.field(pytree_node=False, default=())

    def effective(self) -> Any:
        """`params` with W + s B A in the place of each W that has factors."""
        layouts = {name: (param, layout) for name, param, layout in self.layouts}

        def substituted(path: Any, leaf: Any) -> Any:
            name = dotted(path)
            if name not in self.lora:
                return leaf
            param, layout = layouts[name]
            delta = layout.product(self.lora[name][f"{param}_lora_a"], self.lora[name][f"{param}_lora_b"])
            return (leaf.astype(delta.dtype) + self.scaling * delta).astype(leaf.dtype)

        return jax.tree_util.tree_map_with_path(substituted, self.params)


def find_weights(model: PytreeModel) -> dict[str, tuple[str, Any, Layout]]:
    """The weights that LoRA can go to: path -> (last name, array, layout).

    Raises:
        ModelError: an entry of `axes` that does not fit.
        ConfigError: float64 arrays while JAX has x64 off, which would make them float32.
    """
    found, problems = {}, []
    tables = [dotted(path) for path, node in jax.tree_util.tree_leaves_with_path(model.params, is_leaf=_is_embedding)
              if _is_embedding(node)]  # fmt: skip
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.params):
        if not isinstance(leaf, (Array, np.ndarray)):
            continue
        name = dotted(path)
        if leaf.dtype == np.float64 and not jax.config.read("jax_enable_x64"):
            raise ConfigError(
                f"{name} is float64 but JAX's x64 is off, so that it would become float32: convert it, or "
                "jax.config.update('jax_enable_x64', True)"
            )
        last = name.rsplit(".", 1)[-1]
        axes = next((axes for pattern, axes in model.axes.items() if re.fullmatch(pattern, name)), None)
        if axes is None:
            if leaf.ndim != 2 or last not in ("kernel", "weight") or any(name.startswith(f"{t}.") for t in tables):
                continue
            axes = "io" if last == "kernel" else "oi"
        if len(axes) != leaf.ndim or set(axes) - set("ios") or not {"i", "o"} <= set(axes):
            problems.append(f"{name}: axes must be one of i, o, s for each of {leaf.shape}, got {axes!r}")
        elif not jnp.issubdtype(leaf.dtype, jnp.floating):
            problems.append(f"{name}: must be floating, got {leaf.dtype}")
        else:
            groups = [tuple(i for i, letter in enumerate(axes) if letter == group) for group in "sio"]
            found[name] = last, leaf, Layout(leaf.shape, *groups)
    if problems:
        raise ModelError("LoRA cannot be attached to these weights:\n  " + "\n  ".join(problems))
    return found


def merged(model: Any) -> Any:
    """The model with its factors in the weights, and no LoRA.

    Raises:
        ModelError: no LoRA in it.
    """
    if not model.lora:
        raise ModelError(
            f"merge needs a model with LoRA layers, as lora_one.init returns it, got {type(model).__name__}"
        )
    if isinstance(model, PytreeModel):
        return model.replace(params=model.effective(), lora={}, layouts=())
    layouts = {name: (param, layout) for name, param, layout in model.layouts}

    def summed(path: Any, leaf: Any) -> Any:
        name, _, last = dotted(path).rpartition(".")
        if name not in model.lora or last != layouts[name][0]:
            return leaf
        param, layout = layouts[name]
        delta = layout.product(model.lora[name][f"{param}_lora_a"], model.lora[name][f"{param}_lora_b"])
        return (leaf.astype(delta.dtype) + model.scaling * delta).astype(leaf.dtype)

    params = jax.tree_util.tree_map_with_path(summed, model.variables["params"])
    return model.replace(variables={**model.variables, "params": params}, lora={}, layouts=())


def dotted(path: Any) -> str:
    """A key path of jax.tree_util as one name."""
    parts = []
    for key in path:
        for attribute in ("key", "name", "idx"):
            if hasattr(key, attribute):
                parts.append(str(getattr(key, attribute)))
                break
    return ".".join(parts)


def _is_embedding(node: Any) -> bool:
    """Equinox's table of embeddings has two axes and is called "weight", and is no linear layer."""
    return type(node).__name__ == "Embedding" and type(node).__module__.split(".")[0] == "equinox"
