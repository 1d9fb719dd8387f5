"""What lora-one raises and warns of.

Each message names the layer or batch, what was given, what was expected, and what to do. An exception of the user's
own, from `loss_fn` or the batches, passes through unchanged.
"""

import sys
import types
import warnings


class LoraOneError(Exception):
    """The base class of everything that lora-one raises on purpose."""


class ConfigError(LoraOneError, ValueError):
    """An invalid value in `Config`, in a call, or in a configuration file."""


class BackendError(LoraOneError):
    """No backend for this model, the wrong one, or a framework that is not installed."""


class ModelError(LoraOneError, ValueError):
    """A model that LoRA-One cannot be attached to as asked: wrong targets, ranks, or adapters already there."""


class BatchError(LoraOneError, ValueError):
    """Batches or a loss that give no gradient."""


class GradientError(LoraOneError, ArithmeticError):
    """A gradient or a loss that is not finite."""


class ProcessError(LoraOneError, RuntimeError):
    """Another process of a parallel run failed, whose rank and error it names, or did not make the same call."""


class CheckpointError(LoraOneError):
    """An adapter folder that cannot be read or written, or does not fit the model; it lists all problems.

    Attributes:
        problems: one sentence per problem; empty if the summary says it all.

    >>> print(CheckpointError("the adapter does not fit the model", ["up: lora_B is missing"]))
    the adapter does not fit the model
      - up: lora_B is missing
    """

    def __init__(self, summary: str, problems: list[str] | None = None):
        self.problems = problems or []
        super().__init__("\n".join([summary, *(f"  - {problem}" for problem in self.problems)]))


class DataError(LoraOneError, ValueError):
    """A line of a data file that cannot be used, with its number and the reason."""


class InitWarning(UserWarning):
    """The base class of what `init` warns of."""


class TargetsWarning(InitWarning):
    """Some layers that "all-linear" suggests are left out: LoRA cannot be attached, or LoRA-One cannot start them."""


class AdapterWarning(InitWarning):
    """The base model still has the adapter that an earlier call attached in place; this call replaces it."""


class ZeroGradientWarning(InitWarning):
    """Some layers have no gradient on the init batches, or are never called, and keep plain LoRA's start."""


class UnfinishedStartWarning(InitWarning):
    """The optimizer has not made the model's start yet, so that what is saved, or merged, is not LoRA-One's."""


class GammaWarning(InitWarning):
    """No gamma that gamma="auto" tried makes the initialised model at least as good as the base model."""


class ChangingBatchesWarning(InitWarning):
    """The passes of a sketch did not see the same batches, so their results do not belong to one gradient."""


class UnderflowWarning(InitWarning):
    """Some gradients are too small for float16 at any scale of the loss."""


def warn_user(message: str, category: type[Warning]) -> None:
    """Warn, and name the user's line: the one that called into lora_one, however deep the warning arises."""
    frame: types.FrameType | None = sys._getframe()
    level = ours = 1
    while frame is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] == __package__:
            ours = level  # the outermost frame of lora_one so far
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=ours + 1)
