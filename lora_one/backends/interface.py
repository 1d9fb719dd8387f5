"""What a framework must supply: `Backend`, its module, and `Session`, a model of it during `init`."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from lora_one.config import Config
from lora_one.core.factors import Factors
from lora_one.core.gradient import Gradient
from lora_one.core.ops import Array, Ops
from lora_one.core.sketch import Probe

LossFn = Callable[[Any, Any], Any]  # (model, batch) -> mean loss, a scalar


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
    # Of a layer that computes in a dtype too short of range, the share of its gradient's norm that may be lost.
    rounded_away: Mapping[str, float] = MappingProxyType({})
    never_called: frozenset[str] = frozenset()  # layers that no forward pass called, nor read, if a backend knows


class Session(Protocol):
    """A model with LoRA attached, for the duration of one `init`. No dropout meanwhile.

    Used as a context manager: leaving it restores train/eval mode, requires_grad and hooks; leaving it by an exception
    also takes back the attachment, so that the model is as it was found.
    """

    model: Any  # what `init` returns: the model with its LoRA layers
    layers: list[Layer]

    @property
    def ops(self) -> Ops:
        """The operations on this framework's arrays."""
        ...

    @property
    def stacks_layers(self) -> bool:
        """Whether layers that are alike go through the algorithm together: where launches cost more than copies."""
        ...

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

    def exact_pass(self, consume: Callable[[str, Gradient], None]) -> PassResult:
        """Run all batches backward and hand each layer's mean G, (out, in), to `consume`, once, as soon as it is whole.

        A backend may leave G as a `RowProduct` where that is smaller. A layer that no gradient reached is not handed
        over.
        """
        ...

    def mean_loss(self) -> PassResult:
        """A forward pass over all batches with the factors that are assigned now."""
        ...

    def all_agree(self, decision: bool) -> bool:
        """Whether all processes of a parallel run decide so; each of them asks, at the same point.

        A decision that rests on decompositions may differ in their last digit: one process alone must not go on to a
        pass that waits for the others.
        """
        ...

    def assign(self, layer: str, factors: Factors) -> None:
        """Set a layer's LoRA factors."""
        ...

    def peak_memory(self) -> int | None:
        """Bytes: the device allocator's peak during this session, or the process's so far. None if unknown."""
        ...


class Backend(Protocol):
    """The module of a framework: everything that `lora_one.init`, `optimizer`, `save`, `load` and `merge` ask of it.

    `lora_one.backends.torch` is one, and docs/extending/backend.md walks through a small complete one. Errors are those
    of `lora_one.errors`; what they mean stands at the function of the same name in `lora_one.api`.
    """

    @property
    def ops(self) -> Ops:
        """The operations on this framework's arrays."""
        ...

    def open_session(self, model: Any, batches: Iterable[Any], loss_fn: LossFn | None, config: Config) -> Session:
        """Return a session that has not been entered yet: LoRA is attached when it is."""
        ...

    def attach_plain(self, model: Any, config: Config) -> Any:
        """Attach LoRA with its usual start, for comparison, drawn by `config.seed`. Return the model."""
        ...

    def optimizer(self, model: Any, *args: Any, **options: Any) -> Any:
        """Return AdamW for a model with LoRA layers, optionally preconditioned, of the framework's own kind."""
        ...

    def save(self, model: Any, path: Path) -> None:
        """Write the active adapter in PEFT's layout into `path`, an empty folder."""
        ...

    def load(self, model: Any, path: Path, trainable: bool) -> Any:
        """Open an adapter folder in PEFT's layout on its base model. Return the model."""
        ...

    def merge(self, model: Any, *args: Any, **options: Any) -> Any:
        """Add the adapter to the base weights, and take the LoRA layers out. Return the plain model."""
        ...
