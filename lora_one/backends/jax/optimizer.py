"""AdamW for LoRA, with the r x r preconditioner, as optax gradient transformations."""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from lora_one.backends.checks import check_optimizer_settings
from lora_one.core.factors import Factors
from lora_one.core.precondition import Damping, precondition
from lora_one.errors import ConfigError, ModelError

from .layout import Layout, plain_layout
from .ops import JaxOps
from .session import stacks_of
from .sites import Leaves

_OPS = JaxOps()
Path = tuple[str, ...]


class LoraPaths(NamedTuple):
    """Where the two leaves of a pair are in a list of a tree's leaves."""

    a: int
    b: int


def scale_by_lora_preconditioner(
    reg: float | Array = 1e-6, damping: Damping = "absolute", stack_axes: Mapping[Path, int] | None = None
) -> optax.GradientTransformationExtraArgs:
    """Precondition the gradients of LoRA pairs (arXiv 2502.01235, Algorithm 1); other leaves pass as they are.

    gA <- (B^T B + reg I)^-1 gA and gB <- gB (A A^T + reg I)^-1, from the current A and B, in float32 or wider: see
    `lora_one.core.precondition`. A pair is two leaves that differ in `..._lora_a` and `..._lora_b` somewhere on their
    path, of shapes (stack..., in..., r) and (stack..., r, out...). Only r x r matrices are inverted, so the factors
    keep their sharding.

    Args:
        reg: added to the diagonal of the Gram matrices, >= 0.
        damping: whether `reg` is "absolute" or "relative" to the mean eigenvalue.
        stack_axes: path of a pair -> axes in front that count matrices; needed only where the shapes leave it open, as
            (8, 16, 8) and (8, 8, 16) do. `lora_one.optimizer` reads it off the model.

    Returns:
        A transformation without state. Its updates are float32 or wider, also for narrower factors.

    Raises:
        ConfigError: a setting that cannot be; `update` without params.
        ModelError: in `init` and `update`: a factor without its other, or whose shape does not fit it.
    """
    check_optimizer_settings(reg, damping)
    added: Any = reg  # a traced array under optax.inject_hyperparams

    def init(params: Any) -> optax.EmptyState:
        _pairs(params, stack_axes)
        return optax.EmptyState()

    def update(updates: Any, state: optax.EmptyState, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        if params is None:
            raise ConfigError("the preconditioner needs the factors: call update(updates, state, params)")
        gradients, structure = jax.tree.flatten(updates)
        values = jax.tree.leaves(params)
        if len(values) != len(gradients):
            raise ModelError(f"updates and params must be the same tree, got {len(gradients)} and {len(values)} leaves")
        for paths, layout in _pairs(params, stack_axes):
            pair, gradient = (Leaves(x[paths.a], x[paths.b]) for x in (values, gradients))
            gradients[paths.a], gradients[paths.b] = _direction(layout, pair, gradient, added, damping)
        return jax.tree.unflatten(structure, gradients), state

    return optax.GradientTransformationExtraArgs(init, update)


def lora_adamw(
    learning_rate: Any = 2e-4,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    reg: float | Array | None = 1e-6,
    damping: Damping = "absolute",
    loraplus_lr_ratio: float = 1.0,
    stack_axes: Mapping[Path, int] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """AdamW on preconditioned gradients: the step of `lora_one.core.step.adamw`, which is torch.optim.AdamW's.

    Args:
        learning_rate: a number or an optax schedule.
        b1, b2, eps, weight_decay: Adam's; the decay is decoupled.
        reg: of the preconditioner; None leaves it out.
        damping, stack_axes: see `scale_by_lora_preconditioner`.
        loraplus_lr_ratio: lora_B's learning rate over lora_A's (LoRA+, arXiv 2402.12354).

    Returns:
        A transformation whose moments are float32 or wider, also for narrower factors.
    """
    inner = optax.chain(
        optax.identity() if reg is None else scale_by_lora_preconditioner(reg, damping, stack_axes),
        optax.scale_by_adam(b1, b2, eps),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
        _scale_b(loraplus_lr_ratio),
    )

    def init(params: Any) -> Any:
        return inner.init(_wide(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        return inner.update(_wide(updates), state, _wide(params), **extra)

    return optax.GradientTransformationExtraArgs(init, update)


def optimizer(
    model: Any,
    learning_rate: Any = 2e-4,
    weight_decay: float = 0.0,
    precondition: bool = False,
    reg: float = 1e-6,
    damping: Damping = "absolute",
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    loraplus_lr_ratio: float = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """AdamW for the LoRA factors of a model: `nnx.Optimizer(model, optimizer, wrt=nnx.LoRAParam)`.

    Args:
        model: what `init` or `load` returned, or any model with LoRA of a kind that `init` adopts.
        learning_rate: a number or an optax schedule.
        precondition: whether LoRA pairs are preconditioned.
        weight_decay, reg, damping, betas, eps, loraplus_lr_ratio: see `lora_adamw`.

    Raises:
        ConfigError: a setting that cannot be.
        ModelError: no LoRA in the model.
    """
    check_optimizer_settings(reg, damping, loraplus_lr_ratio)
    stack_axes = stacks_of(model)
    return lora_adamw(
        learning_rate,
        b1=betas[0],
        b2=betas[1],
        eps=eps,
        weight_decay=weight_decay,
        reg=reg if precondition else None,
        damping=damping,
        loraplus_lr_ratio=loraplus_lr_ratio,
        stack_axes=stack_axes,
    )


def _paths(tree: Any) -> dict[Path, LoraPaths]:
    """The LoRA pairs of a tree, in its order, by their path up to `..._lora`."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    sides: dict[str, dict[Path, int]] = {"a": {}, "b": {}}
    for index, (keys, _) in enumerate(leaves):
        names = tuple(_name(key) for key in keys)
        for at in range(len(names) - 1, -1, -1):
            if names[at].endswith(("lora_a", "lora_b")):
                side, stem = names[at][-1], names[at][:-2]
                sides[side][(*names[:at], stem)] = index
                break
    lonely = sorted(sides["a"].keys() ^ sides["b"].keys())
    if lonely:
        shown = "; ".join(f"{'.'.join(path)}_{'b' if path in sides['a'] else 'a'}" for path in lonely)
        raise ModelError(
            f"each lora_a needs its lora_b in the same tree, got none for: {shown}; is one of them masked or frozen?"
        )
    return {path: LoraPaths(index, sides["b"][path]) for path, index in sides["a"].items()}


def _pairs(tree: Any, stack_axes: Mapping[Path, int] | None) -> list[tuple[LoraPaths, Layout]]:
    """The LoRA pairs of a tree, each with the layout that its shapes give."""
    leaves = jax.tree.leaves(tree)
    known = stack_axes or {}
    return [
        (pair, _layout_of(path, leaves[pair.a].shape, leaves[pair.b].shape, known.get(path)))
        for path, pair in _paths(tree).items()
    ]


def _layout_of(path: Path, a: tuple[int, ...], b: tuple[int, ...], stack: int | None) -> Layout:
    most = min(len(a), len(b)) - 2
    fits = [n for n in range(most + 1) if a[:n] == b[:n] and a[-1] == b[n]]
    if stack is not None:
        fits = [n for n in fits if n == stack]
    if len(fits) != 1:
        what = "do not fit each other" if not fits else f"fit with {' or '.join(map(str, fits))} stacked axes"
        raise ModelError(
            f"{'.'.join(path)}_a and _b must be (stack..., in..., r) and (stack..., r, out...), got {a} and {b}, which "
            f"{what}" + ("" if not fits else f": say which with stack_axes={{{path!r}: ...}}")
        )
    n = fits[0]
    return plain_layout((*a[:-1], *b[n + 1 :]), len(a) - 1 - n, len(b) - 1 - n)


# One trace serves all pairs of a shape; in a step that is compiled as a whole, nothing else of it is left.
@partial(jax.jit, static_argnames=("layout", "damping"))
def _direction(layout: Layout, pair: Leaves, gradient: Leaves, reg: Any, damping: Damping) -> Leaves:
    found = precondition(_OPS, _mirrored(layout, pair), _mirrored(layout, gradient), reg, damping)
    return Leaves(found.lora_B.reshape(pair.a.shape), found.lora_A.reshape(pair.b.shape))


def _mirrored(layout: Layout, leaves: Leaves) -> Factors:
    """A pair of leaves as the spec's pair of the transposed layer: (n, r, out) and (n, in, r); n only for a stack.

    The preconditioner treats the sides alike, so these are the same numbers, and no array is transposed.
    """
    rank, stack = leaves.a.shape[-1], [layout.shape[axis] for axis in layout.stack]
    return Factors(
        leaves.b.reshape(*stack, rank, layout.out_features),
        leaves.a.reshape(*stack, layout.in_features, rank),
    )


def _scale_b(ratio: float) -> optax.GradientTransformation:
    if isinstance(ratio, (int, float)) and ratio == 1.0:
        return optax.identity()

    def scale(updates: Any, params: Any = None) -> Any:
        leaves, structure = jax.tree.flatten(updates)
        for paths in _paths(updates).values():
            leaves[paths.b] = leaves[paths.b] * ratio
        return jax.tree.unflatten(structure, leaves)

    return optax.stateless(scale)


def _wide(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)


def _name(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
