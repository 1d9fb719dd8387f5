"""A JAX model during `init`: probes in, LoRA's gradients out."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from itertools import chain
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import NamedSharding

from lora_one.backends.checks import check_no_torch_settings, check_reiterable
from lora_one.backends.interface import Layer, PassResult
from lora_one.config import Config
from lora_one.core.factors import Factors
from lora_one.core.sketch import Probe, Side
from lora_one.environment import process_peak
from lora_one.errors import BatchError, ModelError

from .layout import Layout
from .nnx.adopt import find_adapters
from .nnx.binding import NnxBinding
from .nnx.stacks import check_stacks, is_ambiguous
from .ops import JaxOps
from .passes.gradients import Oracle
from .passes.uses import warn_of_left_out
from .sites import Binding, Leaves, Site, check_concrete, replicated
from .trees.binding import TreeBinding
from .trees.models import LinenModel, PytreeModel

LossFn = Callable[[Any, Any], Any]


class JaxSession:
    """See `lora_one.backends.interface.Session`."""

    def __init__(self, model: Any, batches: Iterable[Any], loss_fn: LossFn | None, config: Config):
        self.ops = JaxOps()
        self.model = model
        self.layers: list[Layer] = []
        self.stacks_layers = False
        self._warned = False
        self._batches = batches
        self._loss_fn = loss_fn
        self._config = config

    def __enter__(self) -> "JaxSession":
        config = self._config
        check_reiterable(self._batches, config)
        check_no_torch_settings(config, "JAX")
        if self._loss_fn is None:
            raise BatchError("a Flax model has no loss of its own: pass loss_fn=(model, batch) -> mean loss")
        self._binding = bind(self.model, config, self._batches, self._loss_fn)
        self._sites = self._binding.sites
        self.oracle = Oracle(self._binding, self._loss_fn)
        self._context = ExitStack()
        meshes = (s.sharding.mesh for s in self._sites.values() if isinstance(s.sharding, NamedSharding))
        mesh: Any = next(meshes, None)
        if mesh is not None and jax.sharding.get_abstract_mesh().empty:
            self._context.enter_context(jax.set_mesh(mesh))
        try:
            check_concrete("init", self._binding.frozen)
            self._check_stacks()
        except BaseException:
            self._context.close()
            self._binding.undo()
            raise
        self._of: dict[str, tuple[Site, int]] = {}
        for site in self._sites.values():
            for index, layer in enumerate(site.layers()):
                self._of[layer.name] = site, index
                self.layers.append(layer)
        self._pending: dict[str, dict[int, Factors]] = {}
        return self

    def _check_stacks(self) -> None:
        binding, loss_fn = self._binding, self._loss_fn
        if not (isinstance(binding, NnxBinding) and binding.attached and loss_fn is not None):
            return
        if any(is_ambiguous(site.layout) for site in self._sites.values()):
            first = next(iter(self._batches), None)
            if isinstance(self._batches, Iterator):
                self._batches = chain(() if first is None else (first,), self._batches)
            if first is not None:  # none at all is an error of the first pass
                check_stacks(binding, loss_fn, first)

    def __exit__(self, kind: type[BaseException] | None, error: Any, traceback: Any) -> None:
        self._context.close()
        if kind is not None:
            self._binding.undo()
        else:
            self._binding.finish()
            self.model = self._binding.model

    def like(self, layer: str) -> Array:
        site, _ = self._of[layer]
        one = jnp.zeros((), jnp.promote_types(site.dtype, jnp.float32))
        everywhere = replicated(site.sharding)
        return one if everywhere is None else jax.device_put(one, everywhere)

    def sketch_pass(self, probes: Mapping[str, Probe]) -> tuple[PassResult, dict[str, Array | None]]:
        result, gradients = self._gradients(probes)
        return result, dict(gradients)

    def exact_pass(self, consume: Callable[[str, Array], None]) -> PassResult:
        """G is the gradient of lora_B beside lora_A = I, or of lora_A beside lora_B = I: the smaller identity is taken.

        So no gradient of a kernel is asked for, which may be quantised. All layers' G exist at the same time.
        """
        probes = {}
        for layer in self.layers:
            eye = self.ops.eye(min(layer.in_features, layer.out_features), self.like(layer.name))
            probes[layer.name] = Probe("A" if layer.in_features <= layer.out_features else "B", eye)
        result, gradients = self._gradients(probes)
        for name, gradient in gradients.items():
            consume(name, gradient)
        return result

    def mean_loss(self) -> PassResult:
        return PassResult(*self.oracle.mean_loss(self._batches))

    def all_agree(self, decision: bool) -> bool:
        return decision  # whatever the devices and hosts, one program computes it

    def assign(self, layer: str, factors: Factors) -> None:
        site, index = self._of[layer]
        pending = self._pending.setdefault(site.name, {})
        pending[index] = factors
        if len(pending) == site.layout.count:  # a stack is written whole
            self._binding.write(site.name, site.trained([pending[i] for i in range(site.layout.count)]))
            del self._pending[site.name]

    def peak_memory(self) -> int | None:
        device = jax.devices()[0]
        statistics = device.memory_stats() if device.platform != "cpu" else None
        return statistics.get("peak_bytes_in_use") if statistics else process_peak()

    def _gradients(self, probes: Mapping[str, Probe]) -> tuple[PassResult, dict[str, Array]]:
        """The mean gradient of each layer's zero factor beside its probe, at scale 1.

        A layer that fixes its rank takes the columns in several turns; the other layers rest meanwhile.
        """
        layouts = tuple(site.layout for site in self._sites.values())
        in_order = [[probes[layer.name] for layer in site.layers()] for site in self._sites.values()]
        sides = tuple(some[0].side for some in in_order)
        factors = [[probe.factor for probe in some] for some in in_order]
        given = dict(zip(self._sites, _installed(layouts, sides, factors), strict=True))
        turns = max(
            -(-leaves.a.shape[-1] // self._sites[name].width) if self._sites[name].width else 1
            for name, leaves in given.items()
        )
        collected: dict[str, list[Leaves]] = {name: [] for name in given}
        for turn in range(turns):
            placed = {name: self._sites[name].place(_columns(self._sites[name], x, turn)) for name, x in given.items()}
            loss, count, gradients = self.oracle.gradients(self._batches, placed)
            for name, leaves in gradients.items():
                collected[name].append(self._sites[name].whole(leaves))
        self._warn_of_left_out()
        joined = [_joined(site, collected[name], given[name].a.shape[-1]) for name, site in self._sites.items()]
        natives = tuple(site.native for site in self._sites.values())
        matrices = _at_scale_1(layouts, natives, sides, joined)
        names = [layer.name for site in self._sites.values() for layer in site.layers()]
        found = dict(zip(names, matrices, strict=True))
        lost = self.oracle.rounded_away
        rounded_away = {
            layer.name: lost[name] for name, site in self._sites.items() if name in lost for layer in site.layers()
        }
        return PassResult(loss, count, rounded_away), found

    def _warn_of_left_out(self) -> None:
        """Once: after the first pass, which has seen what the loss does with each weight."""
        if self._config.targets == Config().targets and self._binding.attached and not self._warned:
            warn_of_left_out(*self._binding.weight_names(), self.oracle.uses)
        self._warned = True


def open_session(model: Any, batches: Iterable[Any], loss_fn: LossFn | None, config: Config) -> JaxSession:
    """See `lora_one.backends.interface.Backend`."""
    return JaxSession(model, batches, loss_fn, config)


def _columns(site: Site, leaves: Leaves, turn: int) -> Leaves:
    """The columns of a probe whose turn it is, padded with zeros to the layer's own rank."""
    if site.width is None:
        return leaves
    axis = len(site.layout.stack)
    start, stop = turn * site.width, (turn + 1) * site.width
    a, b = (
        leaves.a[..., start:stop],
        jax.lax.slice_in_dim(leaves.b, min(start, leaves.b.shape[axis]), min(stop, leaves.b.shape[axis]), axis=axis),
    )
    missing = site.width - a.shape[-1]
    return Leaves(
        jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, missing)]),
        jnp.pad(b, [(0, missing if i == axis else 0) for i in range(b.ndim)]),
    )


def _joined(site: Site, turns: list[Leaves], columns: int) -> Leaves:
    """The gradients of all columns from those of each turn."""
    if site.width is None:
        return turns[0]
    axis = len(site.layout.stack)
    a = jnp.concatenate([part.a for part in turns], axis=-1)[..., :columns]
    b = jnp.concatenate([part.b for part in turns], axis=axis)
    return Leaves(a, jax.lax.slice_in_dim(b, 0, columns, axis=axis))


# All layers' in one program, here and below: eager, each operation would be compiled, for each shape.
@partial(jax.jit, static_argnums=(0, 1))
def _installed(layouts: tuple[Layout, ...], sides: tuple[Side, ...], factors: list[list[Array]]) -> list[Leaves]:
    """The leaves of each site with its probes, one per matrix, all of a site on one side."""
    return [Leaves(*layout.probed(side, some)) for layout, side, some in zip(layouts, sides, factors, strict=True)]


@partial(jax.jit, static_argnums=(0, 1, 2))
def _at_scale_1(
    layouts: tuple[Layout, ...], natives: tuple[float, ...], sides: tuple[Side, ...], gradients: list[Leaves]
) -> list[Array]:
    """The gradient of each matrix's zero factor, from the leaves' at the sites' own scales.

    Args:
        sides: where the probes were: the zero factor is the other one.
    """
    found: list[Array] = []
    for layout, native, side, leaves in zip(layouts, natives, sides, gradients, strict=True):
        matrices = layout.lora_Bs(leaves.b) if side == "A" else layout.lora_As(leaves.a)
        found += [matrix / native for matrix in matrices]
    return found


def bind(model: Any, config: Config, batches: Iterable[Any], loss_fn: LossFn) -> Binding:
    """LoRA in a model of a kind that we know.

    Raises:
        ModelError: another kind.
    """
    if isinstance(model, nnx.Module):
        return NnxBinding(model, config)
    if isinstance(model, (LinenModel, PytreeModel)):
        return TreeBinding(model, config, batches, loss_fn)
    raise ModelError(
        f"a JAX model must be a flax.nnx.Module, or a Linen module or pytree wrapped in {LinenModel.__name__} or "
        f"{PytreeModel.__name__} of lora_one.backends.jax, got {type(model).__name__}"
    )


def stacks_of(model: Any) -> dict[tuple[str, ...], int]:
    """Path of each LoRA pair, up to `..._lora`, in the tree of its factors -> axes that count matrices.

    Raises:
        ModelError: no LoRA in the model.
    """
    if isinstance(model, nnx.Module):
        found = {tuple(map(str, f.a_path)): f.site.layout for f in find_adapters(model, Config())}
    elif isinstance(model, (LinenModel, PytreeModel)):
        found = {(name, f"{param}_lora_a"): layout for name, param, layout in model.layouts}
    else:
        found = {}
    if not found:
        raise ModelError(f"the model must have LoRA layers, got none in {type(model).__name__}")
    return {(*path[:-1], path[-1].removesuffix("_a")): len(layout.stack) for path, layout in found.items()}
