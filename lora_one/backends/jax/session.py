"""A JAX model during `init`: states and sides go in, what the gradients make of them comes out."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain, islice
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import NamedSharding

from lora_one.backends.checks import check_no_torch_settings
from lora_one.backends.interface import Layer, LossFn, PassResult
from lora_one.config import Config
from lora_one.core.factors import Factors
from lora_one.core.fold import FoldState
from lora_one.core.sides import Products, Sides, whole_gradient, whole_sides
from lora_one.environment import process_peak
from lora_one.errors import BatchError, ModelError

from .nnx.binding import NnxBinding
from .nnx.stacks import ambiguous_stacks, find_stacks
from .ops import JaxOps
from .passes.folds import abstract_states, folds_once, has_rows
from .passes.gradients import GradientFunction
from .passes.sides import column_turns, installed_sides, products_by_layer
from .passes.totals import mean_folds
from .passes.uses import warn_of_left_out
from .placement import put, replicated
from .processes import Processes, spans_processes
from .sites import Binding, check_concrete
from .trees.binding import TreeBinding
from .trees.models import LinenModel, PytreeModel


class Attached(NamedTuple):
    """What a session holds between entering and leaving."""

    binding: Binding
    gradient_function: GradientFunction
    places: dict[str, tuple[str, int]]  # layer -> the name of its site, and its index in the site's stack
    processes: Processes


class JaxSession:
    """See `lora_one.backends.interface.Session`."""

    def __init__(self, model: Any, batches: Iterable[Any] | None, loss_fn: LossFn | None, config: Config):
        self.ops = JaxOps()
        self.model = model
        self.layers: list[Layer] = []
        self.stacks_layers = False
        self._batches: Iterable[Any] = () if batches is None else batches
        self._loss_fn = _no_pass if batches is None else loss_fn
        self._config = config
        self._exit = ExitStack()
        self._attached: Attached | None = None
        self._pending: dict[str, dict[int, Factors]] = {}  # site -> index in its stack -> factors still to be written
        self._warned = False
        self._folds: bool | None = None

    @property
    def attached(self) -> Attached:
        """The model with LoRA.

        Raises:
            RuntimeError: the session was not entered.
        """
        if self._attached is None:
            raise RuntimeError("the session must be open: with open_session(...) as session")
        return self._attached

    def __enter__(self) -> "JaxSession":
        check_no_torch_settings(self._config, "JAX")
        if self._loss_fn is None:
            raise BatchError("a Flax model has no loss of its own: pass loss_fn=(model, batch) -> mean loss")
        with ExitStack() as stack:
            processes = self._processes()
            stack.enter_context(processes.together())
            binding = self._bind(self._loss_fn)
            stack.push(lambda kind, error, trace: binding.undo() if kind is not None else binding.finish())
            self._enter_mesh(binding, stack)
            check_concrete("init", binding.frozen)
            self._find_stacks(binding, self._loss_fn)
            places = {
                layer.name: (site.name, index)
                for site in binding.sites.values()
                for index, layer in enumerate(site.layers())
            }
            function = GradientFunction(binding, self._loss_fn, processes)
            self._attached = Attached(binding, function, places, processes)
            self.layers += [layer for site in binding.sites.values() for layer in site.layers()]
            self._exit = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, traceback: Any) -> None:
        self._exit.__exit__(kind, error, traceback)
        if kind is None:
            self.model = self.attached.binding.model

    def like(self, layer: str) -> Array:
        site = self.attached.binding.sites[self.attached.places[layer][0]]
        zero = jnp.zeros((), jnp.promote_types(site.dtype, jnp.float32))
        return put(zero, replicated(site.sharding))

    @property
    def folds(self) -> bool:
        if self._folds is None:
            self._folds = self._can_fold()
        return self._folds

    def fold_pass(self, states: dict[str, FoldState]) -> tuple[PassResult, dict[str, FoldState | None]]:
        loss, count, folds = self.attached.gradient_function.folds(self._batches, states)
        means = mean_folds(folds, count)
        calls = jax.device_get({name: fold.calls for name, fold in folds.items()})
        several = frozenset(name for name in calls if calls[name] > 1)  # in a batch unlike the first
        result = self._result(loss, count)._replace(not_folded=several)
        return result, {name: means[name] if calls[name] == 1 else None for name in calls}

    def sides_pass(self, sides: Mapping[str, Sides]) -> tuple[PassResult, dict[str, Products | None]]:
        result, products = self._products(sides)
        return result, dict(products)

    def exact_pass(self, consume: Callable[[str, Array], None]) -> PassResult:
        """Hand each layer's G to `consume`, read in the directions of its smaller side: all of them.

        So no gradient of a kernel is needed, which may be quantised. The G of all layers exist at the same time.
        """
        sides = {
            layer.name: whole_sides(self.ops, layer.out_features, layer.in_features, self.like(layer.name))
            for layer in self.layers
        }
        result, products = self._products(sides)
        for name in products:
            consume(name, whole_gradient(self.ops, products[name]))
        return result

    def mean_loss(self) -> PassResult:
        return PassResult(*self.attached.gradient_function.mean_loss(self._batches))

    def all_agree(self, decision: bool) -> bool:
        return self.attached.processes.agree(str(decision)) and decision

    def set_ranks(self, ranks: Mapping[str, int]) -> None:
        agreed, sites = self.attached.processes.least(ranks), self.attached.binding.sites
        for name, site in sites.items():
            sites[name] = replace(site, rank=agreed[site.layers()[0].name])
        self.layers = [layer for site in sites.values() for layer in site.layers()]

    def assign(self, layer: str, factors: Factors) -> None:
        name, index = self.attached.places[layer]
        site = self.attached.binding.sites[name]
        pending = self._pending.setdefault(site.name, {})
        pending[index] = factors
        if len(pending) == site.layout.count:  # a stack is written as a whole
            self.attached.binding.write(site.name, site.trained([pending[i] for i in range(site.layout.count)]))
            del self._pending[site.name]

    def peak_memory(self) -> int | None:
        device = jax.devices()[0]
        statistics = device.memory_stats() if device.platform != "cpu" else None
        return statistics.get("peak_bytes_in_use") if statistics else process_peak()

    def _processes(self) -> Processes:
        """Return the processes that the model is spread over, or the batches of a model that each process has."""
        is_one_of_several = jax.process_count() > 1 and not spans_processes(self.model)
        return Processes("lora_one.init", self._first_batch() if is_one_of_several else self.model)

    def _bind(self, loss_fn: LossFn) -> Binding:
        """Attach LoRA to the model, or find it there.

        Raises:
            ModelError: a model of an unknown kind.
        """
        model = self.model
        if isinstance(model, nnx.Module):
            binding = NnxBinding(model, self._config)
            if loss_fn is _no_pass and binding.has_magnitudes:
                binding.undo()
                raise ModelError(
                    "DoRA on JAX starts from batches: pass batches and loss_fn to init. A start without data is made "
                    "by the optimizer, which in optax never sees the base weights, whose norms are part of it"
                )
            return binding
        if self._config.dora:
            raise ModelError(f"dora=True on JAX is for a flax.nnx.Module, got {type(model).__name__}: leave it out")
        if isinstance(model, LinenModel) and not model.layouts and loss_fn is _no_pass:
            raise ModelError(
                "a Linen module shows its linear layers only in a call: pass batches and loss_fn to init, or hand in "
                f"the parameters alone, as {PytreeModel.__name__}(variables['params'])"
            )
        if isinstance(model, (LinenModel, PytreeModel)):
            return TreeBinding(model, self._config, self._first_batch(), loss_fn)
        raise ModelError(
            f"a JAX model must be a flax.nnx.Module, or a Linen module or pytree wrapped in {LinenModel.__name__} or "
            f"{PytreeModel.__name__} of lora_one.backends.jax, got {type(model).__name__}"
        )

    def _enter_mesh(self, binding: Binding, stack: ExitStack) -> None:
        """Use the mesh of the model's kernels, unless the user has set one."""
        shardings = [site.sharding for site in binding.sites.values()]
        meshes = [sharding.mesh for sharding in shardings if isinstance(sharding, NamedSharding)]
        if meshes and jax.sharding.get_abstract_mesh().empty:
            mesh: Any = meshes[0]
            stack.enter_context(jax.set_mesh(mesh))

    def _find_stacks(self, binding: Binding, loss_fn: LossFn) -> None:
        if not (isinstance(binding, NnxBinding) and binding.attached and (stacks := ambiguous_stacks(binding))):
            return
        for first in self._first_batch():  # the first pass raises the error for no batches
            binding.attach_again(find_stacks(binding, stacks, loss_fn, first))

    def _can_fold(self) -> bool:
        sites, function = self.attached.binding.sites, self.attached.gradient_function
        if not all(map(has_rows, sites.values())):
            return False
        try:
            for first in self._first_batch():
                return folds_once(function.fold_program(first, abstract_states(sites, self._config)), len(sites))
        except (TypeError, ValueError, AttributeError):  # a layer that does other things with its factors
            pass
        return False

    def _first_batch(self) -> list[Any]:
        """Return the first batch, if there is one; an iterator will yield it again."""
        first = list(islice(self._batches, 1))
        if isinstance(self._batches, Iterator):
            self._batches = chain(first, self._batches)
        return first

    def _products(self, sides: Mapping[str, Sides]) -> tuple[PassResult, dict[str, Products]]:
        sites, function = self.attached.binding.sites, self.attached.gradient_function
        factors = installed_sides(sites, sides)
        turns = []
        for columns in column_turns(sites, factors):
            loss, count, gradients = function.gradients(self._batches, columns)
            turns.append({name: sites[name].whole(leaves) for name, leaves in gradients.items()})
        return self._result(loss, count), products_by_layer(sites, sides, turns, factors)

    def _result(self, loss: float, count: int) -> PassResult:
        self._warn_of_left_out()
        sites, lost = self.attached.binding.sites, self.attached.gradient_function.rounded_away
        return PassResult(loss, count, {layer.name: lost[name] for name in lost for layer in sites[name].layers()})

    def _warn_of_left_out(self) -> None:
        """Warn once, after the first pass, which has seen what the loss does with each weight."""
        binding = self.attached.binding
        if self._config.targets == Config().targets and binding.attached and not self._warned:
            warn_of_left_out(*binding.weight_names(), self.attached.gradient_function.uses)
        self._warned = True


def _no_pass(model: Any, batch: Any) -> Any:
    raise RuntimeError("a session without batches makes no pass")


def open_session(model: Any, batches: Iterable[Any] | None, loss_fn: LossFn | None, config: Config) -> JaxSession:
    """See `lora_one.backends.interface.Backend`."""
    return JaxSession(model, batches, loss_fn, config)
