"""Models whose start the optimizer is to make, and the reports that it fills in."""

import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from lora_one.checks import shown_names
from lora_one.config import Config
from lora_one.core.deferred import LEAST_STEPS, MOST_STEPS
from lora_one.errors import ModelError, UnfinishedStartWarning, ZeroGradientWarning, warn_user
from lora_one.report.deferred import DeferredReport, LayerStart, StartSteps, check_start_steps

from .interface import Layer

# By the model's id, since models of MLX have no hash.
_REPORTS: dict[int, DeferredReport] = {}
_OPTIMIZERS: dict[int, "weakref.ref[Any]"] = {}


class DeferredStart(NamedTuple):
    """What an optimizer needs in order to make a start.

    Attributes:
        report: to be filled in by `DeferredReport.record`.
        gamma, balance: of the start.
        least: steps that the start takes at least.
        most: steps that it takes at most. In between, `lora_one.core.deferred.settled` ends it.
    """

    report: DeferredReport
    gamma: float
    balance: float
    least: int
    most: int


def remember(model: Any, report: DeferredReport) -> None:
    """Keep the report of a model's deferred start for as long as the model lives."""
    _REPORTS[id(model)] = report
    weakref.finalize(model, _REPORTS.pop, id(model), None)


def forget(model: Any) -> None:
    """Drop what was kept of a model: its start was made otherwise, or its LoRA is gone."""
    _REPORTS.pop(id(model), None)


def report_of(model: Any) -> DeferredReport | None:
    """Return the report of a model's deferred start, also of one inside of wrappers; None if it has none."""
    return next((_REPORTS[id(part)] for part in _with_inner_models(model) if id(part) in _REPORTS), None)


def optimizer_made(model: Any, optimizer: Any) -> None:
    """Remember the optimizer that was made for a model, for as long as both live."""
    for part in _with_inner_models(model):
        _OPTIMIZERS[id(part)] = weakref.ref(optimizer)
        weakref.finalize(part, _OPTIMIZERS.pop, id(part), None)


def check_no_optimizer(model: Any) -> None:
    """Check that no optimizer was made for a model whose start is to be made by one.

    Raises:
        ModelError: there is one, and it would train the factors without making their start.
    """
    for part in _with_inner_models(model):
        made = _OPTIMIZERS.get(id(part))
        if made is not None and made() is not None:
            gc.collect()  # optimizers and schedulers refer to each other, so that those of an earlier run linger
            if made() is not None:
                raise ModelError(
                    "lora_one.init without batches must come before lora_one.optimizer, got a model with an optimizer, "
                    f"a {type(made()).__name__}: make the optimizer after init, and drop this one before"
                )


def new_report(backend: str, config: Config, layers: Sequence[Layer]) -> DeferredReport:
    """Return the report of a start that has not begun."""
    starts = [LayerStart(layer.name, layer.out_features, layer.in_features, layer.rank) for layer in layers]
    return DeferredReport(backend, config, starts)


def deferred_start(
    model: Any,
    start_steps: StartSteps | None,
    backend: str,
    layers: Callable[[], Sequence[Layer]],
    already_trained: Callable[[], Sequence[str]],
) -> DeferredStart | None:
    """Decide whether an optimizer makes a model's start: by default where `init` left it to the optimizer.

    Args:
        model: the model, as `init` returned it or as somebody else attached LoRA to it.
        start_steps: as given to `optimizer`.
        backend: name of the framework.
        layers: gives the model's trainable LoRA pairs. Called only if a start is to be made.
        already_trained: gives the names of the layers whose B is not zero. Called only then.

    Raises:
        ConfigError: an invalid number of steps.
        ModelError: B is not zero, or a rank is above a layer's size.
    """
    report = report_of(model)
    if report is not None and report.refresh is not None:
        report.refresh()
    if start_steps is None:
        start_steps = "auto" if report is not None and not report.done else 0
    check_start_steps(start_steps)
    if start_steps == 0:
        return None
    trained = already_trained()
    if trained:
        raise ModelError(
            f"a start from the first steps needs plain LoRA's start, B = 0, got another B in {len(trained)} layers: "
            f"{shown_names(trained, 3)}; to train on from here, pass "
            "start_steps=0; to resume a start, make the optimizer before the factors are loaded, and load its state too"
        )
    if report is None or report.done:
        report = new_report(backend, Config(), layers())
        for layer in report.layers:
            limit = min(layer.out_features, layer.in_features)
            if layer.rank > limit:
                raise ModelError(
                    f"layer {layer.name!r}: a start needs a rank <= min(out, in) = {limit}, got {layer.rank}; lower "
                    "the rank, or pass start_steps=0"
                )
        remember(model, report)
    report.start_steps = start_steps
    return DeferredStart(report, report.gamma, report.config.balance, *step_limits(start_steps))


def step_limits(start_steps: StartSteps) -> tuple[int, int]:
    """Return the least and the most steps of a start."""
    return (LEAST_STEPS, MOST_STEPS) if start_steps == "auto" else (start_steps, start_steps)


def _with_inner_models(model: Any) -> Iterator[Any]:
    """Yield a model and those that it wraps."""
    while model is not None:
        yield model
        model = getattr(model, "_orig_mod", None) or getattr(model, "module", None)


def warn_of_plain_layers(report: DeferredReport, warn: Callable[[str, type[Warning]], None] = warn_user) -> None:
    """Warn of the layers that no gradient reached while a start was made, if there are such.

    Args:
        warn: gets the message and its category.
    """
    if plain := report.plain_layers:
        warn(
            f"{len(plain)} of {len(report.layers)} layers had no gradient in the {report.steps} steps of LoRA-One's "
            f"start and keep plain LoRA's: {shown_names(plain)}",
            ZeroGradientWarning,
        )


def warn_of_unfinished_start(model: Any, what_has: str) -> None:
    """Warn if the optimizer has not made a model's start yet.

    Args:
        what_has: subject and verb of the sentence that says what this leaves.
    """
    report = report_of(model)
    if report is None:
        return
    now = report.summary()  # fills the report in
    if not report.done:
        warn_user(
            f"LoRA-One's start is not made yet, after {report.steps} steps, so {what_has} "
            f"{'an unfinished start' if report.steps else 'plain LoRA, untrained'}: {now}",
            UnfinishedStartWarning,
        )
