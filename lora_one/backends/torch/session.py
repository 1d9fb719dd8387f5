"""A PyTorch model during `init`: probes in, the gradients that LoRA would have out."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lora_one.backends.checks import check_reiterable
from lora_one.backends.interface import Layer, PassResult
from lora_one.config import Config
from lora_one.core.factors import Factors
from lora_one.core.gradient import Gradient, arrays_of
from lora_one.core.sketch import Probe
from lora_one.environment import process_peak
from lora_one.errors import BatchError

from .attachment.adapters import adapter_of, is_leftover
from .attachment.attach import Site, attach_lora, check_adapter_fits, find_sites
from .attachment.snapshot import Snapshot
from .attachment.starts import check_base_is_whole
from .attachment.wrappers import plain_names, unwrapped
from .files.state import is_frozen, train_adapter
from .linalg.precision import full_precision, no_reduced_matmul
from .ops import TorchOps
from .passes.batches import Evaluate, LossFn, check_depends, default_loss, device_of, losses
from .passes.distributed import all_agree, is_parallel, mean_over_processes, sum_over_processes
from .passes.frozen_linear import frozen_linears
from .passes.loss_scale import LossScale
from .passes.own_gradients import own_gradients
from .passes.recompute import Recompute
from .passes.sums import Sums
from .passes.tap import ROWS, WHOLE, Product, product_of, tap


class TorchSession:
    """See `lora_one.backends.interface.Session`."""

    def __init__(self, model: nn.Module, batches: Iterable[Any], loss_fn: LossFn | None, config: Config):
        self.ops = TorchOps()
        self.model = self._given = model
        self._adapted = False  # whether it had its adapter before, and not LoRA of our own
        self.layers: list[Layer] = []
        self._sites: dict[str, Site] = {}
        self._factors_found: dict[str, Factors] = {}
        self._batches = batches
        self._loss_fn = default_loss if loss_fn is None else loss_fn
        self._config = config

    def __enter__(self) -> "TorchSession":
        check_reiterable(self._batches, self._config)
        self._wrappers, self._context = ExitStack(), ExitStack()
        self.model = unwrapped(self.model)
        self._wrappers.enter_context(plain_names(self.model))
        self._found = Snapshot(self.model)
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
        self._context.close()
        self._attached.restore_requires_grad()
        self._found.restore_modes(self.model)
        self._wrappers.close()
        if self._adapted:
            self.model = self._given

    def _undo(self) -> None:
        self._context.close()
        self._found.restore()
        for name, factors in self._factors_found.items():
            self.assign(name, factors)
        self._wrappers.close()

    def _attach(self) -> None:
        adapted = adapter_of(self.model)
        if adapted is None or is_leftover(self.model, adapted):
            self.model = adapted = attach_lora(self.model, self._config)
        else:
            self._adapted = True
            check_adapter_fits(adapted, self._config)
            check_base_is_whole(adapted)
        sites = find_sites(adapted)
        self._sites = {site.layer.name: site for site in sites}
        self.layers = [site.layer for site in sites]
        if self._adapted:
            self._factors_found = {name: site.factors() for name, site in self._sites.items()}
            if is_frozen(adapted, sites[0].adapter):  # as `load` leaves it, unless it is told otherwise
                train_adapter(adapted, sites[0].adapter, True)
        self._attached = Snapshot(self.model)
        self.model.requires_grad_(False)
        _evaluation_mode(self.model)
        self._context.enter_context(_no_cache(self.model))
        self._context.enter_context(_no_fast_path())
        self._context.enter_context(no_reduced_matmul())
        self._context.enter_context(torch.enable_grad())
        # Passes over a few batches are not worth compiling for, and taps go through no compiled graph.
        self._context.enter_context(torch.compiler.set_stance("force_eager"))
        self._context.enter_context(frozen_linears(self.model))
        self._recompute = self._context.enter_context(Recompute(self.model, self._config.recompute, self._device))
        self._scale = LossScale(self.model, self._device)
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    @property
    def stacks_layers(self) -> bool:
        return self._device.type != "cpu"

    @property
    def _device(self) -> torch.device:
        return device_of(self.model)

    def like(self, layer: str) -> Tensor:
        weight = self._sites[layer].lora_A.weight
        return torch.empty((), device=weight.device, dtype=torch.promote_types(weight.dtype, torch.float32))

    def sketch_pass(self, probes: Mapping[str, Probe]) -> tuple[PassResult, dict[str, Tensor | None]]:
        gradients: dict[str, Tensor | None] = dict.fromkeys(probes)
        products = {name: product_of(probe) for name, probe in probes.items()}
        result, _ = self._pass(products, probes, gradients.__setitem__)
        return result, gradients

    def exact_pass(self, consume: Callable[[str, Gradient], None]) -> PassResult:
        """Layers whose factors are read, and not called, take a pass more, and keep their gradients up to its end."""

        def consume_precisely(name: str, gradient: Gradient) -> None:
            with full_precision(arrays_of(gradient)[0].device):  # once, and not at each of its many small operations
                consume(name, gradient)

        # Where matrices go in stacks, multiplying out costs next to nothing, and a launch for each product a lot.
        product = WHOLE if is_parallel() or self.stacks_layers else ROWS
        products = dict.fromkeys(self._sites, product)
        nothing: dict[str, Probe | None] = dict.fromkeys(self._sites)
        result, read = self._pass(products, nothing, consume_precisely, early=True)
        if read:
            _check_second_pass(self._batches, read)
            probes = {name: self._identity(name) for name in read}
            self._pass(dict.fromkeys(read, WHOLE), nothing | probes, consume_precisely)
        return result

    def _identity(self, name: str) -> Probe:
        """Beside it a factor's gradient is G itself."""
        layer, like = self._sites[name].layer, self.like(name)
        eye = torch.eye(min(layer.out_features, layer.in_features), device=like.device, dtype=like.dtype)
        return Probe("A" if layer.in_features <= layer.out_features else "B", eye)

    def _pass(
        self,
        products: Mapping[str, Product],
        probes: Mapping[str, Probe | None],
        consume: Callable[[str, Any], None],
        early: bool = False,
    ) -> tuple[PassResult, list[str]]:
        """Run all batches backward and hand on each layer's mean product; see `Sums` for when.

        A layer that no gradient reached is not handed over.

        Args:
            products: what to form of the layers that are called.
            probes: for whoever reads factors; the same products of those that `products` has.

        Returns:
            The result, and the layers whose factors somebody reads.
        """
        self._scale.begin_pass()
        sums = Sums(consume, early, self._scale)

        def backward(evaluate: Evaluate, index: int, last: bool) -> float:
            sums.next_batch(last)
            done = False
            while not done:
                sums.next_attempt()
                self._recompute.next_batch()
                loss, value = evaluate()
                check_depends(loss, index, called=bool(sums.seen), layer=next(iter(self._sites)))
                done = self._scale.backward(loss)
                del loss  # its graph, before there is another one
            return value

        with ExitStack() as stack:
            for name, probe in probes.items():
                sink = sums.add_read if name in products and probe is not None else sums.noticed
                stack.enter_context(own_gradients(self._sites[name], probe, partial(sink, name)))
            for name, product in products.items():
                layer, calls = self._sites[name].module, partial(sums.called, name)
                if not isinstance(layer.get_base_layer(), nn.MultiheadAttention):  # PEFT merges there, and unmerges
                    stack.enter_context(tap(layer, layer.get_base_layer(), product, partial(sums.add, name), calls))
            result = self._run(backward)
        for name, product in products.items():
            if is_parallel() and name not in sums.left:
                layer = self._sites[name].layer
                sums.left[name] = product.zero(layer.out_features, layer.in_features, self.like(name))
            if name in sums.left:
                total = sum_over_processes(sums.left.pop(name))
                consume(name, total if result.batches == 1 else total / result.batches)
        seen, read = (self._anywhere(names) for names in (sums.seen, sums.read))
        never_called = frozenset(self._sites) - frozenset(seen)
        return result._replace(never_called=never_called, rounded_away=self._scale.rounded_away()), read

    def _anywhere(self, names: set[str]) -> list[str]:
        """Those of the layers that are among the names in any process, in the model's order."""
        if is_parallel():
            mine = torch.tensor([name in names for name in self._sites], dtype=torch.int32, device=self._device)
            names = {
                name for name, any_has in zip(self._sites, sum_over_processes(mine).tolist(), strict=True) if any_has
            }
        return [name for name in self._sites if name in names]

    def mean_loss(self) -> PassResult:
        with torch.no_grad():
            return self._run(backward=None)

    def _run(self, backward: Callable[[Evaluate, int, bool], float] | None) -> PassResult:
        total, count = 0.0, 0
        for evaluate, last in losses(self.model, self._batches, self._loss_fn):
            count += 1
            total += evaluate()[1] if backward is None else backward(evaluate, count, last)
        return PassResult(*mean_over_processes(total, count, self._device))

    def all_agree(self, decision: bool) -> bool:
        return all_agree(decision, self._device)

    def assign(self, layer: str, factors: Factors) -> None:
        site = self._sites[layer]
        with torch.no_grad():
            site.lora_A.weight.copy_(factors.lora_A)
            site.lora_B.weight.copy_(factors.lora_B)

    def peak_memory(self) -> int | None:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return process_peak()


def open_session(model: nn.Module, batches: Iterable[Any], loss_fn: LossFn | None, config: Config) -> TorchSession:
    """See `lora_one.backends.interface.Backend`."""
    return TorchSession(model, batches, loss_fn, config)


def _check_second_pass(batches: Iterable[Any], read: list[str]) -> None:
    if isinstance(batches, Iterator):
        raise BatchError(
            f"batches are read twice, got a {type(batches).__name__} that can be read once: pass a list(...) of it. "
            f'(Of layers whose factors a fused kernel reads, gradient="exact" takes a second pass: {", ".join(read)})'
        )


@contextmanager
def _no_cache(model: nn.Module) -> Iterator[None]:
    """No key-value cache while gradients are wanted: it takes memory, and recomputing would write it twice."""
    # A decoder inside an encoder-decoder has a configuration of its own.
    every: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(config): config for config in every if hasattr(config, "use_cache")}.values()
    found = [(config, config.use_cache) for config in configs]
    for config, _ in found:
        config.use_cache = False
    try:
        yield
    finally:
        for config, use_cache in found:
            config.use_cache = use_cache


@contextmanager
def _no_fast_path() -> Iterator[None]:
    """nn.TransformerEncoderLayer and nn.MultiheadAttention call no layer of theirs in evaluation mode where nothing
    requires a gradient: one fused kernel reads the weights, and would leave LoRA out."""
    found = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(found)


def _evaluation_mode(model: nn.Module) -> None:
    """Dropout off. Layers that checkpoint their activations do so only while `training`, so they alone keep it.

    And bitsandbytes' 4-bit layers, which have no dropout, get it: without it, on a CPU with bfloat16 instructions, they
    repack their weights for good.
    """
    for module in model.modules():
        checkpoints = module.training and getattr(module, "gradient_checkpointing", False) is True
        module.training = checkpoints or hasattr(module, "support_avx512bf16_for_cpu")
