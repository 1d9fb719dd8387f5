"""What lora-one raises. Each message says which layer or batch, what came, what was expected, and what to do.

An exception of the user's own, from their `loss_fn` or their batches, passes through unchanged. And what it warns of.
"""


class LoraOneError(Exception):
    """The base of everything that lora-one raises on purpose."""


class ConfigError(LoraOneError, ValueError):
    """A value in `Config`, in a call, or in a configuration file that cannot be."""


class BackendError(LoraOneError):
    """No backend for this model, one that does not fit it, or a framework that is not installed."""


class ModelError(LoraOneError, ValueError):
    """A model that LoRA-One cannot be attached to as asked: targets, ranks, or adapters that are in the way."""


class BatchError(LoraOneError, ValueError):
    """Batches or a loss that no gradient can be had from."""


class GradientError(LoraOneError, ArithmeticError):
    """A gradient or a loss that is not finite."""


class CheckpointError(LoraOneError):
    """An adapter folder that cannot be read or written, or does not belong to the model; lists all that is wrong."""

    def __init__(self, summary: str, problems: list[str] | None = None):
        self.problems = problems or []
        super().__init__("\n".join([summary, *(f"  - {problem}" for problem in self.problems)]))


class DataError(LoraOneError, ValueError):
    """A line of a data file that cannot be used, with its number and the reason."""


class InitWarning(UserWarning):
    """The base of what `init` warns of."""


class TargetsWarning(InitWarning):
    """Layers that "all-linear" suggests, but that no LoRA can be attached to, or none that LoRA-One can start."""


class AdapterWarning(InitWarning):
    """The adapter that an earlier call attached, in place, to the base model of this one: it is replaced."""


class ZeroGradientWarning(InitWarning):
    """Some layers have no gradient on the init batches, or are never called, and keep plain LoRA's start."""


class GammaWarning(InitWarning):
    """gamma="auto" found no gamma at which the initialised model is at least as good as the base model."""


class ChangingBatchesWarning(InitWarning):
    """The passes of a sketch did not see the same batches, so that they do not belong to one gradient."""


class UnderflowWarning(InitWarning):
    """Gradients that float16 cannot hold, at any scale of the loss."""
