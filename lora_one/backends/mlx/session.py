"""An MLX model during `init`: probes in, LoRA's gradients out."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from lora_one.backends.checks import check_finite_loss, check_no_torch_settings, check_reiterable, with_last
from lora_one.backends.interface import Layer, PassResult
from lora_one.config import Config
from lora_one.core.factors import Factors
from lora_one.core.sketch import Probe

from .attach import Site, attach_lora, check_adapter_fits, find_sites, random_stream_kept
from .layout import read_factor, read_pairs, write_pairs
from .ops import MlxOps
from .passes.batches import LossFn, check_scalar, default_loss, to_mlx
from .passes.distributed import all_agree, mean_over_processes, sum_over_processes
from .passes.loss_scale import LossScale, Summaries, summary
from .passes.standins import installed, tapped
from .tree import Snapshot, train_without_dropout

Arrays = dict[str, mx.array]  # by site


class MlxSession:
    """See `lora_one.backends.interface.Session`. A mixture-of-experts layer counts as one layer an expert."""

    def __init__(self, model: nn.Module, batches: Iterable[Any], loss_fn: LossFn | None, config: Config):
        self.ops = MlxOps()
        self.model = model
        self.layers: list[Layer] = []
        self.stacks_layers = False
        self._sites: dict[str, Site] = {}
        self._pairs: dict[str, list[Factors]] = {}  # by site; written into the model by `_write`
        self._position: dict[str, tuple[str, int]] = {}  # layer -> its site, and which of its pairs
        self._batches = batches
        self._loss_fn = default_loss if loss_fn is None else loss_fn
        self._config = config

    def __enter__(self) -> "MlxSession":
        check_reiterable(self._batches, self._config)
        check_no_torch_settings(self._config, "MLX")
        self._found = Snapshot(self.model)
        # The model runs where its user lets it; what `core` computes with the gradients runs on the CPU, where the
        # decompositions are and where float32 products are float32, and not TF32 as on some GPUs.
        self._device = mx.default_device()
        self._context = ExitStack()
        self._context.enter_context(mx.stream(mx.cpu))
        try:
            self._attach()
        except BaseException:
            self._undo()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, traceback: Any) -> None:
        if kind is not None:
            self._undo()
            return
        try:
            self._write()
        except BaseException:
            self._undo()
            raise
        self._context.close()
        self._attached.restore_frozen()
        sites = self._sites.values()
        if not any(site.is_trainable for site in sites):  # an adapter that was loaded to look at it
            for site in sites:
                site.set_trainable(True)
        self._found.restore_modes(self.model)

    def _undo(self) -> None:
        self._context.close()
        self._found.restore()

    def _attach(self) -> None:
        sites = find_sites(self.model)
        if sites:
            check_adapter_fits(sites, self._config)
        else:
            with random_stream_kept():
                attach_lora(self.model, self._config)
            sites = find_sites(self.model)
        self._sites = {site.path: site for site in sites}
        self.layers = [layer for site in sites for layer in site.layers]
        for site in sites:
            self._pairs[site.path] = read_pairs(site.module)
            self._position.update({layer.name: (site.path, i) for i, layer in enumerate(site.layers)})
        self._attached = Snapshot(self.model)
        self._scale = LossScale(self.model)
        self._is_fitted = not self._scale.is_needed
        # What checkpointing hands to a block as its inputs is what is trainable in it: the probes must be.
        self.model.freeze()
        for site in sites:
            site.set_trainable(True)
        train_without_dropout(self.model)
        mx.reset_peak_memory()

    def like(self, layer: str) -> mx.array:
        module = self._sites[self._position[layer][0]].module
        return mx.zeros((), dtype=self.ops.at_least_float32(module.lora_a).dtype)

    def sketch_pass(self, probes: Mapping[str, Probe]) -> tuple[PassResult, dict[str, mx.array | None]]:
        with ExitStack() as stack:
            for site in self._sites.values():
                stack.enter_context(installed(site, [probes[layer.name] for layer in site.layers]))
            name = "lora_b" if next(iter(probes.values())).side == "A" else "lora_a"
            modules = {path: site.module for path, site in self._sites.items()}
            result, sums = self._backward(modules, name, mx.eval)
        gradients: dict[str, mx.array | None] = {}
        for path, site in self._sites.items():
            mean = sum_over_processes(sums.pop(path)) / result.batches
            each = read_factor(site.module, mean)
            gradients.update({layer.name: gradient for layer, gradient in zip(site.layers, each, strict=True)})
        return result, gradients

    def exact_pass(self, consume: Callable[[str, mx.array], None]) -> PassResult:
        with ExitStack() as stack:
            taps = {path: stack.enter_context(tapped(site)) for path, site in self._sites.items()}
            # The last batch's gradients stay unevaluated, so that below one layer after the other is computed,
            # decomposed and freed, the last first, as the backward pass comes to them.
            result, sums = self._backward(taps, "gradient", lambda *lazy: mx.eval(lazy[0]))
        for path in reversed(self._sites):
            mean = sum_over_processes(sums.pop(path)) / result.batches
            for index, layer in enumerate(self._sites[path].layers):
                consume(layer.name, mean[index] if mean.ndim == 3 else mean)
        return result

    def _backward(
        self, modules: Mapping[str, nn.Module], name: str, evaluate_last: Callable[..., None]
    ) -> tuple[PassResult, Arrays]:
        """The loss, and the sum over the batches of its gradient with respect to `modules[path][name]`.

        Args:
            evaluate_last: called with the last batch's loss and the sums, in the place of mx.eval.
        """
        values = {path: module[name] for path, module in modules.items()}

        def loss_of(values: Arrays, batch: Any, index: int, scale: float) -> tuple[mx.array, mx.array]:
            for path, value in values.items():
                modules[path][name] = value
            loss = check_scalar(self._loss_fn(self.model, batch), index)
            return (loss if scale == 1.0 else self.ops.at_least_float32(loss) * scale), loss

        def backward(batch: Any, index: int, scale: float) -> tuple[mx.array, Arrays]:
            with mx.stream(self._device):
                (_, loss), gradients = mx.value_and_grad(loss_of)(values, to_mlx(batch), index, scale)
            return loss, gradients if scale == 1.0 else {path: x / scale for path, x in gradients.items()}

        def summaries(batch: Any, index: int, scale: float) -> Summaries:
            loss, gradients = backward(batch, index, scale)
            each = {path: summary(gradients.pop(path)) for path in values}  # so that no gradient stays in memory
            mx.eval(loss, each)
            check_finite_loss(float(np.array(loss)), index)
            return {path: np.array(x) for path, x in each.items()}

        sums: Arrays = {}
        total, count = 0.0, 0
        try:
            for batch, last in with_last(self._batches):
                count += 1
                if not self._is_fitted:
                    self._scale.fit(partial(summaries, batch, count))
                loss, gradients = backward(batch, count, self._scale.value)
                sums = {path: sums[path] + gradients[path] for path in values} if sums else gradients
                del gradients  # or the sums could not take their place in memory
                (evaluate_last if last else mx.eval)(loss, sums)
                total += check_finite_loss(float(np.array(loss)), count)
        finally:
            for path, value in values.items():
                modules[path][name] = value
        if not self._is_fitted:
            self._is_fitted = True
            self._scale.warn()
        lost = self._scale.rounded_away
        rounded_away = {
            layer.name: lost[path] for path, site in self._sites.items() if path in lost for layer in site.layers
        }
        return PassResult(*mean_over_processes(total, count), rounded_away), sums

    def mean_loss(self) -> PassResult:
        self._write()
        total, count = 0.0, 0
        for batch, _ in with_last(self._batches):
            count += 1
            with mx.stream(self._device):
                loss = check_scalar(self._loss_fn(self.model, to_mlx(batch)), count)
            total += check_finite_loss(float(np.array(loss)), count)
        return PassResult(*mean_over_processes(total, count))

    def all_agree(self, decision: bool) -> bool:
        return all_agree(decision)

    def assign(self, layer: str, factors: Factors) -> None:
        path, index = self._position[layer]
        self._pairs[path][index] = factors

    def _write(self) -> None:
        for path, site in self._sites.items():
            write_pairs(site.module, self._pairs[path])
        mx.eval([[site.module.lora_a, site.module.lora_b] for site in self._sites.values()])

    def peak_memory(self) -> int | None:
        return mx.get_peak_memory()


def open_session(model: nn.Module, batches: Iterable[Any], loss_fn: LossFn | None, config: Config) -> MlxSession:
    """See `lora_one.backends.interface.Backend`."""
    return MlxSession(model, batches, loss_fn, config)
