"""LoRA in a Flax NNX model: injected by path, or found there."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from lora_one.backends.jax.sites import Leaves, Site, factor_dtype, is_matrix, kernel_sharding
from lora_one.backends.targets import select
from lora_one.config import Config
from lora_one.errors import ConfigError, ModelError

from .adopt import Found, find_adapters
from .layers import is_linear, kind_of

_MODES = ("deterministic", "use_running_average")


class Injected(NamedTuple):
    """A layer that LoRA was put into, its own class, and the attributes that came."""

    layer: nnx.Module
    plain: type
    names: list[str]


class NnxBinding:
    """See `lora_one.backends.jax.sites.Binding`."""

    def __init__(self, model: nnx.Module, config: Config):
        self.model = model
        self._modes = _modes(model)
        self._classes: list[Injected] = []
        self._values: list[tuple[nnx.Variable, Any]] = []
        try:
            found = find_adapters(model, config)
            if found:
                _check_rank(found, config)
                self._values = [(v, v.get_raw_value()) for f in found for v in (f.a, f.b)]
            else:
                self._inject(config)
                found = find_adapters(model, config)
            self.attached = bool(self._classes)
            self._found = {f.site.name: f for f in found}
            self.sites: dict[str, Site] = {name: f.site for name, f in self._found.items()}
            for module, name, _ in self._modes:
                setattr(module, name, True)
            self._split()
        except BaseException:
            self.undo()
            raise

    def _inject(self, config: Config) -> None:
        if config.dropout:
            raise ConfigError(
                f"dropout must be 0 on JAX models, got {config.dropout}: its LoRA layers carry no random stream"
            )
        chosen = select(config.targets, linear_layers(self.model))
        self._classes = inject(self.model, {name: (config.rank, config.scaling) for name in chosen})

    def _split(self) -> None:
        keys = {f.a_path: (name, 0) for name, f in self._found.items()}
        keys |= {f.b_path: (name, 1) for name, f in self._found.items()}
        graphdef, *states = nnx.split(self.model, lambda path, _: tuple(path) in keys, ...)
        lora, self.frozen = states
        variables = {tuple(path): variable for path, variable in nnx.to_flat_state(lora)}

        def rebuild(frozen: Any, factors: dict[str, Leaves]) -> nnx.Module:
            flat = [(path, v.replace(factors[keys[path][0]][keys[path][1]])) for path, v in variables.items()]
            # nnx refuses variables made at an outer trace level, as jit arguments are under grad: make them anew.
            return nnx.merge(graphdef, *jax.tree.map(lambda x: x, (nnx.from_flat_state(flat), frozen)))

        self._rebuild = rebuild

    def kernel(self, site: str) -> Any:
        """The array beside a site's factors."""
        return dict(nnx.to_flat_state(self.frozen))[self._kernel_path(site)].get_raw_value()

    def with_kernel(self, site: str, kernel: Any) -> Any:
        """`frozen` with another array there."""
        flat = dict(nnx.to_flat_state(self.frozen))
        path = self._kernel_path(site)
        return nnx.from_flat_state(list({**flat, path: flat[path].replace(kernel)}.items()))

    def _kernel_path(self, site: str) -> tuple[Any, ...]:
        *parents, factor = self._found[site].a_path
        return (*parents, factor.removesuffix("_lora_a"))

    def weight_names(self) -> tuple[list[str | None], set[str]]:
        params = {tuple(path) for path, variable in nnx.to_flat_state(self.frozen) if isinstance(variable, nnx.Param)}
        names: list[str | None] = []
        for keys, leaf in jax.tree_util.tree_leaves_with_path(self.frozen):
            path = tuple(getattr(key, "key", getattr(key, "name", None)) for key in keys)
            path = path if path in params else path[:-1]  # the last may be the variable's own
            names.append(".".join(map(str, path)) if path in params and is_matrix(leaf) else None)
        adapted = {".".join(map(str, f.a_path)).removesuffix("_lora_a") for f in self._found.values()}
        return names, adapted

    def loss(self, loss_fn: Callable[[Any, Any], Any], frozen: Any, factors: dict[str, Leaves], batch: Any) -> Any:
        return loss_fn(self._rebuild(frozen, factors), batch)

    def factors(self) -> dict[str, Leaves]:
        return {name: Leaves(f.a.get_raw_value(), f.b.get_raw_value()) for name, f in self._found.items()}

    def write(self, site: str, leaves: Leaves) -> None:
        found = self._found[site]
        found.a.set_raw_value(leaves.a)
        found.b.set_raw_value(leaves.b)

    def finish(self) -> None:
        for module, name, value in self._modes:
            setattr(module, name, value)

    def undo(self) -> None:
        self.finish()
        for variable, value in self._values:
            variable.set_raw_value(value)
        take_out(self._classes)


def linear_layers(model: nnx.Module) -> dict[str, nnx.Module]:
    """The layers that LoRA may go to, adapted or not, by path."""
    return {".".join(map(str, path)): layer for path, layer in nnx.iter_graph(model) if is_linear(layer)}


def inject(model: nnx.Module, plan: dict[str, tuple[int, float]]) -> list[Injected]:
    """Give layers their LoRA class and zero factors.

    Args:
        plan: name -> (rank, scaling).

    Returns:
        What `take_out` takes back.

    Raises:
        ModelError: every layer that cannot be adapted, with the reason. None was.
    """
    layers = linear_layers(model)
    problems, ready = [], []
    for name in plan:
        try:
            kind = kind_of(layers[name])
            if kind is None:
                raise ValueError(f"it is a {type(layers[name]).__name__}")
            kernel = getattr(layers[name], kind.param)
            if not jnp.issubdtype(kernel.dtype, jnp.floating):
                raise ValueError(f"its {kind.param} must be floating, got {kernel.dtype}")
            _check_divides(kernel)
            ready.append((name, layers[name], kind, kind.layout(layers[name])))
        except ValueError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise ModelError("LoRA cannot be attached to these layers:\n  " + "\n  ".join(problems))
    injected = []
    for name, layer, kind, layout in ready:
        rank, scaling = plan[name]
        kernel = getattr(layer, kind.param)
        dtype, spec = factor_dtype(kernel), _metadata_spec(kernel)
        a, b, scale = (f"{kind.param}_lora_{part}" for part in ("a", "b", "scale"))
        injected.append(Injected(layer, type(layer), [a, b, scale]))
        for part, shape, entries in (
            (a, layout.a_shape(rank), layout.a_spec),
            (b, layout.b_shape(rank), layout.b_spec),
        ):
            metadata = {} if spec is None else {"out_sharding": entries(spec), **_mesh_metadata(kernel)}
            setattr(layer, part, nnx.LoRAParam(jnp.zeros(shape, dtype), eager_sharding=False, **metadata))
        setattr(layer, scale, scaling)
        object.__setattr__(layer, "__class__", kind.adapted)
    return injected


def take_out(injected: list[Injected]) -> None:
    """Make adapted layers plain again, without their factors."""
    for layer, plain, names in injected:
        object.__setattr__(layer, "__class__", plain)
        for name in names:
            if hasattr(layer, name):
                delattr(layer, name)


def _modes(model: nnx.Module) -> list[tuple[nnx.Module, str, Any]]:
    return [
        (module, name, getattr(module, name))
        for _, module in nnx.iter_modules(model)
        for name in _MODES
        if isinstance(getattr(module, name, None), bool)
    ]


def _check_rank(found: list[Found], config: Config) -> None:
    wrong = [f"{f.site.name} has rank {f.site.rank}" for f in found if config.rank not in (Config().rank, f.site.rank)]
    if wrong:
        raise ModelError(
            f"the model's LoRA keeps its own rank, but the Config asks for {config.rank}: {'; '.join(wrong)}; "
            "leave the rank out of the Config, or hand in the model without LoRA"
        )
    if config.targets != Config().targets or config.dropout:
        setting = f"targets {config.targets!r}" if config.targets != Config().targets else f"dropout {config.dropout}"
        raise ModelError(f"the model's LoRA keeps its own settings, but the Config asks for {setting}: leave it out")


def _metadata_spec(kernel: nnx.Variable) -> tuple[Any, ...] | None:
    spec = kernel.get_metadata().get("out_sharding")
    if spec is None:
        return None
    spec = tuple(getattr(spec, "spec", spec))
    return (*spec, *[None] * (kernel.ndim - len(spec)))


def _check_divides(kernel: nnx.Variable) -> None:
    """Raises ValueError where the metadata shards an axis that the mesh does not divide."""
    sharding, spec = kernel_sharding(kernel.get_raw_value()), _metadata_spec(kernel)
    if not isinstance(sharding, NamedSharding) or spec is None:
        return
    for size, entry in zip(kernel.shape, spec, strict=True):
        names = entry if isinstance(entry, tuple) else (entry,)
        parts = math.prod(sharding.mesh.shape.get(name, 1) for name in names if isinstance(name, str))
        if size % parts:
            raise ValueError(
                f"its kernel {kernel.shape} has out_sharding {spec}, but mesh axis {entry!r} has {parts} devices, "
                f"which do not divide {size}: choose a mesh that does, or leave the axis whole"
            )


def _mesh_metadata(kernel: nnx.Variable) -> dict[str, Any]:
    return {name: kernel.get_metadata()[name] for name in ("sharding_rules", "mesh") if name in kernel.get_metadata()}
