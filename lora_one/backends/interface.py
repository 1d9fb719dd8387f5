"""The seam between the algorithm and a framework's models: what a backend supplies to `lora_one.init`."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from lora_one.core.factors import Factors
from lora_one.core.ops import Array, Ops
from lora_one.core.spectrum import Probe


class Layer(NamedTuple):
    """One LoRA pair of a model."""

    name: str  # path of the module in the base model
    out_features: int
    in_features: int
    rank: int
    scaling: float


class PassResult(NamedTuple):
    """What one pass over all batches gave."""

    loss: float  # mean of the batches' losses
    batches: int


class Session(Protocol):
    """A model with LoRA attached, for the duration of one `init`. The model is in evaluation mode: no dropout.

    Used as a context manager: leaving it restores train/eval mode, requires_grad and hooks; leaving it by an exception
    also takes back the attachment, so that the model is as it was found.
    """

    ops: Ops
    model: Any  # what `init` returns: the model with its LoRA layers
    layers: list[Layer]

    def __enter__(self) -> "Session": ...

    def __exit__(self, *exception: Any) -> None: ...

    def like(self, layer: str) -> Array:
        """Any array on the device of the layer, in the dtype that its sketch is computed in: float32 or wider."""
        ...

    def sketch_pass(self, probes: Mapping[str, Probe]) -> tuple[PassResult, dict[str, Array | None]]:
        """Install the probes at scale 1, run all batches backward, take the probes out again.

        Returns:
            The mean over the batches of each zero factor's gradient; None for a layer that no gradient reached.
        """
        ...

    def exact_pass(self, consume: Callable[[str, Array], None]) -> PassResult:
        """Run all batches backward and hand each layer's mean G, (out, in), to `consume`, once, as soon as it is whole.

        A layer that no gradient reached is not handed over.
        """
        ...

    def mean_loss(self) -> PassResult:
        """A forward pass over all batches with the factors that are assigned now."""
        ...

    def assign(self, layer: str, factors: Factors) -> None:
        """Set a layer's LoRA factors."""
        ...

    def peak_memory(self) -> int | None:
        """Bytes: the device allocator's peak during this session, or the process's so far. None if unknown."""
        ...
