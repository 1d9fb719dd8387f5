"""What can be wrong with batches, losses and an optimizer's settings in any framework."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

from lora_one.config import Config
from lora_one.errors import BatchError, ConfigError, GradientError


def check_reiterable(batches: Iterable[Any], config: Config) -> None:
    """Raises BatchError for an iterator that can be read only once where `init` reads the batches several times."""
    passes = (config.pass_counts[0] if config.gradient == "sketch" else 1) + (config.gamma == "auto")
    if not isinstance(batches, Iterable):
        raise BatchError(f"batches must be iterable, got {type(batches).__name__}")
    if passes > 1 and isinstance(batches, Iterator):
        raise BatchError(
            f"batches are read {passes} times, got a {type(batches).__name__} that can be read once: "
            "pass a list(...) of it"
        )


def check_no_torch_settings(config: Config, framework: str) -> None:
    """Raises ConfigError for what is PyTorch's alone: modules trained whole beside LoRA, blocks recomputed by us."""
    if config.modules_to_save:
        raise ConfigError(
            f"modules_to_save is for PyTorch models, got {config.modules_to_save} for a model of {framework}: leave it "
            "out, and train the head as your own parameters beside the LoRA ones"
        )
    if config.recompute is True:
        raise ConfigError(
            f"recompute=True is for PyTorch models, got it for a model of {framework}: leave it out, and checkpoint in "
            "the model itself"
        )


def check_optimizer_settings(reg: Any, damping: str, loraplus_lr_ratio: float = 1.0) -> None:
    """Raises ConfigError for a setting of `lora_one.optimizer` that cannot be. A traced `reg` is let through."""
    if isinstance(reg, (int, float)) and reg < 0:
        raise ConfigError(f"reg must be >= 0, got {reg}")
    if damping not in ("absolute", "relative"):
        raise ConfigError(f'damping must be "absolute" or "relative", got {damping!r}')
    if loraplus_lr_ratio <= 0:
        raise ConfigError(f"loraplus_lr_ratio must be > 0, got {loraplus_lr_ratio}")


def check_finite_loss(value: float, index: int) -> float:
    """Raises GradientError for a loss that is not finite. Batches count from 1."""
    if not math.isfinite(value):
        raise GradientError(f"batch {index}: the loss must be finite, got {value}: look at this batch and its labels")
    return value


def with_last(batches: Iterable[Any]) -> Iterator[tuple[Any, bool]]:
    """Each batch, and whether it is the last.

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
