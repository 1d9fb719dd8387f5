"""A JAX model during `init`: probes in, LoRA's gradients out."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import NamedSharding

from lora_one.backends.checks import check_no_modules_to_save, check_reiterable
from lora_one.backends.interface import Layer, PassResult
from lora_one.config import Config
from lora_one.core.factors import Factors
from lora_one.core.spectrum import Probe
from lora_one.errors import BatchError, ModelError
from lora_one.memory import process_peak

from .adopt import find_adapters
from .nnx import NnxBinding
from .ops import JaxOps
from .oracle import Oracle
from .sites import Binding, Leaves, Site, replicated
from .tree_binding import TreeBinding
from .trees import LinenModel, PytreeModel

LossFn = Callable[[Any, Any], Any]


class JaxSession:
    """See `lora_one.backends.interface.Session`."""

    def __init__(self, model: Any, batches: Iterable[Any], loss_fn: LossFn | None, config: Config):
        self.ops = JaxOps()
        self.model = model
        self.layers: list[Layer] = []
        self._batches = batches
        self._loss_fn = loss_fn
        self._config = config

    def __enter__(self) -> "JaxSession":
        config = self._config
        check_reiterable(self._batches, config)
        check_no_modules_to_save(config, "JAX")
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
        self._of: dict[str, tuple[Site, int]] = {}
        for site in self._sites.values():
            for index, layer in enumerate(site.layers()):
                self._of[layer.name] = site, index
                self.layers.append(layer)
        self._pending: dict[str, dict[int, Factors]] = {}
        return self

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
        given = {name: self._installed(site, probes) for name, site in self._sites.items()}
        result, gradients = self._run(given)
        wanted: dict[str, Array | None] = {}
        for name, (site, index) in self._of.items():
            pair = gradients[site.name][index]
            wanted[name] = pair.lora_B if probes[name].lora_A is not None else pair.lora_A
        return result, wanted

    def exact_pass(self, consume: Callable[[str, Array], None]) -> PassResult:
        """G is the gradient of lora_B beside lora_A = I, or of lora_A beside lora_B = I: the smaller identity is taken.

        So no gradient of a kernel is asked for, which may be quantised. All layers' G exist at the same time.
        """
        given, from_b = {}, {}
        for name, site in self._sites.items():
            layout = site.layout
            like = self.like(site.layers()[0].name)
            from_b[name] = layout.in_features <= layout.out_features
            k = min(layout.in_features, layout.out_features)
            eye = self.ops.eye(k, like)
            if from_b[name]:
                pair = Factors(eye, self.ops.zeros((layout.out_features, k), like))
            else:
                pair = Factors(self.ops.zeros((k, layout.in_features), like), eye)
            given[name] = Leaves(*layout.leaves([pair] * layout.count))
        result, gradients = self._run(given)
        for name, (site, index) in self._of.items():
            pair = gradients[site.name][index]
            consume(name, pair.lora_B if from_b[site.name] else pair.lora_A)
        return result

    def mean_loss(self) -> PassResult:
        return PassResult(*self.oracle.mean_loss(self._batches))

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

    def _installed(self, site: Site, probes: Mapping[str, Probe]) -> Leaves:
        pairs = []
        for layer in site.layers():
            a, b = probes[layer.name]
            if a is not None:
                pairs.append(Factors(a, self.ops.zeros((layer.out_features, a.shape[0]), like=a)))
            else:
                assert b is not None
                pairs.append(Factors(self.ops.zeros((b.shape[1], layer.in_features), like=b), b))
        return Leaves(*site.layout.leaves(pairs))

    def _run(self, given: dict[str, Leaves]) -> tuple[PassResult, dict[str, list[Factors]]]:
        """Mean gradients at scale 1 with these factors installed, a pair a matrix.

        A layer that fixes its rank takes the columns in several turns; the other layers rest meanwhile.
        """
        turns = max(
            -(-leaves.a.shape[-1] // self._sites[name].width) if self._sites[name].width else 1
            for name, leaves in given.items()
        )
        collected: dict[str, list[Leaves]] = {name: [] for name in given}
        for turn in range(turns):
            placed = {name: self._sites[name].place(_columns(self._sites[name], x, turn)) for name, x in given.items()}
            loss, count, gradients = self.oracle.gradients(self._batches, placed)
            for name, leaves in gradients.items():
                collected[name].append(leaves)
        return PassResult(loss, count), {
            name: self._joined(self._sites[name], parts, given[name].a.shape[-1]) for name, parts in collected.items()
        }

    def _joined(self, site: Site, parts: list[Leaves], columns: int) -> list[Factors]:
        parts = [site.whole(part) for part in (parts if site.width else parts[:1])]
        axis = len(site.layout.stack)
        a = jnp.concatenate([part.a for part in parts], axis=-1)[..., :columns] / site.native
        b = jnp.concatenate([part.b for part in parts], axis=axis)
        b = jax.lax.slice_in_dim(b, 0, columns, axis=axis) / site.native
        return site.layout.pairs(a, b)


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
