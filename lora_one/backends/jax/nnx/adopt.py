"""Find LoRA that is in an NNX model: ours, nnx.LoRA, nnx.LoRALinear, and that of qwix.apply_lora_to_model."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from lora_one.backends.jax.layout import Layout, plain_layout
from lora_one.backends.jax.placement import kernel_sharding, put
from lora_one.backends.jax.sites import Leaves, Site, dotted
from lora_one.config import Config
from lora_one.errors import ModelError

from .dora import magnitudes_of
from .layers import AdapterKind, adapted_kind
from .qwix import QWIX_PATH, qwix_scale
from .whole import WholeParam

Path = tuple[Any, ...]  # attributes and indices


@dataclass(frozen=True)
class AdaptedLayer:
    """A layer that has a LoRA pair, and the variables that hold it."""

    site: Site
    a: nnx.Variable
    b: nnx.Variable
    a_path: Path
    b_path: Path
    m: nnx.Variable | None = None  # DoRA's magnitudes
    kernel: nnx.Variable | None = None  # of a layer with DoRA

    @property
    def m_path(self) -> Path:
        *parents, name = self.a_path
        return (*parents, f"{name.removesuffix('_a')}_m")

    @property
    def leaves(self) -> Leaves:
        return Leaves(self.a.get_raw_value(), self.b.get_raw_value())

    def write(self, a: Array, b: Array) -> None:
        """Set the factors, and let a layer with DoRA compute x (W + s a b) with them."""
        self.a.set_raw_value(a)
        self.b.set_raw_value(b)
        self.renew_magnitudes(a, b)

    def renew_magnitudes(self, a: Array, b: Array) -> None:
        """Let a layer with DoRA compute x (W + s a b) with these factors; others do."""
        if self.m is not None and self.kernel is not None:
            kernel = self.kernel.get_raw_value()
            self.write_magnitudes(magnitudes_of(self.site.layout, kernel, a, b, self.site.native))

    def write_magnitudes(self, m: Array) -> None:
        """Set the magnitudes of a layer with DoRA, (stack..., out...)."""
        assert self.m is not None
        self.m.set_raw_value(put(m.astype(self.m.dtype), self._magnitude_sharding()))

    def _magnitude_sharding(self) -> Sharding | None:
        sharding = self.site.sharding
        if not isinstance(sharding, NamedSharding):
            return sharding
        return NamedSharding(sharding.mesh, PartitionSpec(*self.site.layout.magnitude_spec(tuple(sharding.spec))))


def find_adapters(model: nnx.Module, config: Config) -> list[AdaptedLayer]:
    """Return all layers with LoRA, in the model's own order; an empty list if there are none.

    Raises:
        ModelError: LoRA of a kind that cannot be started, with the reason.
    """
    layers, problems = [], []
    for path, module in nnx.iter_graph(model):
        try:
            known = adapted_kind(module)
            if isinstance(module, nnx.LoRA):
                layers.append(_by_flax(path, module, config))
            elif known is not None:
                layers.append(_by_us(path, module, known[1]))
            elif isinstance(module, nnx.Module):
                names = [name for name, value in vars(module).items() if _is_factor(value)]
                for name in names:
                    if name.endswith("_lora_a"):
                        layers.append(_by_qwix(model, path, module, name.removesuffix("_lora_a")))
                    elif not name.endswith("_lora_b"):
                        raise ValueError(f"nnx.LoRAParam {name!r} belongs to no layer that is known")
        except ValueError as error:
            problems.append(f"{dotted(path)}: {error}")
    if problems:
        raise ModelError("the model has LoRA that cannot be started:\n  " + "\n  ".join(problems))
    return layers


def _is_factor(value: Any) -> bool:
    return isinstance(value, nnx.LoRAParam) and not isinstance(value, WholeParam)


def _by_us(path: Path, layer: Any, kind: AdapterKind) -> AdaptedLayer:
    a, b = (getattr(layer, f"{kind.param}_lora_{side}") for side in "ab")
    scale = getattr(layer, f"{kind.param}_lora_scale")
    kernel, layout = getattr(layer, kind.param), kind.layout(layer)
    site = Site(
        name=dotted(path),
        layout=layout,
        rank=layout.rank(a),
        scaling=scale,
        native=scale,
        width=None,
        dtype=a.dtype,
        sharding=kernel_sharding(kernel.get_raw_value()),
    )
    m = getattr(layer, f"{kind.param}_lora_m", None)
    return AdaptedLayer(site, a, b, (*path, f"{kind.param}_lora_a"), (*path, f"{kind.param}_lora_b"), m, kernel)


def _by_flax(path: Path, module: nnx.LoRA, config: Config) -> AdaptedLayer:
    """Return the layer of an nnx.LoRA, which multiplies by 1: the scale of the spec is folded into lora_b."""
    *stack, in_features, rank = module.lora_a.shape
    out_features = module.lora_b.shape[-1]
    name = path[:-1] if path and path[-1] == "lora" and module.base_module is None else path
    kernel = getattr(module.base_module, "kernel", None)
    site = Site(
        name=dotted(name),
        layout=plain_layout((*stack, in_features, out_features), 1, 1),
        rank=rank,
        scaling=config.alpha / (rank**0.5 if config.use_rslora else rank),
        native=1.0,
        width=None,
        dtype=module.lora_a.dtype,
        sharding=None if kernel is None else kernel_sharding(kernel.get_raw_value()),
    )
    return AdaptedLayer(site, module.lora_a, module.lora_b, (*path, "lora_a"), (*path, "lora_b"))


def _by_qwix(model: nnx.Module, path: Path, layer: Any, param: str) -> AdaptedLayer:
    """Return a layer of qwix, which fixes the rank by its rule and may fold the axes of the input or the output."""
    a, b = getattr(layer, f"{param}_lora_a"), getattr(layer, f"{param}_lora_b", None)
    if b is None:
        raise ValueError(f"{param}_lora_a is there without {param}_lora_b")
    if not hasattr(layer, QWIX_PATH):
        raise ValueError(f"{param}_lora_a is on a {type(layer).__name__}, which is neither ours nor qwix's")
    rank = a.shape[-1]
    if b.shape[0] != rank:
        raise ValueError(f"factors {a.shape} and {b.shape} share an axis with the batch; one pair a layer is expected")
    ins, outs = a.shape[:-1], b.shape[1:]
    scale = qwix_scale(model, path, rank)
    site = Site(
        name=dotted(path),
        layout=Layout((*ins, *outs), (), tuple(range(len(ins))), tuple(range(len(ins), len(ins) + len(outs)))),
        rank=rank,
        scaling=scale,
        native=scale,
        width=rank,
        dtype=jnp.dtype(a.dtype),
        sharding=None,
    )
    return AdaptedLayer(site, a, b, (*path, f"{param}_lora_a"), (*path, f"{param}_lora_b"))
