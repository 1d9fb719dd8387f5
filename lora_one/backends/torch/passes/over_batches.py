"""Passes over all batches: forward for the mean loss, backward for a product of each layer's gradient."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn

from lora_one.backends.interface import PassResult
from lora_one.backends.torch.attachment.attach import Site
from lora_one.core.sketch import Probe

from .batches import Evaluate, LossFn, check_depends, device_of, losses
from .distributed import is_parallel, mean_over_processes, sum_over_processes
from .loss_scale import LossScale
from .own_gradients import own_gradients
from .recompute import Recompute
from .sums import Sums
from .tap import Product, tap


class Passes:
    """Runs passes over the batches of a session, on a model that is in `settings_for_passes`."""

    def __init__(
        self, model: nn.Module, sites: dict[str, Site], batches: Iterable[Any], loss_fn: LossFn, recompute: Recompute
    ):
        self.sites = sites
        self._model = model
        self._batches = batches
        self._loss_fn = loss_fn
        self._recompute = recompute
        self._device = device_of(model)
        self._scale = LossScale(model, self._device)

    def forward(self) -> PassResult:
        """Run all batches forward."""
        with torch.no_grad():
            return self._run(lambda evaluate, index, last: evaluate()[1])

    def backward(
        self,
        products: Mapping[str, Product],
        probes: Mapping[str, Probe | None],
        consume: Callable[[str, Any], None],
        early: bool = False,
    ) -> tuple[PassResult, list[str]]:
        """Run all batches backward and hand on each layer's mean product; see `Sums` for when.

        A layer that no gradient reached is not handed on.

        Args:
            products: what to form of the layers that are called.
            probes: for code that reads factors; they give the same products as those in `products`.

        Returns:
            The result, and the layers whose factors some code reads.
        """
        self._scale.begin_pass()
        sums = Sums(consume, early, self._scale)
        with ExitStack() as stack:
            for name, probe in probes.items():
                sink = sums.add_read if name in products and probe is not None else sums.noticed
                stack.enter_context(own_gradients(self.sites[name], probe, partial(sink, name)))
            for name, product in products.items():
                layer, on_call = self.sites[name].module, partial(sums.called, name)
                if not isinstance(layer.get_base_layer(), nn.MultiheadAttention):  # PEFT merges there, and unmerges
                    stack.enter_context(tap(layer, layer.get_base_layer(), product, partial(sums.add, name), on_call))
            result = self._run(partial(self._backward_on_batch, sums))
        for name, product in products.items():
            if is_parallel() and name not in sums.pending:
                site = self.sites[name]
                sums.pending[name] = product.zero(site.layer.out_features, site.layer.in_features, site.like())
            if name in sums.pending:
                total = sum_over_processes(sums.pending.pop(name))
                consume(name, total if result.batches == 1 else total / result.batches)
        seen, read = (self._in_any_process(names) for names in (sums.seen, sums.read))
        never_called = frozenset(self.sites) - frozenset(seen)
        return result._replace(never_called=never_called, rounded_away=self._scale.rounded_away()), read

    def _backward_on_batch(self, sums: Sums, evaluate: Evaluate, index: int, last: bool) -> float:
        sums.next_batch(last)
        done = False
        while not done:
            sums.next_attempt()
            self._recompute.next_batch()
            loss, value = evaluate()
            check_depends(loss, index, called=bool(sums.seen), layer=next(iter(self.sites)))
            done = self._scale.backward(loss)
            del loss  # frees its graph before the next one is built
        return value

    def _run(self, on_batch: Callable[[Evaluate, int, bool], float]) -> PassResult:
        total, count = 0.0, 0
        for evaluate, last in losses(self._model, self._batches, self._loss_fn):
            count += 1
            total += on_batch(evaluate, count, last)
        return PassResult(*mean_over_processes(total, count, self._device))

    def _in_any_process(self, names: set[str]) -> list[str]:
        """Return the layers that are among the names in any process, in the model's order."""
        if is_parallel():
            mine = torch.tensor([name in names for name in self.sites], dtype=torch.int32, device=self._device)
            counts = sum_over_processes(mine).tolist()
            names = {name for name, count in zip(self.sites, counts, strict=True) if count}
        return [name for name in self.sites if name in names]
