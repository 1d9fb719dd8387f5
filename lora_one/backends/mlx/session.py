"""An MLX model during `init`: probes in, LoRA's gradients out."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
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


@dataclass(frozen=True)
class _Entered:
    """The state of a session between `__enter__` and `__exit__`."""

    before: Snapshot  # the model as it was given
    attached: Snapshot  # the model with LoRA, before anything was frozen for the passes
    context: ExitStack
    device: mx.Device  # the user's default, on which the model runs
    sites: dict[str, Site]  # by path
    pairs: dict[str, list[Factors]]  # by path; `_write` puts them into the model
    position: dict[str, tuple[str, int]]  # layer -> path of its site, and index of its pair there
    scale: LossScale


class MlxSession:
    """An MLX model during one `init`: see `lora_one.backends.interface.Session` for each method.

    Use it, inside a `with` block, to look at gradients yourself; `lora_one.init` opens its own. Entering the block
    attaches LoRA, or takes the adapter that is there. Leaving it restores train and eval modes and frozen parameters;
    leaving it by an exception makes the model what it was.

    Args:
        model: an mlx.nn.Module, plain or with mlx-lm's LoRA layers.
        batches: a collection of batches that can be read again.
        loss_fn: (model, batch) -> mean loss; None for mlx-lm's own loss.
        config: see `lora_one.Config`.

    Attributes:
        model: the model, which is changed in place.
        layers: the `Layer` of each LoRA pair, in the model's order, with one layer per expert; empty before the block.

    Raises:
        ModelError, BatchError: at the start of the block, if the model, the adapter or the batches are unsuitable.
        RuntimeError: a pass or an assignment outside the block.

    >>> import mlx.core as mx
    >>> import mlx.nn as nn
    >>> from lora_one import Config
    >>> mean_square = lambda model, batch: mx.mean(model(batch) ** 2)
    >>> config = Config(rank=2, gradient="exact")
    >>> with MlxSession(nn.Sequential(nn.Linear(8, 4)), [mx.ones((3, 8))], mean_square, config) as session:
    ...     result = session.exact_pass(lambda name, gradient: print(name, gradient.shape))
    layers.0 (4, 8)
    >>> result.batches
    1
    """

    def __init__(self, model: nn.Module, batches: Iterable[Any], loss_fn: LossFn | None, config: Config):
        self.ops = MlxOps()
        self.model = model
        self.layers: list[Layer] = []
        self.stacks_layers = False
        self._batches = batches
        self._loss_fn = default_loss if loss_fn is None else loss_fn
        self._config = config
        self._state: _Entered | None = None  # set inside the `with` block only

    @property
    def _entered(self) -> _Entered:
        if self._state is None:
            raise RuntimeError("a session works inside `with` only: with open_session(...) as session: ...")
        return self._state

    def __enter__(self) -> "MlxSession":
        check_reiterable(self._batches, self._config)
        check_no_torch_settings(self._config, "MLX")
        before = Snapshot(self.model)
        # The model runs on the user's device. What `core` computes with the gradients runs on the CPU: decompositions
        # exist only there, and float32 products are not TF32, as they are on some GPUs.
        device = mx.default_device()
        context = ExitStack()
        context.enter_context(mx.stream(mx.cpu))
        try:
            self._state = self._attach(before, context, device)
        except BaseException:
            _undo(context, before)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, traceback: Any) -> None:
        entered = self._entered
        try:
            if kind is None:
                self._write()
        except BaseException:
            _undo(entered.context, entered.before)
            raise
        finally:
            self._state = None
        if kind is not None:
            _undo(entered.context, entered.before)
            return
        entered.context.close()
        entered.attached.restore_frozen()
        sites = entered.sites.values()
        if not any(site.is_trainable for site in sites):  # an adapter that `load` has frozen
            for site in sites:
                site.set_trainable(True)
        entered.before.restore_modes(self.model)

    def _attach(self, before: Snapshot, context: ExitStack, device: mx.Device) -> _Entered:
        sites = find_sites(self.model)
        if sites:
            check_adapter_fits(sites, self._config)
        else:
            with random_stream_kept():
                attach_lora(self.model, self._config)
            sites = find_sites(self.model)
        self.layers = [layer for site in sites for layer in site.layers]
        entered = _Entered(
            before=before,
            attached=Snapshot(self.model),
            context=context,
            device=device,
            sites={site.path: site for site in sites},
            pairs={site.path: read_pairs(site.module) for site in sites},
            position={layer.name: (site.path, index) for site in sites for index, layer in enumerate(site.layers)},
            scale=LossScale(self.model),
        )
        # Checkpointing passes a block's trainable parameters as its inputs, so the probes must be trainable.
        self.model.freeze()
        for site in sites:
            site.set_trainable(True)
        train_without_dropout(self.model)
        mx.reset_peak_memory()
        return entered

    def like(self, layer: str) -> mx.array:
        path, _ = self._entered.position[layer]
        module = self._entered.sites[path].module
        return mx.zeros((), dtype=self.ops.at_least_float32(module.lora_a).dtype)

    def sketch_pass(self, probes: Mapping[str, Probe]) -> tuple[PassResult, dict[str, mx.array | None]]:
        sites = self._entered.sites
        with ExitStack() as stack:
            for site in sites.values():
                stack.enter_context(installed(site, [probes[layer.name] for layer in site.layers]))
            name = "lora_b" if next(iter(probes.values())).side == "A" else "lora_a"
            modules = {path: site.module for path, site in sites.items()}
            result, sums = self._backward(modules, name, mx.eval)
        gradients: dict[str, mx.array | None] = {}
        for path, site in sites.items():
            mean = sum_over_processes(sums.pop(path)) / result.batches
            of_layers = read_factor(site.module, mean)
            gradients.update({layer.name: gradient for layer, gradient in zip(site.layers, of_layers, strict=True)})
        return result, gradients

    def exact_pass(self, consume: Callable[[str, mx.array], None]) -> PassResult:
        sites = self._entered.sites
        with ExitStack() as stack:
            taps = {path: stack.enter_context(tapped(site)) for path, site in sites.items()}
            # The last batch's gradients stay unevaluated. So the loop below computes, decomposes and frees one layer
            # after the other, the last layer first, in the order of the backward pass.
            result, sums = self._backward(taps, "gradient", lambda *lazy: mx.eval(lazy[0]))
        for path in reversed(sites):
            mean = sum_over_processes(sums.pop(path)) / result.batches
            for index, layer in enumerate(sites[path].layers):
                consume(layer.name, mean[index] if mean.ndim == 3 else mean)
        return result

    def _backward(
        self, modules: Mapping[str, nn.Module], name: str, evaluate_last: Callable[..., None]
    ) -> tuple[PassResult, Arrays]:
        """Return the loss, and the sum over the batches of its gradient with respect to `modules[path][name]`.

        Args:
            evaluate_last: called with the last batch's loss and the sums, instead of mx.eval.
        """
        entered = self._entered
        values = {path: module[name] for path, module in modules.items()}

        def loss_of(values: Arrays, batch: Any, index: int, scale: float) -> tuple[mx.array, mx.array]:
            for path, value in values.items():
                modules[path][name] = value
            loss = check_scalar(self._loss_fn(self.model, batch), index)
            return (loss if scale == 1.0 else self.ops.at_least_float32(loss) * scale), loss

        def backward(batch: Any, index: int, scale: float) -> tuple[mx.array, Arrays]:
            with mx.stream(entered.device):
                (_, loss), gradients = mx.value_and_grad(loss_of)(values, to_mlx(batch), index, scale)
            return loss, gradients if scale == 1.0 else {path: x / scale for path, x in gradients.items()}

        def summaries(batch: Any, index: int, scale: float) -> Summaries:
            loss, gradients = backward(batch, index, scale)
            lazy = {path: summary(gradients.pop(path)) for path in values}  # so that no gradient stays in memory
            mx.eval(loss, lazy)
            check_finite_loss(float(np.array(loss)), index)
            return {path: np.array(x) for path, x in lazy.items()}

        sums: Arrays = {}
        total, count = 0.0, 0
        try:
            for batch, last in with_last(self._batches):
                count += 1
                if not entered.scale.is_fitted:
                    entered.scale.fit(partial(summaries, batch, count))
                loss, gradients = backward(batch, count, entered.scale.value)
                sums = {path: sums[path] + gradients[path] for path in values} if sums else gradients
                del gradients  # otherwise the sums could not reuse their memory
                (evaluate_last if last else mx.eval)(loss, sums)
                total += check_finite_loss(float(np.array(loss)), count)
        finally:
            for path, value in values.items():
                modules[path][name] = value
        if not entered.scale.is_fitted:
            entered.scale.finish()
        return self._result(total, count), sums

    def _result(self, total: float, count: int) -> PassResult:
        lost = self._entered.scale.rounded_away  # by path
        rounded_away = {
            layer.name: lost[path]
            for path, site in self._entered.sites.items()
            if path in lost
            for layer in site.layers
        }
        return PassResult(*mean_over_processes(total, count), rounded_away)

    def mean_loss(self) -> PassResult:
        self._write()
        total, count = 0.0, 0
        for batch, _ in with_last(self._batches):
            count += 1
            with mx.stream(self._entered.device):
                loss = check_scalar(self._loss_fn(self.model, to_mlx(batch)), count)
            total += check_finite_loss(float(np.array(loss)), count)
        return self._result(total, count)

    def all_agree(self, decision: bool) -> bool:
        return all_agree(decision)

    def assign(self, layer: str, factors: Factors) -> None:
        path, index = self._entered.position[layer]
        self._entered.pairs[path][index] = factors

    def _write(self) -> None:
        entered = self._entered
        for path, site in entered.sites.items():
            write_pairs(site.module, entered.pairs[path])
        mx.eval([[site.module.lora_a, site.module.lora_b] for site in entered.sites.values()])

    def peak_memory(self) -> int | None:
        return mx.get_peak_memory()


def open_session(model: nn.Module, batches: Iterable[Any], loss_fn: LossFn | None, config: Config) -> MlxSession:
    """See `lora_one.backends.interface.Backend`."""
    return MlxSession(model, batches, loss_fn, config)


def _undo(context: ExitStack, before: Snapshot) -> None:
    context.close()
    before.restore()
