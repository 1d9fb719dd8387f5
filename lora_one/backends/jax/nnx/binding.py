"""A Flax NNX model with LoRA: attached by path, or already there."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lora_one.backends.interface import LossFn
from lora_one.backends.jax.ops import JaxOps
from lora_one.backends.jax.sites import Leaves, Site, dotted, is_matrix, key_names
from lora_one.backends.targets import check_held, select
from lora_one.config import Config
from lora_one.core.factors import plain_factors
from lora_one.core.omega import draw_omega
from lora_one.errors import ModelError

from .adopt import AdaptedLayer, Path, find_adapters
from .inject import Injected, Lifts, dropout_of, inject, linear_layers, take_out
from .layers import is_linear
from .whole import find_whole, forget_whole, train_whole, whole_parameters

_MODES = ("deterministic", "use_running_average")  # True in evaluation mode


class NnxBinding:
    """See `lora_one.backends.jax.sites.Binding`."""

    def __init__(self, model: nnx.Module, config: Config, lifts: Mapping[str, Lifts] = MappingProxyType({})):
        self.model, self._config = model, config
        self.sites: dict[str, Site] = {}
        self._modes: list[tuple[nnx.Module, str, bool]] = []
        self._injected: list[Injected] = []
        self._whole: list[nnx.Variable] = []  # those that this binding began to train whole
        self._values: list[tuple[nnx.Variable, Any]] = []
        try:
            layers = find_adapters(model, config)
            if layers:
                _check_settings(layers, whole_parameters(model), dropout_of(model), config)
                variables = (v for layer in layers for v in (layer.a, layer.b, layer.m) if v is not None)
                self._values = [(v, v.get_raw_value()) for v in variables]
                self._bind(layers)
            else:
                self._inject(lifts)
            self.attached = bool(self._injected)
        except BaseException:
            self.undo()
            raise

    def _inject(self, lifts: Mapping[str, Lifts]) -> None:
        config = self._config
        whole = find_whole(self.model, config.modules_to_save)
        modules = [path.rpartition(".")[0] for path in whole]
        layers = linear_layers(self.model)
        if config.targets == "all-linear":
            layers = {name: layer for name, layer in layers.items() if is_linear(layer)}
        chosen = select(config.targets, layers, modules)
        plan = {name: (config.rank, config.scaling) for name in chosen}
        self._injected = inject(self.model, plan, config.dropout, config.seed, lifts, config.dora)
        self._whole = list(whole.values())
        train_whole(self._whole)
        self._bind(find_adapters(self.model, config))

    def alone(self, layer: str, lifts: Lifts) -> "NnxBinding":
        """Return a binding of one layer that is stacked along these axes, while this one is undone."""
        return NnxBinding(self.model, replace(self._config, targets=re.escape(layer)), {layer: lifts})

    def attach_again(self, lifts: Mapping[str, Lifts]) -> None:
        """Attach LoRA anew after `undo`, to layers that are stacked along these axes."""
        self._inject(lifts)

    def _bind(self, layers: list[AdaptedLayer]) -> None:
        self._layers = {layer.site.name: layer for layer in layers}
        self.sites = {name: layer.site for name, layer in self._layers.items()}
        for layer in layers:  # during the passes the model computes x W
            layer.renew_magnitudes(*(jnp.zeros_like(leaf) for leaf in layer.leaves))
        self._modes = _modes(self.model)
        for module, name, _ in self._modes:
            setattr(module, name, True)
        self._split()

    def _split(self) -> None:
        places = {layer.a_path: (name, 0) for name, layer in self._layers.items()}
        places |= {layer.b_path: (name, 1) for name, layer in self._layers.items()}
        graphdef, *states = nnx.split(self.model, lambda path, _: tuple(path) in places, ...)
        lora, self._frozen = states
        variables = {tuple(path): variable for path, variable in nnx.to_flat_state(lora)}

        def rebuild(frozen: Any, factors: dict[str, Leaves]) -> nnx.Module:
            flat = [(path, v.replace(factors[places[path][0]][places[path][1]])) for path, v in variables.items()]
            # nnx refuses variables made at an outer trace level, as jit arguments are under grad: make them anew.
            return nnx.merge(graphdef, *jax.tree.map(lambda x: x, (nnx.from_flat_state(flat), frozen)))

        self._rebuild = rebuild

    @property
    def frozen(self) -> Any:
        """See `Binding`. DoRA's magnitudes are among them: they follow the factors that were written last."""
        current = {layer.m_path: layer.m for layer in self._layers.values() if layer.m is not None}
        if not current:
            return self._frozen
        flat = nnx.to_flat_state(self._frozen)
        return nnx.from_flat_state(
            [(path, v.replace(current[path].get_raw_value()) if path in current else v) for path, v in flat]
        )

    @property
    def has_magnitudes(self) -> bool:
        """Whether a layer has DoRA."""
        return any(layer.m is not None for layer in self._layers.values())

    def kernel(self, site: str) -> Any:
        """Return the array beside a site's factors."""
        return dict(nnx.to_flat_state(self.frozen))[self._kernel_path(site)].get_raw_value()

    def with_kernel(self, site: str, kernel: Any) -> Any:
        """Return `frozen` with another array beside a site's factors."""
        flat = dict(nnx.to_flat_state(self.frozen))
        path = self._kernel_path(site)
        return nnx.from_flat_state(list({**flat, path: flat[path].replace(kernel)}.items()))

    def _kernel_path(self, site: str) -> Path:
        *parents, factor = self._layers[site].a_path
        return (*parents, factor.removesuffix("_lora_a"))

    def weight_names(self) -> tuple[list[str | None], set[str]]:
        state = nnx.to_flat_state(self.frozen)
        params = {key_names(path) for path, variable in state
                  if isinstance(variable, nnx.Param) and not isinstance(variable, nnx.LoRAParam)}  # fmt: skip
        names: list[str | None] = []
        for keys, leaf in jax.tree_util.tree_leaves_with_path(self.frozen):
            path = key_names(keys)
            path = path if path in params else path[:-1]  # the last key may be the variable's own
            names.append(".".join(path) if path in params and is_matrix(leaf) else None)
        adapted = {dotted(layer.a_path).removesuffix("_lora_a") for layer in self._layers.values()}
        return names, adapted | whole_parameters(self.model).keys()

    def loss(self, loss_fn: LossFn, frozen: Any, factors: dict[str, Leaves], batch: Any) -> Any:
        return loss_fn(self._rebuild(frozen, factors), batch)

    def factors(self) -> dict[str, Leaves]:
        return {name: layer.leaves for name, layer in self._layers.items()}

    def write(self, site: str, leaves: Leaves) -> None:
        self._layers[site].write(*leaves)

    def finish(self) -> None:
        for module, name, value in self._modes:
            setattr(module, name, value)

    def undo(self) -> None:
        self.finish()
        for variable, value in self._values:
            variable.set_raw_value(value)
        take_out(self._injected)
        forget_whole(self._whole)


def attach_plain(model: nnx.Module, config: Config) -> nnx.Module:
    """Attach LoRA to an NNX model with its usual start: A random, B zero.

    Use it to compare LoRA-One with plain LoRA on equal terms, or to make a model with LoRA layers whose factors are
    then restored from a checkpoint. The result computes what the model computed before, since B is zero.

    Args:
        model: changed in place. Layers that have LoRA already keep it and get new factors.
        config: gives rank, alpha, targets, modules_to_save, dropout, and the seed from which A is drawn, layer by
            layer.

    Returns:
        The same model.

    Raises:
        ModelError: no layer matches the targets, or one of them cannot have LoRA.

    Example:
        >>> from flax import nnx
        >>> import lora_one
        >>> from lora_one.backends.jax import attach_plain
        >>> layer = nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
        >>> model = attach_plain(layer, lora_one.Config(rank=2))
        >>> model.layers[0].kernel_lora_a.shape, float(abs(model.layers[0].kernel_lora_b[...]).max())
        ((4, 2), 0.0)
    """
    ops, like = JaxOps(), jnp.zeros((), jnp.float32)
    binding = NnxBinding(model, config)
    for name, site in binding.sites.items():
        pairs = []
        for layer in site.layers():
            omega = ops.asarray(draw_omega(config.seed, layer.name, layer.in_features, layer.rank), like)
            pairs.append(plain_factors(ops, omega, layer.rank, layer.out_features))
        binding.write(name, site.trained(pairs))
    binding.finish()
    return model


def _modes(model: nnx.Module) -> list[tuple[nnx.Module, str, bool]]:
    """Return every switch between training and evaluation: (module, attribute, value)."""
    return [
        (module, name, getattr(module, name))
        for _, module in nnx.iter_modules(model)
        for name in _MODES
        if isinstance(getattr(module, name, None), bool)
    ]


def _check_settings(layers: list[AdaptedLayer], whole: Iterable[str], dropout: float, config: Config) -> None:
    """Raise ModelError where the Config asks for other settings than those of the LoRA that is in the model."""
    wrong = [
        f"{layer.site.name} has rank {layer.site.rank}"
        for layer in layers
        if config.rank not in (Config().rank, layer.site.rank)
    ]
    if wrong:
        raise ModelError(
            f"the model's LoRA keeps its own rank, but the Config asks for {config.rank}: {'; '.join(wrong)}; "
            "leave the rank out of the Config, or hand in the model without LoRA"
        )
    check_held(config, whole)
    plain = [layer.site.name for layer in layers if layer.m is None]
    if config.dora and plain:
        raise ModelError(
            f"the model's LoRA has no magnitudes of DoRA, but the Config asks for dora=True: {', '.join(plain)}; leave "
            "dora out of the Config, or hand in the model without LoRA"
        )
    default = Config()
    given = {"targets": default.targets, "dropout": dropout, "rank_max": default.rank_max}
    names = [name for name in given if getattr(config, name) not in (getattr(default, name), given[name])]
    if names:
        setting = ", ".join(f"{name} {getattr(config, name)!r}" for name in names)
        raise ModelError(f"the model's LoRA keeps its own settings, but the Config asks for {setting}: leave it out")
