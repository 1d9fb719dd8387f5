"""An MLX model during `init`: passes that read the rows dy and x of each layer."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from lora_one.backends.checks import check_no_torch_settings
from lora_one.backends.interface import Layer, PassResult
from lora_one.config import Config
from lora_one.core.factors import Factors
from lora_one.core.fold import FoldState
from lora_one.core.gradient import RowProduct, as_matrix
from lora_one.core.sides import Products, Sides, products_with

from .attach import Site, attach_lora, check_adapter_fits, find_sites, random_stream_kept
from .dora import renew_magnitude
from .layout import read_pairs, write_pairs
from .ops import MlxOps
from .passes.batches import LossFn, default_loss
from .passes.distributed import all_agree, least_of_processes
from .passes.folding import Folding
from .passes.loss_scale import LossScale
from .passes.over_batches import Passes
from .passes.sums import Arrays, Sums
from .processes import Processes
from .tree import Snapshot, train_without_dropout
from .whole import train_whole, whole_modules


@dataclass(frozen=True)
class _Entered:
    """The state of a session between `__enter__` and `__exit__`."""

    before: Snapshot  # the model as it was given
    attached: Snapshot  # the model with LoRA, before anything was frozen for the passes
    passes: Passes
    sites: dict[str, Site]  # by path
    pairs: dict[str, list[Factors]]  # by path; `_write` puts them into the model
    position: dict[str, tuple[str, int]]  # layer -> path of its site, and index of its pair there


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

    def __init__(self, model: nn.Module, batches: Iterable[Any] | None, loss_fn: LossFn | None, config: Config):
        self.ops = MlxOps()
        self.model = model
        self.layers: list[Layer] = []
        self.stacks_layers = False
        self._batches: Iterable[Any] = () if batches is None else batches
        self._makes_passes = batches is not None
        self._loss_fn = default_loss if loss_fn is None else loss_fn
        self._config = config
        self._state: _Entered | None = None  # set inside the `with` block only
        self._exit = ExitStack()

    @property
    def _entered(self) -> _Entered:
        if self._state is None:
            raise RuntimeError("a session works inside `with` only: with open_session(...) as session: ...")
        return self._state

    def __enter__(self) -> "MlxSession":
        check_no_torch_settings(self._config, "MLX")
        before = Snapshot(self.model)
        # The model runs on the user's device. What `core` computes with the gradients runs on the CPU: decompositions
        # exist only there, and float32 products are not TF32, as they are on some GPUs.
        device = mx.default_device()
        with ExitStack() as stack:
            processes = Processes("lora_one.init", alone=not self._makes_passes)
            stack.enter_context(processes.together())
            stack.push(lambda kind, error, trace: before.restore() if kind is not None else None)
            stack.enter_context(mx.stream(mx.cpu))
            self._state = self._attach(before, device, processes)
            stack.push(lambda kind, error, trace: self._write() if kind is None else None)
            self._exit = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, traceback: Any) -> None:
        entered = self._entered
        try:
            self._exit.__exit__(kind, error, traceback)
        finally:
            self._state = None
        if kind is not None:
            return
        entered.attached.restore_frozen()
        sites = entered.sites.values()
        if not any(site.is_trainable for site in sites):  # an adapter that `load` has frozen
            for site in sites:
                site.set_trainable(True)
            train_whole(whole_modules(self.model).values())
        entered.before.restore_modes(self.model)

    def _attach(self, before: Snapshot, device: mx.Device, processes: Processes) -> _Entered:
        sites = find_sites(self.model)
        if sites:
            check_adapter_fits(self.model, sites, self._config)
        else:
            with random_stream_kept():
                attach_lora(self.model, self._config)
            sites = find_sites(self.model)
        self.layers = [layer for site in sites for layer in site.layers]
        by_path = {site.path: site for site in sites}
        entered = _Entered(
            before=before,
            attached=Snapshot(self.model),
            passes=Passes(self.model, by_path, self._batches, self._loss_fn, device, LossScale(self.model), processes),
            sites=by_path,
            pairs={site.path: read_pairs(site.module) for site in sites},
            position={layer.name: (site.path, index) for site in sites for index, layer in enumerate(site.layers)},
        )
        self.model.freeze()  # checkpointing passes a block's trainable parameters as inputs: the taps' own suffice
        train_without_dropout(self.model)
        mx.reset_peak_memory()
        return entered

    def like(self, layer: str) -> mx.array:
        path, _ = self._entered.position[layer]
        module = self._entered.sites[path].module
        return mx.zeros((), dtype=self.ops.at_least_float32(module.lora_a).dtype)

    @property
    def folds(self) -> bool:
        return True

    def fold_pass(self, states: dict[str, FoldState]) -> tuple[PassResult, dict[str, FoldState | None]]:
        folding = Folding(states)
        result = self._entered.passes.backward(folding.add)
        return result, {layer.name: folding.pop_mean(layer, result.batches) for layer in self.layers}

    def sides_pass(self, sides: Mapping[str, Sides]) -> tuple[PassResult, dict[str, Products | None]]:
        def products(layer: Layer, rows: RowProduct) -> Arrays:
            return products_with(self.ops, rows, sides[layer.name])

        sums = Sums(products)
        result = self._entered.passes.backward(
            lambda layer, rows, is_last: sums.add(layer, rows, is_last) if layer.name in sides else None
        )
        means = {layer.name: self._mean(sums, layer, result) for layer in self.layers if layer.name in sides}
        return result, {name: None if mean is None else Products(*mean) for name, mean in means.items()}

    def exact_pass(self, consume: Callable[[str, mx.array], None]) -> PassResult:
        def gradient(layer: Layer, rows: RowProduct) -> Arrays:
            with mx.stream(self._entered.passes.device):
                return (as_matrix(self.ops, rows),)

        # The last batch's gradients stay unevaluated. So the loop below computes, decomposes and frees one layer after
        # the other, the last layer first, in the order of the backward pass.
        sums = Sums(gradient, is_last_lazy=True)
        result = self._entered.passes.backward(sums.add)
        for layer in reversed(self.layers):
            mean = self._mean(sums, layer, result)
            if mean is not None:
                consume(layer.name, mean[0])
        return result

    def _mean(self, sums: Sums, layer: Layer, result: PassResult) -> Arrays | None:
        return sums.pop_mean(layer, result.batches, self.like(layer.name))

    def mean_loss(self) -> PassResult:
        self._write()
        return self._entered.passes.forward()

    def all_agree(self, decision: bool) -> bool:
        return all_agree(decision)

    def set_ranks(self, ranks: Mapping[str, int]) -> None:
        agreed = least_of_processes(ranks)  # the modules get their ranks with their factors, by `_write`
        self.layers = [layer._replace(rank=agreed[layer.name]) for layer in self.layers]

    def assign(self, layer: str, factors: Factors) -> None:
        path, index = self._entered.position[layer]
        self._entered.pairs[path][index] = factors

    def _write(self) -> None:
        entered = self._entered
        for path, site in entered.sites.items():
            write_pairs(site.module, entered.pairs[path])
            renew_magnitude(site.module)
        mx.eval([[site.module[name] for name in site.names] for site in entered.sites.values()])

    def peak_memory(self) -> int | None:
        return mx.get_peak_memory()


def open_session(model: nn.Module, batches: Iterable[Any] | None, loss_fn: LossFn | None, config: Config) -> MlxSession:
    """See `lora_one.backends.interface.Backend`."""
    return MlxSession(model, batches, loss_fn, config)
