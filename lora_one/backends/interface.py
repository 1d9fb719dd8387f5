"""The contract of a backend: `Backend`, the module of a framework, and `Session`, one model during `init`.

Everything that differs between frameworks is behind these two protocols; the algorithm itself is in `lora_one.core`.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from lora_one.config import Config
from lora_one.core.factors import Factors
from lora_one.core.fold import FoldState
from lora_one.core.gradient import Gradient
from lora_one.core.ops import Array, Ops
from lora_one.core.sides import Products, Sides

LossFn = Callable[[Any, Any], Any]  # (model, batch) -> mean loss, a scalar

IGNORED = -100  # the label of a token that does not count in the loss, as in transformers


class Layer(NamedTuple):
    """One LoRA pair of a model: the layer computes W x + scaling * B A x.

    A module with several weight matrices, a mixture of experts for example, is several layers. The name is unique in
    the model, and the same in every process and for every run: it seeds the layer's random test matrix.
    """

    name: str  # path of the module in the base model
    out_features: int  # rows of W
    in_features: int  # columns of W
    rank: int  # r of the pair
    scaling: float  # s, a plain number
    module: str = ""  # path of a module with several pairs in one array, such as experts: these have one rank


def followed_rank(config: Config, layer: Layer) -> int:
    """Return how many directions of a layer's gradient a start needs to know: its rank, or the largest it may get."""
    if config.rank_max is None:
        return layer.rank
    return min(config.rank_max, layer.out_features, layer.in_features)


class PassResult(NamedTuple):
    """The summary of one pass over all batches.

    In a parallel run it covers the batches of all processes, so that every process reports the same loss. A backend
    that does not know the last two leaves them at their defaults.
    """

    loss: float  # mean of the batches' losses
    batches: int
    # layer -> the share of its gradient's norm that float16 may have lost, for layers that compute in float16
    rounded_away: Mapping[str, float] = MappingProxyType({})
    never_called: frozenset[str] = frozenset()  # layers that no forward pass called, and whose weights none read
    not_folded: frozenset[str] = frozenset()  # after `fold_pass`: layers whose dy and x no code of the backend sees


class Session(Protocol):
    """A model with LoRA attached, during one call of `init`.

    A session is a context manager. Entering it attaches LoRA, unless the model has an adapter already, and switches
    dropout off. Leaving it restores train or eval mode, frozen parameters and hooks. Leaving it by an exception also
    takes LoRA out again, so that the model is as it was before. All other members are valid only inside the `with`.
    """

    model: Any  # what `init` returns; may be a new object after the session was left
    layers: list[Layer]  # filled on entering, in the order of the model

    @property
    def ops(self) -> Ops:
        """The operations on this framework's arrays.

        `lora_one.conformance.check_backend` tests an implementation of them.
        """
        ...

    @property
    def stacks_layers(self) -> bool:
        """Whether layers of equal shape go through the algorithm together, as one array with a leading axis.

        Return True on devices where launching an operation costs more than copying the arrays, GPUs for example.
        """
        ...

    def __enter__(self) -> "Session":
        """Check the settings, attach LoRA and fill `layers`. If this raises, the model must be as it was before."""
        ...

    def __exit__(self, *exception: Any) -> None:
        """Make the assigned factors the model's own, or, after an exception, put everything back."""
        ...

    def like(self, layer: str) -> Array:
        """Return any array on the device of the layer, in the dtype that its sketch is computed in.

        The dtype is float32 or wider, whatever the dtype of the weights. Only device and dtype are used, so a scalar
        is enough.
        """
        ...

    @property
    def folds(self) -> bool:
        """Whether `fold_pass` works for this model. If not, a start takes two passes instead of one."""
        ...

    def fold_pass(self, states: dict[str, FoldState]) -> tuple[PassResult, dict[str, FoldState | None]]:
        """Run all batches backward, and renew each layer's state by what each batch adds to its gradient.

        Call `lora_one.core.fold.fold` with the rows dy and x of the layer, or with their product. Rows of several small
        batches may wait and be folded together. In a parallel run the processes merge their states by `merge_folds`,
        so that all of them return the same.

        Args:
            states: one per layer, from `start_fold`; the dict may be emptied on the way, to free memory.

        Returns:
            The summary; and per layer the state of the mean over all batches, `of_mean`; None for a layer that no
            gradient reached. Layers in `not_folded` have none either: they need `sides_pass`.
        """
        ...

    def sides_pass(self, sides: Mapping[str, Sides]) -> tuple[PassResult, dict[str, Products | None]]:
        """Run all batches backward, and read each layer's mean gradient G, (out, in), in the given directions.

        The gradients of a LoRA pair give both products at once: see `lora_one.core.sides`. The scale is 1, and
        afterwards the factors are what they were before.

        Args:
            sides: of all layers, or of some.

        Returns:
            The summary; and per layer G right and G^T left, in the dtype of `like`; None for a layer that no gradient
            reached.
        """
        ...

    def exact_pass(self, consume: Callable[[str, Gradient], None]) -> PassResult:
        """Run all batches backward, and hand each layer's mean gradient G of W, (out, in), to `consume`.

        Call `consume` once per layer, as soon as the layer's G is complete, so that not all of them are in memory at
        the same time. Where that is smaller, G may be a `RowProduct`, two factors that are not multiplied. Leave out
        layers that no gradient reached.
        """
        ...

    def mean_loss(self) -> PassResult:
        """Run all batches forward, with the factors that were assigned last and the layers' own scaling."""
        ...

    def all_agree(self, decision: bool) -> bool:
        """Return whether `decision` is True in all processes of a parallel run; all of them ask at the same point.

        Decisions depend on decompositions, whose last digits may differ between processes, and one process alone must
        not begin a pass that waits for the others. A backend without parallel runs returns `decision`.
        """
        ...

    def set_ranks(self, ranks: Mapping[str, int]) -> None:
        """Give the pairs other ranks, at the same scaling, and renew `layers`; the factors are assigned afterwards.

        It is called for LoRA that the session attached, if the ranks are to follow the gradients (`Config.rank_max`).
        In a parallel run the least rank that any process asks for holds, so that all have the same.

        Args:
            ranks: of all layers; one for all layers of a `Layer.module`.
        """
        ...

    def assign(self, layer: str, factors: Factors) -> None:
        """Set the LoRA factors of a layer, lora_A (r, in) and lora_B (out, r).

        They come in the dtype of `like`, and the session casts them to the dtype in which the model keeps its factors.
        A layer can be assigned several times; the last one counts.
        """
        ...

    def peak_memory(self) -> int | None:
        """Return the peak memory in bytes: of the device during this session, or of the process so far.

        Return None if it is unknown.
        """
        ...


class Backend(Protocol):
    """The module of a framework: everything that `lora_one.init`, `optimizer`, `save`, `load` and `merge` ask of it.

    `lora_one.backends.torch` is one, and docs/extending/backend.md walks through a small complete one. Errors are those
    of `lora_one.errors`; the functions of the same names in `lora_one.api` say what they mean to a user.
    """

    @property
    def ops(self) -> Ops:
        """The operations on this framework's arrays: the same as `Session.ops`, for use without a model."""
        ...

    def open_session(
        self, model: Any, batches: Iterable[Any] | None, loss_fn: LossFn | None, config: Config
    ) -> Session:
        """Return a session for the model. It is not entered yet, so nothing is checked or changed here.

        Without batches, None, it makes no pass: it attaches LoRA and assigns plain factors, and needs no loss.

        The session iterates over `batches` once per pass. `loss_fn` is None if the caller gave none: then use the loss
        of the model, or raise BatchError if models of this framework have none.
        """
        ...

    def attach_plain(self, model: Any, config: Config) -> Any:
        """Attach LoRA with its usual start, A random and B zero, and return the model.

        It is the baseline that LoRA-One is compared with. The layers, ranks and scales are those that `open_session`
        attaches for the same `config`; A is drawn by `config.seed`.
        """
        ...

    def optimizer(self, model: Any, *args: Any, **options: Any) -> Any:
        """Return AdamW for a model with LoRA layers, as an optimizer of the framework's own type.

        It must accept `learning_rate`, `weight_decay`, `precondition`, `reg`, `damping` and `start_steps`. With
        `precondition=True` the gradients of LoRA pairs, and of nothing else, go through `lora_one.core.precondition`.
        `lora_one.backends.waiting.deferred_start` says whether the optimizer begins with `lora_one.core.deferred`.
        """
        ...

    def save(self, model: Any, path: Path) -> None:
        """Write the active adapter into `path`, an empty folder that exists.

        The layout is PEFT's, adapter_config.json and adapter_model.safetensors; `lora_one.checkpoint` writes it from
        NumPy arrays. The caller adds the report and moves the folder into its place when it is complete.
        """
        ...

    def load(self, model: Any, path: Path, trainable: bool) -> Any:
        """Attach the adapter in the folder `path` to its base model, and return the model.

        The factors are trainable only if `trainable`. If the folder does not fit the model, raise CheckpointError with
        all problems at once, and leave the model as it was before.
        """
        ...

    def merge(self, model: Any, *args: Any, **options: Any) -> Any:
        """Add scaling * B A to the base weights, take the LoRA layers out, and return the plain model.

        Compute the sum in float32 or wider, and cast it to the dtype of the weight once. Leave LoRA in the model if
        some layer cannot be merged.
        """
        ...
