"""Models that are not NNX modules: Linen modules with their variables, and parameters in any pytree.

Both are values: `lora_one.init` returns a new one, whose `lora` is a separate pytree that optax trains, and leaves
the caller's arrays as they are.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from flax import linen, struct
from jax import Array

from lora_one.backends.jax.layout import Layout
from lora_one.backends.jax.sites import Leaves, dotted
from lora_one.backends.jax.tap import Tap
from lora_one.errors import ModelError

from .lifting import tracked
from .linen import PARAM, intercepted, with_factors
from .whole import by_path, whole_entries

# layer -> {"<param>_lora_a": ..., "<param>_lora_b": ...}; of a module that is trained whole its parameters by name
Lora = dict[str, dict[str, Array]]


class AdaptedWeight(NamedTuple):
    """A weight that has LoRA factors."""

    layer: str  # dotted path; of a `PytreeModel`, that of the weight itself
    param: str  # the weight's last name
    layout: Layout

    @property
    def path(self) -> str:
        """The dotted path of the weight in a Linen model's parameters."""
        return f"{self.layer}.{self.param}"

    def to_lora(self, leaves: Leaves) -> dict[str, Any]:
        """Return the factors as an entry of a model's `lora`."""
        return {f"{self.param}_lora_a": leaves.a, f"{self.param}_lora_b": leaves.b}

    def leaves(self, lora: Lora) -> Leaves:
        """Return this weight's factors from a model's `lora`."""
        factors = lora[self.layer]
        return Leaves(factors[f"{self.param}_lora_a"], factors[f"{self.param}_lora_b"])


class LinenModel(struct.PyTreeNode):
    """A Linen module with its variables, for `lora_one.init` and the other functions of `lora_one`.

    Use it where a model is a `flax.linen.Module`. LoRA goes beside its Dense, DenseGeneral and Einsum layers, those
    under `nn.scan` and `nn.vmap` included. The `loss_fn(model, batch)` given to `init` calls `model(...)`, with the
    arguments of `module.apply` after the variables. The model is a value: `init` returns a new one.

    Args:
        module: the `flax.linen.Module`.
        variables: what `module.init` returns: {"params": ...} and other collections.
        lora: the factors by layer, which you train; filled by `lora_one.init`, empty by default.
        scaling: s in W x + s B A x, a number; set by `lora_one.init`.
        layouts: the weights that have factors; set by `lora_one.init`.
        dropout: rate of LoRA's dropout, in calls with `rngs={"dropout": key}`; set by `lora_one.init`.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from flax import linen
        >>> import lora_one
        >>> from lora_one.backends.jax import LinenModel
        >>> module, x = linen.Dense(3), jnp.ones((2, 4))
        >>> net = linen.Sequential([module])
        >>> def loss_fn(model, batch):
        ...     return jnp.mean(model(batch) ** 2)
        >>> model = LinenModel(net, net.init(jax.random.key(0), x))
        >>> model, report = lora_one.init(model, [x], loss_fn, lora_one.Config(rank=1))
        >>> gradients = jax.grad(lambda lora: loss_fn(model.replace(lora=lora), x))(model.lora)
        >>> {name: factor.shape for name, factor in gradients["layers_0"].items()}
        {'kernel_lora_a': (4, 1), 'kernel_lora_b': (1, 3)}
    """

    module: linen.Module = struct.field(pytree_node=False)
    variables: Any
    lora: Lora = struct.field(default_factory=dict)
    scaling: float = struct.field(pytree_node=False, default=1.0)
    layouts: tuple[AdaptedWeight, ...] = struct.field(pytree_node=False, default=())
    dropout: float = struct.field(pytree_node=False, default=0.0)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return `module.apply(variables, ...)` with LoRA.

        With `rngs={"dropout": key}`, dropout acts on the input of each lora_a. Without, it is off.
        """
        variables = {**self.variables, "params": with_factors(self.variables["params"], self.lora)}
        rngs = kwargs.get("rngs")
        training = "dropout" in rngs if isinstance(rngs, Mapping) else rngs is not None  # one key is for all streams
        with linen.intercept_methods(intercepted(self.scaling, self.dropout if training else 0.0)):
            return self.module.apply(variables, *args, **kwargs)


class TrackedLinenModel(LinenModel):
    """A `LinenModel` without LoRA whose kernels are tracked on the way to their layers: see `linen.recording`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        variables = {**self.variables, "params": tracked(self.variables["params"], PARAM)}
        return self.module.apply(variables, *args, **kwargs)


class PytreeModel(struct.PyTreeNode):
    """Parameters in any pytree, an Equinox module included, for the functions of `lora_one`.

    Use it where a model is a pure function of its parameters. LoRA works by substitution: W becomes W + s B A. The
    `loss_fn(params, batch)` given to `init` gets the parameters, as `effective()` returns them. This takes as much
    memory as full training, since the gradient of each W comes before its factors'. The model is a value: `init`
    returns a new one.

    Args:
        params: the parameters.
        axes: the meaning of a weight's axes, by a regular expression that its whole path must match. One letter per
            axis: "i" for input, "o" for output, "s" for a stack of matrices. By default a leaf with two axes called
            "weight" is "oi" (Equinox), and one called "kernel" is "io" (Flax).
        lora: the factors by path of the weight, which you train; filled by `lora_one.init`, empty by default.
        scaling: s in W + s B A, a number; set by `lora_one.init`.
        layouts: the weights that have factors; set by `lora_one.init`.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import lora_one
        >>> from lora_one.backends.jax import PytreeModel
        >>> def loss_fn(params, batch):
        ...     return jnp.mean((batch @ params["head"]["kernel"]) ** 2)
        >>> x = jnp.ones((2, 4))
        >>> model = PytreeModel({"head": {"kernel": jnp.eye(4, 3)}})
        >>> model, report = lora_one.init(model, [x], loss_fn, lora_one.Config(rank=1))
        >>> gradients = jax.grad(lambda lora: loss_fn(model.replace(lora=lora).effective(), x))(model.lora)
        >>> {name: factor.shape for name, factor in gradients["head.kernel"].items()}
        {'kernel_lora_a': (4, 1), 'kernel_lora_b': (1, 3)}
    """

    params: Any
    axes: Mapping[str, str] = struct.field(pytree_node=False, default_factory=dict)
    lora: Lora = struct.field(default_factory=dict)
    scaling: float = struct.field(pytree_node=False, default=1.0)
    layouts: tuple[AdaptedWeight, ...] = struct.field(pytree_node=False, default=())

    def effective(self) -> Any:
        """Return `params` with W + s B A instead of each W that has factors."""
        weights = {weight.layer: weight for weight in self.layouts if weight.layer in self.lora}
        return with_added(self.params, self.lora, weights, self.scaling)


def with_added(params: Any, lora: Lora, weights: Mapping[str, AdaptedWeight], scaling: float) -> Any:
    """Return a tree of parameters with s B A added to each weight that has factors, and with those trained whole.

    Args:
        params: the tree.
        lora: the factors.
        weights: dotted path in the tree -> the weight there that has factors.
        scaling: s.
    """

    whole = by_path(whole_entries(lora, (weight.layer for weight in weights.values())))

    def added(path: Any, leaf: Any) -> Any:
        weight = weights.get(dotted(path))
        if weight is None:
            return whole.get(dotted(path), leaf)
        a, b = weight.leaves(lora)
        return weight.layout.watched(leaf, a) if isinstance(a, Tap) else weight.layout.added(leaf, a, b, scaling)

    return jax.tree_util.tree_map_with_path(added, params)


def merged(model: LinenModel | PytreeModel) -> LinenModel | PytreeModel:
    """Return the model with its factors added to the weights, and without LoRA.

    Raises:
        ModelError: no LoRA in it.
    """
    if not model.lora:
        raise ModelError(
            f"merge needs a model with LoRA layers, as lora_one.init returns it, got {type(model).__name__}"
        )
    if isinstance(model, PytreeModel):
        return model.replace(params=model.effective(), lora={}, layouts=())
    weights = {weight.path: weight for weight in model.layouts if weight.layer in model.lora}
    params = with_added(model.variables["params"], model.lora, weights, model.scaling)
    return model.replace(variables={**model.variables, "params": params}, lora={}, layouts=())
