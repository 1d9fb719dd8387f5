"""A PyTorch model during `init`: probes go in, and the gradients that LoRA would have come out."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_one.backends.interface import Layer, PassResult
from lora_one.config import Config
from lora_one.core.factors import Factors
from lora_one.core.fold import FoldState
from lora_one.core.gradient import Gradient, arrays_of
from lora_one.core.sides import Products, Sides, whole_gradient, whole_sides
from lora_one.environment import process_peak
from lora_one.errors import BatchError

from .attachment.kinds import without_padding
from .attachment.optimizable import check_no_engine, check_no_experts
from .attachment.reversible import ReversibleAttachment
from .linalg.precision import full_precision
from .ops import TorchOps
from .passes.batches import LossFn, default_loss, device_of
from .passes.distributed import all_agree
from .passes.over_batches import Passes
from .passes.recompute import Recompute
from .passes.settings import settings_for_passes
from .passes.tap import WHOLE, from_flat, product_of, rows
from .processes import Processes


class _Entered(NamedTuple):
    """The state of a session between `__enter__` and `__exit__`."""

    attachment: ReversibleAttachment
    processes: Processes
    passes: Passes


class TorchSession:
    """A PyTorch model during one `init`: see `lora_one.backends.interface.Session` for each method.

    Use it, inside a `with` block, to look at gradients yourself; `lora_one.init` opens its own. Entering the block
    attaches LoRA, or takes the adapter that is there. Leaving it restores train/eval mode and requires_grad; leaving it
    by an exception makes the model what it was. In a parallel run every process must enter it.

    Args:
        model: a torch.nn.Module, plain or with a LoRA adapter of PEFT.
        batches: a collection of batches that can be read again.
        loss_fn: (model, batch) -> mean loss; None for the loss that a transformers model computes.
        config: see `lora_one.Config`.

    Attributes:
        model: the model with its LoRA layers, inside the block and after it.
        layers: the `Layer` of each LoRA pair, in the model's order; empty before the block.

    Raises:
        ModelError, BatchError: at the start of the block, if the model, the adapter or the batches are unsuitable.
        ProcessError: an error in another process of a parallel run, or one that did not enter the block.
        RuntimeError: a pass or an assignment outside the block.

    >>> import lora_one, torch
    >>> from lora_one.backends.torch import TorchSession
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
    >>> mean_square = lambda model, batch: model(batch).square().mean()
    >>> config = lora_one.Config(rank=2, targets=["0"], gradient="exact")
    >>> with TorchSession(model, [torch.ones(3, 8)], mean_square, config) as session:
    ...     result = session.exact_pass(lambda name, gradient: print(name, tuple(gradient.shape)))
    0 (4, 8)
    >>> result.batches
    1
    """

    def __init__(self, model: nn.Module, batches: Iterable[Any] | None, loss_fn: LossFn | None, config: Config):
        self.ops = TorchOps()
        self.model = self._given = model
        self.layers: list[Layer] = []
        self._batches: Iterable[Any] = () if batches is None else batches
        self._makes_passes = batches is not None
        self._loss_fn = default_loss if loss_fn is None else loss_fn
        self._config = config
        self._had_adapter = False
        self._state: _Entered | None = None  # set inside the `with` block only
        self._exit = ExitStack()

    def __enter__(self) -> "TorchSession":
        with ExitStack() as stack:
            processes = Processes("lora_one.init", alone=not self._makes_passes)
            stack.enter_context(processes.together())
            if not self._makes_passes:
                check_no_engine(self._given)  # the start would be left to an optimizer that cannot be made any more
            attachment = ReversibleAttachment(self._given, self._config)
            stack.push(attachment.close)
            attachment.attach()
            self.model, self._had_adapter = attachment.model, attachment.had_adapter
            self.layers = [site.layer for site in attachment.sites.values()]
            if not self._makes_passes:
                check_no_experts(attachment.sites.values())
            stack.enter_context(settings_for_passes(self.model))
            recompute = stack.enter_context(Recompute(self.model, self._config.recompute, self._device))
            passes = Passes(self.model, attachment.sites, self._batches, self._loss_fn, recompute, processes)
            if self._device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self._device)
            self._state, self._exit = _Entered(attachment, processes, passes), stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._state = None
        self._exit.__exit__(kind, error, trace)
        if self._had_adapter:
            self.model = self._given

    @property
    def stacks_layers(self) -> bool:
        return self._device.type != "cpu"

    def like(self, layer: str) -> Tensor:
        return self._passes.sites[layer].like()

    @property
    def folds(self) -> bool:
        return True

    def fold_pass(self, states: dict[str, FoldState]) -> tuple[PassResult, dict[str, FoldState | None]]:
        return self._passes.folds(self.ops, states, self.stacks_layers)

    def sides_pass(self, sides: Mapping[str, Sides]) -> tuple[PassResult, dict[str, Products | None]]:
        products: dict[str, Products | None] = dict.fromkeys(sides)

        def consume(name: str, total: Tensor) -> None:
            products[name] = from_flat(total, sides[name])

        forms = {name: product_of(directions) for name, directions in sides.items()}
        result, _ = self._passes.sums(forms, sides, consume)
        return result, products

    def exact_pass(self, consume: Callable[[str, Gradient], None]) -> PassResult:
        """Run all batches backward, as `Session.exact_pass` says.

        Layers whose factors are read without a call need a second pass, and keep their gradients until it ends.
        """

        def consume_precisely(name: str, gradient: Gradient) -> None:
            with full_precision(arrays_of(gradient)[0].device):  # once, instead of at each of many small operations
                consume(name, gradient)

        passes = self._passes
        # Where layers are stacked, multiplying out costs next to nothing, and a launch for each product costs a lot.
        product = WHOLE if passes.replicas.several or self.stacks_layers else rows
        result, read = passes.sums(dict.fromkeys(passes.sites, product), {}, consume_precisely, early=True)
        if read:
            _check_second_pass(self._batches, read)
            sides = {
                layer.name: whole_sides(self.ops, layer.out_features, layer.in_features, self.like(layer.name))
                for layer in self.layers
                if layer.name in read
            }
            for name, products in self.sides_pass(sides)[1].items():
                if products is not None:
                    consume(name, whole_gradient(self.ops, products))
        return result

    def mean_loss(self) -> PassResult:
        return self._passes.forward()

    def all_agree(self, decision: bool) -> bool:
        return all_agree(decision, self._device)

    def set_ranks(self, ranks: Mapping[str, int]) -> None:
        attachment, processes, _ = self._entered
        attachment.set_ranks(processes.least(ranks))
        self.layers = [site.layer for site in attachment.sites.values()]

    def assign(self, layer: str, factors: Factors) -> None:
        site = self._passes.sites[layer]
        site.assign(Factors(without_padding(site.module, factors.lora_A), factors.lora_B))

    def peak_memory(self) -> int | None:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return process_peak()

    @property
    def _device(self) -> torch.device:
        return device_of(self.model)

    @property
    def _entered(self) -> _Entered:
        if self._state is None:
            raise RuntimeError("a session works inside `with` only: with open_session(...) as session: ...")
        return self._state

    @property
    def _passes(self) -> Passes:
        return self._entered.passes


def open_session(
    model: nn.Module, batches: Iterable[Any] | None, loss_fn: LossFn | None, config: Config
) -> TorchSession:
    """Return a `TorchSession` of a model, to be entered with `with`. LoRA is attached when it is entered.

    This is PyTorch's part of `lora_one.init`. Use it to look at the gradients of a model with LoRA layers, or to try a
    start of your own.

    Args:
        model: a torch.nn.Module, plain or with a LoRA adapter of PEFT.
        batches: a collection of batches that can be read again.
        loss_fn: (model, batch) -> mean loss; None for the loss that a transformers model computes.
        config: see `lora_one.Config`.

    >>> import lora_one, torch
    >>> from lora_one.backends.torch import open_session
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
    >>> mean_square = lambda model, batch: model(batch).square().mean()
    >>> config = lora_one.Config(targets=["0"], rank=4)
    >>> with open_session(model, [torch.ones(3, 8)], mean_square, config) as session:
    ...     session.layers
    [Layer(name='0', out_features=4, in_features=8, rank=4, scaling=8.0, module='')]
    """
    return TorchSession(model, batches, loss_fn, config)


def _check_second_pass(batches: Iterable[Any], read: list[str]) -> None:
    if isinstance(batches, Iterator):
        raise BatchError(
            f"batches are read twice, got a {type(batches).__name__} that can be read once: pass a list(...) of it. "
            f'(Of layers whose factors a fused kernel reads, gradient="exact" takes a second pass: {", ".join(read)})'
        )
