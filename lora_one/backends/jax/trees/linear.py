"""Find the linear layers of a Linen model or of a pytree of parameters."""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen
from flax.core import meta
from jax import Array

from lora_one.backends.interface import LossFn
from lora_one.backends.jax.layout import Layout
from lora_one.backends.jax.passes.batches import arrays_and_rest, rejoin
from lora_one.backends.jax.sites import dotted
from lora_one.errors import ConfigError, ModelError

from .linen import PARAM, recording
from .models import LinenModel, PytreeModel, TrackedLinenModel


class Weight(NamedTuple):
    """A weight that LoRA may go to."""

    param: str  # its last name
    array: Any
    layout: Layout | str  # or the reason why LoRA cannot go to it


Linear = dict[str, Weight]  # dotted path of the layer -> its weight


def find_layers(model: LinenModel | PytreeModel, batches: Iterable[Any] = (), loss_fn: LossFn | None = None) -> Linear:
    """Return every linear layer of a model, by path.

    Args:
        model: the model.
        batches: the batches of `init`, of which the first is read. A `PytreeModel` and a model that has LoRA do not
            need them: only a Linen layer that is called shows what its axes mean.
        loss_fn: the loss of `init`, which calls the layers.

    Raises:
        ModelError: the variables are boxed, or `PytreeModel.axes` does not fit.
    """
    if isinstance(model, PytreeModel):
        return _find_weights(model)
    kernels = kernels_of(model)
    if model.layouts:
        layouts = {weight.layer: weight.layout for weight in model.layouts}
        return {name: Weight(PARAM, kernel, layouts[name]) for name, kernel in kernels.items() if name in layouts}
    called = _called_layers(model, kernels, batches, loss_fn)
    return {name: Weight(PARAM, kernel, called[name]) for name, kernel in kernels.items() if name in called}


def kernels_of(model: LinenModel) -> dict[str, Any]:
    """Return the arrays called "kernel", by the path of their layer.

    Raises:
        ModelError: the variables are boxed.
    """
    leaves = jax.tree_util.tree_leaves_with_path(model.variables["params"], is_leaf=meta.is_axis_metadata)
    if any(meta.is_axis_metadata(leaf) for _, leaf in leaves):
        raise ModelError(
            "variables must hold arrays, got boxes with metadata (nn.with_partitioning): hand in "
            "LinenModel(module, flax.linen.meta.unbox(variables))"
        )
    named = ((dotted(path), leaf) for path, leaf in leaves)
    return {name.rpartition(".")[0]: leaf for name, leaf in named if name.rpartition(".")[2] == PARAM}


def _called_layers(
    model: LinenModel, kernels: dict[str, Any], batches: Iterable[Any], loss_fn: Any
) -> dict[str, Layout | str]:
    """Return the layout of each linear layer that the loss calls, or the reason why it cannot have LoRA."""
    layouts: dict[str, Layout] = {}
    problems: dict[str, str] = {}
    shapes = {name: tuple(kernel.shape) for name, kernel in kernels.items()}
    for batch in batches:
        arrays, rest = arrays_and_rest(batch)
        frozen, others = arrays_and_rest(TrackedLinenModel(model.module, model.variables))

        def run(frozen: Any, arrays: Any) -> Any:
            with linen.intercept_methods(recording(layouts, problems, shapes)):
                return loss_fn(rejoin(frozen, others), rejoin(arrays, rest))  # noqa: B023  (called at once)

        jax.eval_shape(run, frozen, arrays)
        break
    return {**layouts, **problems}


def _find_weights(model: PytreeModel) -> dict[str, Weight]:
    """Return the weights of a pytree that LoRA can go to, by path.

    Raises:
        ModelError: an entry of `axes` that does not fit.
        ConfigError: float64 arrays while JAX has x64 off, which would make them float32.
    """
    weights, problems = {}, []
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
        param = name.rsplit(".", 1)[-1]
        axes = next((axes for pattern, axes in model.axes.items() if re.fullmatch(pattern, name)), None)
        if axes is None:
            if leaf.ndim != 2 or param not in ("kernel", "weight") or any(name.startswith(f"{t}.") for t in tables):
                continue
            axes = "io" if param == "kernel" else "oi"
        if len(axes) != leaf.ndim or set(axes) - set("ios") or not {"i", "o"} <= set(axes):
            problems.append(f"{name}: axes must be one of i, o, s for each of {leaf.shape}, got {axes!r}")
        elif not jnp.issubdtype(leaf.dtype, jnp.floating):
            problems.append(f"{name}: must be floating, got {leaf.dtype}")
        else:
            groups = [tuple(i for i, letter in enumerate(axes) if letter == group) for group in "sio"]
            weights[name] = Weight(param, leaf, Layout(leaf.shape, *groups))
    if problems:
        raise ModelError("LoRA cannot be attached to these weights:\n  " + "\n  ".join(problems))
    return weights


def _is_embedding(node: Any) -> bool:
    """Return whether a node is Equinox's table of embeddings: its "weight" has two axes but is no linear layer."""
    return type(node).__name__ == "Embedding" and type(node).__module__.split(".")[0] == "equinox"
