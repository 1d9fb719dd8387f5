"""Checks of batches, losses and optimizer settings, the same for every framework."""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from lora_one.config import Config
from lora_one.errors import BatchError, ConfigError, GradientError, UnderflowWarning, warn_user

AGAINST_OVERFLOW = "a float16 model overflows easily: use bfloat16 or float32, or look at the batches"
TOLERATED_UNDERFLOW = 0.01  # share of a layer's gradient norm that float16 may lose without a warning
# Options of `lora_one.optimizer` that only PyTorch's backend has -> what to do elsewhere.
_TORCH_OPTIONS = {
    "param_groups": ", and give these parameters an optimizer of their own beside it, by optax.partition or "
    "mlx.optimizers.MultiOptimizer",
    "fused": "",
}


def check_iterable(batches: Any) -> None:
    """Raise BatchError for batches that are no collection."""
    if not isinstance(batches, Iterable):
        raise BatchError(f"batches must be iterable, got {type(batches).__name__}")


def check_readings(batches: Iterator[Any], config: Config, folds: bool) -> None:
    """Raise BatchError if `init` reads the batches several times: an iterator can be read once.

    Args:
        folds: whether the session folds; if not, a sketch takes two passes at least.
    """
    passes = 1 if config.gradient == "exact" else max(config.pass_counts[-1], 1 if folds else 2)
    readings = passes + (config.gamma == "auto")
    if readings > 1:
        raise BatchError(
            f"batches are read {readings} times, got a {type(batches).__name__} that can be read once: "
            "pass a list(...) of it"
        )


def check_no_whole_modules(config: Config, framework: str) -> None:
    """Raise ConfigError for `modules_to_save`, in a backend that trains LoRA alone."""
    if config.modules_to_save:
        raise ConfigError(
            f"modules_to_save must be empty for a model of {framework}, got {config.modules_to_save}: leave it out, "
            "and train the head as your own parameters beside the LoRA ones"
        )


def check_no_torch_settings(config: Config, framework: str) -> None:
    """Raise ConfigError for the setting that only PyTorch's backend has, `recompute=True`."""
    if config.recompute is True:
        raise ConfigError(
            f"recompute=True is for PyTorch models, got it for a model of {framework}: leave it out, and checkpoint in "
            "the model itself"
        )


def check_optimizer_settings(reg: Any, damping: str, loraplus_lr_ratio: float = 1.0) -> None:
    """Raise ConfigError for an invalid setting of `lora_one.optimizer`. A `reg` that JAX traces is not checked."""
    if isinstance(reg, (int, float)) and reg < 0:
        raise ConfigError(f"reg must be >= 0, got {reg}")
    if damping not in ("absolute", "relative"):
        raise ConfigError(f'damping must be "absolute" or "relative", got {damping!r}')
    if not loraplus_lr_ratio > 0:  # not <=, which lets NaN through
        raise ConfigError(f"loraplus_lr_ratio must be > 0, got {loraplus_lr_ratio}")


def check_takes(optimizer: Callable[..., Any], options: Iterable[str], framework: str) -> None:
    """Raise ConfigError for options that PyTorch's optimizer has and a framework's has not."""
    for name in sorted(_TORCH_OPTIONS.keys() & set(options) - inspect.signature(optimizer).parameters.keys()):
        raise ConfigError(
            f"{name} is for PyTorch models, got it for the {framework} backend: leave it out{_TORCH_OPTIONS[name]}"
        )


def check_finite_loss(value: float, index: int) -> float:
    """Return the loss. Raise GradientError if it is not finite. Batches count from 1."""
    if not math.isfinite(value):
        raise GradientError(f"batch {index}: the loss must be finite, got {value}: look at this batch and its labels")
    return value


def with_last(batches: Iterable[Any]) -> Iterator[tuple[Any, bool]]:
    """Yield each batch, and whether it is the last.

    Raises:
        BatchError: there is none.
    """
    iterator = iter(batches)
    try:
        current = next(iterator)
    except StopIteration:
        raise BatchError("batches must hold at least one batch, got none") from None
    for following in iterator:
        yield current, False
        current = following
    yield current, True


def warn_of_underflow(rounded_away: Mapping[str, float], is_lost: str, remedy: str) -> None:
    """Warn of layers whose gradients no loss scale brings into float16's range.

    Args:
        rounded_away: layer -> the share of its gradient's norm that is lost.
        is_lost: the verb after that share.
        remedy: what keeps the gradients.
    """
    lost = {layer: share for layer, share in rounded_away.items() if share > TOLERATED_UNDERFLOW}
    if lost:
        worst = max(lost, key=lambda layer: lost[layer])
        warn_user(
            f"float16 cannot hold the gradients of {len(lost)} layers beside the others', at any loss scale; of that "
            f"of {worst} about {min(lost[worst], 1.0):.0%} {is_lost}, see `rounded_away` in the report: {remedy}",
            UnderflowWarning,
        )
