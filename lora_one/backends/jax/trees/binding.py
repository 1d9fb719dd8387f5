"""Linen modules and pytrees of parameters with LoRA, for `lora_one.init`."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from lora_one.backends.interface import LossFn
from lora_one.backends.jax.passes.batches import arrays_and_rest, is_array, rejoin
from lora_one.backends.jax.placement import kernel_sharding
from lora_one.backends.jax.sites import Leaves, Site, dotted, factor_dtype, is_matrix
from lora_one.backends.targets import check_held, select
from lora_one.config import Config
from lora_one.errors import ConfigError, ModelError

from .linear import Linear, find_layers
from .models import AdaptedWeight, LinenModel, Lora, PytreeModel
from .whole import as_entries, by_path, find_whole, whole_entries


class TreeBinding:
    """See `lora_one.backends.jax.sites.Binding`."""

    def __init__(self, model: LinenModel | PytreeModel, config: Config, batches: Iterable[Any], loss_fn: LossFn | None):
        if config.dropout and isinstance(model, PytreeModel):
            raise ConfigError(
                f"dropout must be 0 for a {PytreeModel.__name__}, got {config.dropout}: dropout acts on the input of a "
                "layer, and only the layer's weight is known here; use an nnx.Module or a LinenModel"
            )
        is_new = isinstance(model, LinenModel) and not model.lora
        self.model: Any = model.replace(dropout=config.dropout) if is_new else model
        params = model.variables["params"] if isinstance(model, LinenModel) else model.params
        self._held = whole_entries(model.lora, (weight.layer for weight in model.layouts))
        whole = find_whole(params, () if model.lora else config.modules_to_save)
        linear = find_layers(model, batches, loss_fn)
        if model.lora:
            _check_settings(model, config)
            check_held(config, by_path(self._held))
            plan = {name: (rank, model.scaling) for name, rank in ranks(model).items()}
        else:
            modules = [path.rpartition(".")[0] for path in whole]
            plan = {name: (config.rank, config.scaling) for name in select(config.targets, linear, modules)}
        self.sites = tree_sites(linear, plan)
        self._weights = adapted_weights(self.sites, linear)
        self._scaling = next(iter(plan.values()))[1]
        # Equinox modules hold functions beside their arrays.
        self.frozen, others = arrays_and_rest(self._without_dropout(self._with_lora(self._held)))
        self.attached = not model.lora
        self._rebuild = lambda arrays: rejoin(arrays, others)
        self._written: dict[str, Leaves] = {}
        self._whole = whole

    def weight_names(self) -> tuple[list[str | None], set[str]]:
        linen = isinstance(self.model, LinenModel)
        within = "variables.params." if linen else "params."
        names: list[str | None] = []
        for path, leaf in jax.tree_util.tree_leaves_with_path(self._with_lora(self._held)):
            if is_array(leaf):
                name = dotted(path)
                names.append(name.removeprefix(within) if name.startswith(within) and is_matrix(leaf) else None)
        adapted = {weight.path if linen else weight.layer for weight in self._weights}
        return names, adapted | self._whole.keys() | by_path(self._held).keys()

    def loss(self, loss_fn: LossFn, frozen: Any, factors: dict[str, Leaves], batch: Any) -> Any:
        model = self._rebuild(frozen)
        model = model.replace(lora={**model.lora, **self._lora(factors)})
        return loss_fn(model.effective() if isinstance(model, PytreeModel) else model, batch)

    def factors(self) -> dict[str, Leaves]:
        return dict(self._written)

    def write(self, site: str, leaves: Leaves) -> None:
        self._written[site] = leaves

    def finish(self) -> None:
        # Copies: a training step may donate them, and the base weights are still needed.
        whole = as_entries({path: jnp.array(array, copy=True) for path, array in self._whole.items()})
        self.model = self._with_lora({**self._lora(self._written), **self._held, **whole})

    def undo(self) -> None:
        """Do nothing: the caller's model is a value that was not changed."""

    def _without_dropout(self, model: Any) -> Any:
        return model.replace(dropout=0.0) if isinstance(model, LinenModel) else model

    def _with_lora(self, lora: Lora) -> Any:
        return self.model.replace(lora=lora, scaling=self._scaling, layouts=self._weights)

    def _lora(self, factors: dict[str, Leaves]) -> Lora:
        weights = {weight.layer: weight for weight in self._weights}
        return {name: weights[name].to_lora(leaves) for name, leaves in factors.items()}


def adapted_weights(sites: dict[str, Site], linear: Linear) -> tuple[AdaptedWeight, ...]:
    """Return the weights of these sites, which are among the linear layers."""
    return tuple(AdaptedWeight(name, linear[name].param, site.layout) for name, site in sites.items())


def _check_settings(model: LinenModel | PytreeModel, config: Config) -> None:
    """Raise ModelError where the Config asks for other settings than those of the LoRA that is in the model."""
    wrong = [name for name, rank in ranks(model).items() if rank != config.rank != Config().rank]
    if isinstance(model, LinenModel) and config.dropout not in (Config().dropout, model.dropout):
        wrong.append(f"dropout {config.dropout}")
    wrong += [
        f"{name} {getattr(config, name)!r}"
        for name in ("targets", "rank_max")
        if getattr(config, name) != getattr(Config(), name)
    ]
    if wrong:
        raise ModelError(
            "the model's LoRA keeps its own rank, targets and dropout, but the Config asks for others: leave them out "
            f"of the Config, or hand in the model without LoRA ({', '.join(wrong)})"
        )


def ranks(model: LinenModel | PytreeModel) -> dict[str, int]:
    """Return the rank of each layer with LoRA."""
    weights = [weight for weight in model.layouts if weight.layer in model.lora]
    return {weight.layer: weight.layout.rank(weight.leaves(model.lora).a) for weight in weights}


def tree_sites(linear: Linear, plan: dict[str, tuple[int, float]]) -> dict[str, Site]:
    """Return the sites of the chosen layers.

    Args:
        linear: the linear layers, as `find_layers` gives them.
        plan: name -> (rank, scaling), for the chosen layers.

    Raises:
        ModelError: a layer that LoRA cannot go to, with the reason.
    """
    sites = {}
    for name, (rank, scaling) in plan.items():
        param, kernel, layout = linear[name]
        if isinstance(layout, str):
            raise ModelError(f"LoRA cannot be attached to {name}: {layout}")
        if not jnp.issubdtype(kernel.dtype, jnp.floating):
            raise ModelError(f"LoRA cannot be attached to {name}: its {param} must be floating, got {kernel.dtype}")
        sites[name] = Site(name, layout, rank, scaling, scaling, None, factor_dtype(kernel), kernel_sharding(kernel))
    return sites
