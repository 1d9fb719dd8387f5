"""Passes over all batches: forward for the mean loss, backward for a product of each layer's gradient."""

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lora_one.backends.interface import PassResult
from lora_one.backends.torch.attachment.attach import Site
from lora_one.backends.torch.attachment.sharding import is_sharded, reshard
from lora_one.backends.torch.attachment.tensor_parallel import group_size, whole_columns
from lora_one.backends.torch.processes import Processes
from lora_one.core.fold import FoldState, of_mean
from lora_one.core.ops import Ops
from lora_one.core.sides import Sides
from lora_one.core.stacking import stack_of, unstacked
from lora_one.errors import BatchError

from .arrivals import Arrivals, Collector, Postponed
from .batches import Evaluate, LossFn, check_depends, device_of, losses
from .distributed import Replicas
from .experts import Expert, tap_experts
from .folds import Folds, groups
from .loss_scale import LossScale
from .own_gradients import own_gradients
from .recompute import Recompute
from .sums import Sums
from .tap import NARROW_ROWS, Product, of_no_token, tap

_Item = tuple[Evaluate, bool]


class Passes:
    """Runs passes over the batches of a session, on a model that is in `settings_for_passes`."""

    def __init__(
        self,
        model: nn.Module,
        sites: dict[str, Site],
        batches: Iterable[Any],
        loss_fn: LossFn,
        recompute: Recompute,
        processes: Processes,
    ):
        self.sites = sites
        self.replicas = Replicas(processes, alone=group_size(model) > 1)
        self.read: frozenset[str] | None = None  # layers whose factors some code reads; None before the first pass
        self._model = model
        self._batches = batches
        self._loss_fn = loss_fn
        self._recompute = recompute
        self._processes = processes
        self._device = device_of(model)
        self._is_sharded, self._is_split = is_sharded(model), group_size(model) > 1
        self._scale = LossScale(model, self._device, can_repeat=not self._is_sharded)

    def forward(self) -> PassResult:
        """Run all batches forward."""
        with torch.no_grad():
            return self._run(lambda evaluate, index, last: evaluate()[1])

    def sums(
        self,
        products: Mapping[str, Product],
        sides: Mapping[str, Sides],
        consume: Callable[[str, Any], None],
        early: bool = False,
    ) -> tuple[PassResult, list[str]]:
        """Run all batches backward and hand on each layer's mean product; see `Sums` for when.

        A layer that no gradient reached is not handed on.

        Args:
            products: what to form of the layers that are called.
            sides: for layers whose factors some code reads; they give the same products as those in `products`.

        Returns:
            The result, and the layers whose factors some code reads.
        """
        sums = Sums(consume, early and not self.replicas.several)
        result, read = self._backward(sums, products, sides)
        for name, product in products.items():
            if self.replicas.several:
                site = self.sites[name]
                if name not in sums.pending:
                    sums.pending[name] = of_no_token(
                        product, site.layer.out_features, site.layer.in_features, site.like()
                    )
                self.replicas.sum(sums.pending[name])
            if name in sums.pending:
                sums.hand_on(name, result.batches)
        return result, read

    def folds(
        self, ops: Ops, states: dict[str, FoldState], in_stacks: bool
    ) -> tuple[PassResult, dict[str, FoldState | None]]:
        """Run all batches backward and renew the states: see `Session.fold_pass`; `in_stacks` as for `Folds`."""
        alone = {name for name, site in self.sites.items() if not in_stacks or site.is_embedding}
        kinds = {name: name if name in alone else _kind(state) for name, state in states.items()}
        folds = Folds(ops, states, kinds, in_stacks, lambda: self._recompute.active)
        result, read = self._backward(folds, dict.fromkeys(states, NARROW_ROWS), {})
        reached = self._in_any_process(folds.reached)
        means: dict[str, FoldState | None] = dict.fromkeys(states)
        stacks = groups(reached, kinds, most=math.ceil(len(reached) / self.replicas.size))
        merged = self.replicas.merge(ops, (stack_of(ops, [states.pop(name) for name in names]) for names in stacks))
        for names, state in zip(stacks, merged, strict=True):
            means.update(zip(names, unstacked(of_mean(ops, state, result.batches), len(names)), strict=True))
        return result._replace(not_folded=frozenset(read)), means

    def _backward(
        self, collector: Collector, products: Mapping[str, Product], sides: Mapping[str, Sides]
    ) -> tuple[PassResult, list[str]]:
        self._scale.begin_pass()
        # An error in the middle of a backward pass would leave the other processes waiting for its other layers.
        arrivals = Arrivals(Postponed(collector) if self._is_sharded else collector, self._scale)
        with ExitStack() as stack:
            # Engines put factors of their own there, and nothing reads those of a stack of experts.
            for name, site in self.sites.items() if not self._is_sharded else ():
                if site.expert is not None:
                    continue
                # Known from an earlier pass: where no code reads factors, zeros without memory will do.
                given = sides.get(name) if self.read is None or name in self.read else None
                sink = arrivals.add_read if given is not None else arrivals.noticed
                stack.enter_context(own_gradients(site, given, partial(sink, name)))
            for module, experts in self._experts(arrivals, products):
                stack.enter_context(tap_experts(module, experts))
            for name, product in products.items():
                if self.sites[name].expert is not None:
                    continue
                layer, on_call = self.sites[name].module, partial(arrivals.called, name)
                product = partial(_of_whole_columns, product, self.sites[name]) if self._is_split else product
                if not isinstance(layer.get_base_layer(), nn.MultiheadAttention):  # PEFT merges there, and unmerges
                    stack.enter_context(
                        tap(layer, layer.get_base_layer(), product, partial(arrivals.add, name), on_call)
                    )
            result = self._run(partial(self._backward_on_batch, arrivals))
        seen, read = (self._in_any_process(names) for names in (arrivals.seen, arrivals.read))
        self.read = frozenset(read) | (self.read or frozenset())
        never_called = frozenset(self.sites) - frozenset(seen)
        return result._replace(never_called=never_called, rounded_away=self._scale.rounded_away()), read

    def _experts(self, arrivals: Arrivals, products: Mapping[str, Product]) -> Iterator[tuple[nn.Module, list[Expert]]]:
        """Yield the parameters that hold experts, with those experts whose gradients are to be read."""
        of_module: dict[nn.Module, list[Expert]] = defaultdict(list)
        for name, product in products.items():
            site = self.sites[name]
            if site.expert is not None:
                of_module[site.module].append(
                    Expert(site, product, partial(arrivals.add, name), partial(arrivals.called, name))
                )
        yield from of_module.items()

    def _backward_on_batch(self, arrivals: Arrivals, evaluate: Evaluate, index: int, last: bool) -> float:
        arrivals.next_batch(last)
        done = False
        while not done:
            arrivals.next_attempt()
            self._recompute.next_batch()
            loss, value = evaluate()
            if self._is_split:
                self._check_same(value, index)
            check_depends(loss, index, called=bool(arrivals.seen), layer=next(iter(self.sites)))
            if self._is_sharded:
                self._processes.count()  # nobody waits in a backward pass for a process that has failed
            done = self._scale.backward(loss)
            del loss  # frees its graph before the next one is built
        arrivals.end_batch()
        return value

    def _run(self, on_batch: Callable[[Evaluate, int, bool], float]) -> PassResult:
        total, count = 0.0, 0
        of_process = losses(self._model, self._batches, self._loss_fn)
        for evaluate, last in self._in_step(of_process) if self._is_sharded else of_process:
            self._processes.check()
            count += 1
            total += on_batch(evaluate, count, last)
        self._processes.count()
        reshard(self._model)
        return PassResult(*self.replicas.mean(total, count, self._device))

    def _in_step(self, of_process: Iterator[_Item]) -> Iterator[_Item]:
        """Yield the batches while all processes have one: with sharded weights each batch needs all of them."""
        for count in itertools.count(1):
            item = next(of_process, None)
            going_on = self._processes.count(item is not None)
            if going_on == 0:
                return
            if item is None or going_on < self._processes.size:
                raise BatchError(
                    "sharded weights need the same number of batches in every process, got no batch "
                    f"{count} in {self._processes.size - going_on} of {self._processes.size}"
                )
            yield item

    def _check_same(self, value: float, index: int) -> None:
        values = self._processes.gather(value)
        if not all(math.isclose(x, value, rel_tol=1e-3) for x in values):
            raise BatchError(
                f"tensor parallelism needs the same batches in every process: batch {index} has losses of "
                f"{', '.join(f'{x:.6g}' for x in values)}"
            )

    def _in_any_process(self, names: set[str]) -> list[str]:
        """Return the layers that are among the names in any process, in the model's order."""
        if self.replicas.several:
            mine = torch.tensor([name in names for name in self.sites], dtype=torch.int32, device=self._device)
            counts = self.replicas.sum(mine).tolist()
            names = {name for name, count in zip(self.sites, counts, strict=True) if count}
        return [name for name in self.sites if name in names]


def _of_whole_columns(product: Product, site: Site, dy: Tensor, x: Tensor) -> Any:
    layer, weight = site.layer, site.weight
    return product(whole_columns(dy, layer.out_features, weight), whole_columns(x, layer.in_features, weight))


def _kind(state: FoldState) -> Hashable:
    """Return what the layers that are folded together have in common."""
    return *(x.shape for x in state), state.v.dtype, state.v.device
