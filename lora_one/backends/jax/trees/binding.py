"""`lora_one.init` on Linen modules and on pytrees of parameters."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen
from flax.core import meta

from lora_one.backends.jax.layout import Layout
from lora_one.backends.jax.passes.batches import arrays_and_rest, is_array, rejoin
from lora_one.backends.jax.sites import Leaves, Site, factor_dtype, is_matrix, kernel_sharding
from lora_one.backends.targets import select
from lora_one.config import Config
from lora_one.errors import BatchError, ConfigError, ModelError

from .linen import PARAM, recording
from .models import LinenModel, PytreeModel, TrackedLinenModel, dotted, find_weights


class TreeBinding:
    """See `lora_one.backends.jax.sites.Binding`."""

    def __init__(self, model: LinenModel | PytreeModel, config: Config, batches: Iterable[Any], loss_fn: Any):
        if config.dropout:
            raise ConfigError(
                f"dropout must be 0 on JAX models, got {config.dropout}: its LoRA layers carry no random stream"
            )
        self.model: Any = model
        linear = find_layers(model, batches, loss_fn)
        if model.lora:
            wrong = [name for name, f in model.lora.items() if _rank(f) != config.rank != Config().rank]
            if wrong or config.targets != Config().targets:
                raise ModelError(
                    "the model's LoRA keeps its own rank and targets, but the Config asks for others: leave them out "
                    f"of the Config, or hand in the model without LoRA ({', '.join(wrong) or config.targets})"
                )
            chosen = {name: (_rank(factors), model.scaling) for name, factors in model.lora.items()}
        else:
            chosen = {name: (config.rank, config.scaling) for name in select(config.targets, linear)}
        self._params = {name: linear[name][0] for name in chosen}
        self.sites = tree_sites(linear, chosen)
        layouts = tuple((name, self._params[name], site.layout) for name, site in self.sites.items())
        scaling = next(iter(chosen.values()))[1]
        # The frozen arrays, apart from what else is in the tree: Equinox modules hold functions.
        self.frozen, rest = arrays_and_rest(model.replace(lora={}, scaling=scaling, layouts=layouts))
        self.attached = not model.lora
        self._rebuild = lambda arrays: rejoin(arrays, rest)
        self._written: dict[str, Leaves] = {}

    def weight_names(self) -> tuple[list[str | None], set[str]]:
        linen = isinstance(self.model, LinenModel)
        within = "variables.params." if linen else "params."
        names: list[str | None] = []
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.model.replace(lora={})):
            if is_array(leaf):
                name = dotted(path)
                names.append(name.removeprefix(within) if name.startswith(within) and is_matrix(leaf) else None)
        return names, {f"{name}.{self._params[name]}" if linen else name for name in self.sites}

    def loss(self, loss_fn: Callable[[Any, Any], Any], frozen: Any, factors: dict[str, Leaves], batch: Any) -> Any:
        model = self._rebuild(frozen).replace(lora=self._lora(factors))
        return loss_fn(model.effective() if isinstance(model, PytreeModel) else model, batch)

    def factors(self) -> dict[str, Leaves]:
        return dict(self._written)

    def write(self, site: str, leaves: Leaves) -> None:
        self._written[site] = leaves

    def finish(self) -> None:
        layouts = tuple((name, self._params[name], site.layout) for name, site in self.sites.items())
        scaling = next(iter(self.sites.values())).scaling
        self.model = self.model.replace(lora=self._lora(self._written), scaling=scaling, layouts=layouts)

    def undo(self) -> None:
        """Nothing was changed."""

    def _lora(self, factors: dict[str, Leaves]) -> dict[str, dict[str, Any]]:
        return {
            name: {f"{self._params[name]}_lora_a": leaves.a, f"{self._params[name]}_lora_b": leaves.b}
            for name, leaves in factors.items()
        }


def _rank(factors: dict[str, Any]) -> int:
    return next(value.shape[-1] for name, value in factors.items() if name.endswith("_lora_a"))


Linear = dict[str, tuple[str, Any, Layout | str]]


def tree_sites(linear: Linear, chosen: dict[str, tuple[int, float]]) -> dict[str, Site]:
    """The sites of the chosen layers.

    Args:
        linear: as `find_layers` gives them.
        chosen: name -> (rank, scaling).

    Raises:
        ModelError: a layer that LoRA cannot go to, with the reason.
    """
    sites = {}
    for name, (rank, scaling) in chosen.items():
        param, kernel, layout = linear[name]
        if isinstance(layout, str):
            raise ModelError(f"LoRA cannot be attached to {name}: {layout}")
        if not jnp.issubdtype(kernel.dtype, jnp.floating):
            raise ModelError(f"LoRA cannot be attached to {name}: its {param} must be floating, got {kernel.dtype}")
        sites[name] = Site(name, layout, rank, scaling, scaling, None, factor_dtype(kernel), kernel_sharding(kernel))
    return sites


def find_layers(model: Any, batches: Iterable[Any], loss_fn: Any) -> Linear:
    """name -> (parameter, array, layout, or why it has none) of every linear layer.

    Args:
        batches, loss_fn: of `init`; what a Linen model's layers are is seen when its loss calls them. Not needed for
            one that has LoRA, nor for a `PytreeModel`.
    """
    if isinstance(model, PytreeModel):
        return dict(find_weights(model))
    if model.layouts:
        known = {name: layout for name, _, layout in model.layouts}
        return {name: (PARAM, kernel, known[name]) for name, kernel in kernels_of(model).items() if name in known}
    if isinstance(batches, Iterator):
        raise BatchError(
            f"batches of a Linen model are read once more, to see its layers, got a {type(batches).__name__} that can "
            "be read once: pass a list(...) of it"
        )
    kernels = kernels_of(model)
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
    found: dict[str, tuple[str, Any, Layout | str]] = {}
    for name, kernel in kernels.items():
        if name in layouts or name in problems:
            found[name] = PARAM, kernel, problems.get(name) or layouts[name]
    return found


def kernels_of(model: LinenModel) -> dict[str, Any]:
    """The arrays called "kernel", by the path of their layer.

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
