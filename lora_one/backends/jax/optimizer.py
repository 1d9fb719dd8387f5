"""AdamW for LoRA, with the r x r preconditioner, as optax gradient transformations."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from lora_one.backends.checks import check_optimizer_settings
from lora_one.backends.waiting import optimizer_made, step_limits
from lora_one.config import Config
from lora_one.core.factors import Factors
from lora_one.core.precondition import Damping, precondition
from lora_one.errors import ConfigError, ModelError
from lora_one.report.deferred import StartSteps, check_start_steps

from .deferred import Start, with_start
from .layout import Layout
from .model_start import model_start
from .ops import JaxOps
from .pairs import StackAxes, find_pairs, pair_layouts
from .sites import Leaves

_OPS = JaxOps()


def scale_by_lora_preconditioner(
    reg: float | Array = 1e-6, damping: Damping = "absolute", stack_axes: StackAxes = None
) -> optax.GradientTransformationExtraArgs:
    """Precondition the gradients of LoRA pairs, in an `optax.chain` of your own; other leaves pass unchanged.

    gA <- (B^T B + reg I)^-1 gA and gB <- gB (A A^T + reg I)^-1, from the current A and B, in float32 or wider. A pair
    is two leaves that differ in `..._lora_a` and `..._lora_b` somewhere on their path, of shapes (stack..., in..., r)
    and (stack..., r, out...). Only r x r matrices are inverted, so sharded factors stay sharded.

    Args:
        reg: a number >= 0 that is added to the diagonal of the Gram matrices, 1e-6 by default; may be traced.
        damping: "absolute" (default) adds `reg` itself, "relative" adds `reg` times the mean eigenvalue.
        stack_axes: path of a pair -> number of axes in front that count matrices. Needed only where the shapes leave it
            open, as (8, 16, 8) and (8, 8, 16) do; `lora_one.optimizer` reads it from the model.

    Returns:
        A transformation without state. Its updates are float32 or wider, also for narrower factors.

    Raises:
        ConfigError: an invalid setting; `update` without params.
        ModelError: in `init` and `update`: a factor without its other, or whose shape does not fit it.

    Source: arXiv 2502.01235, Algorithm 1; `lora_one.core.precondition`.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from lora_one.backends.jax import scale_by_lora_preconditioner
        >>> params = {"kernel_lora_a": jnp.ones((4, 1)), "kernel_lora_b": jnp.ones((1, 3))}
        >>> tx = optax.chain(scale_by_lora_preconditioner(reg=0.0), optax.sgd(1.0))
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> [round(float(updates[name][0, 0]), 4) for name in ("kernel_lora_a", "kernel_lora_b")]
        [-0.3333, -0.25]
    """
    check_optimizer_settings(reg, damping)
    diagonal: Any = reg  # a traced array under optax.inject_hyperparams

    def init(params: Any) -> optax.EmptyState:
        pair_layouts(params, stack_axes)
        return optax.EmptyState()

    def update(updates: Any, state: optax.EmptyState, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        if params is None:
            raise ConfigError("the preconditioner needs the factors: call update(updates, state, params)")
        gradients, structure = jax.tree.flatten(updates)
        values = jax.tree.leaves(params)
        if len(values) != len(gradients):
            raise ModelError(f"updates and params must be the same tree, got {len(gradients)} and {len(values)} leaves")
        for places, layout in pair_layouts(params, stack_axes):
            pair, gradient = (Leaves(x[places.a], x[places.b]) for x in (values, gradients))
            gradients[places.a], gradients[places.b] = _direction(layout, pair, gradient, diagonal, damping)
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
    loraplus_lr_ratio: float | Array = 1.0,
    stack_axes: StackAxes = None,
    start_steps: StartSteps | None = None,
    gamma: float = Config().first_gamma,
    balance: float = Config().balance,
) -> optax.GradientTransformationExtraArgs:
    """Return AdamW on preconditioned gradients of LoRA factors, as one optax transformation.

    Use it where you have a tree of factors and no model; for a model, `lora_one.optimizer` also reads the stacked axes
    from it. The step is that of `lora_one.core.step.adamw`, which equals `torch.optim.AdamW` without preconditioner.

    Args:
        learning_rate: a number, 2e-4 by default, or an optax schedule.
        b1: decay of Adam's first moment, 0.9 by default.
        b2: decay of Adam's second moment, 0.999 by default.
        eps: added to the root of the second moment, 1e-8 by default.
        weight_decay: decoupled weight decay, 0 by default.
        reg: the preconditioner's `reg`, 1e-6 by default; None leaves the preconditioner out.
        damping: see `scale_by_lora_preconditioner`.
        loraplus_lr_ratio: learning rate of lora_B divided by that of lora_A, > 0, 1 by default (LoRA+, arXiv
            2402.12354); may be traced.
        stack_axes: see `scale_by_lora_preconditioner`.
        start_steps: of `lora_one.optimizer`; None (default) and 0 make no start. Otherwise the factors must be plain
            LoRA's, B = 0, and the transformation must be the last of its chain, since the changes that make the start
            are no directions to be scaled: clip before it.
        gamma, balance: of the start, as in `lora_one.Config`.

    Returns:
        A transformation whose moments are float32 or wider, also for narrower factors.

    Raises:
        ConfigError: an invalid setting.

    Source: arXiv 2502.01235, Algorithm 1.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from lora_one.backends.jax import lora_adamw
        >>> params = {"kernel_lora_a": jnp.ones((4, 1)), "kernel_lora_b": jnp.ones((1, 3))}
        >>> tx = lora_adamw(learning_rate=0.1)
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> round(float(optax.apply_updates(params, updates)["kernel_lora_a"][0, 0]), 4)
        0.9
    """
    check_optimizer_settings(reg, damping, 1.0 if isinstance(loraplus_lr_ratio, Array) else loraplus_lr_ratio)
    start = None
    if start_steps is not None:
        check_start_steps(start_steps)
        start = Start(gamma, balance, *step_limits(start_steps)) if start_steps else None
    return _adamw(learning_rate, b1, b2, eps, weight_decay, reg, damping, loraplus_lr_ratio, stack_axes, start)


def _adamw(
    learning_rate: Any,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    reg: float | Array | None,
    damping: Damping,
    loraplus_lr_ratio: float | Array,
    stack_axes: StackAxes,
    start: Start | None,
) -> optax.GradientTransformationExtraArgs:
    adam = (
        optax.identity() if reg is None else scale_by_lora_preconditioner(reg, damping, stack_axes),
        optax.scale_by_adam(b1, b2, eps),
    )
    after = (
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
        _scale_b(loraplus_lr_ratio),
    )
    if start is None:
        return _in_float32(optax.chain(*adam, *after))
    plain = optax.scale_by_adam(b1, b2, eps)
    return _in_float32(with_start(optax.chain(*adam), plain, optax.chain(*after), start, stack_axes))


def _in_float32(inner: Any) -> optax.GradientTransformationExtraArgs:
    """Return a transformation whose updates and state are float32 or wider."""

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
    start_steps: StartSteps | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Return AdamW for the LoRA factors of a JAX model, as an optax transformation: see `lora_one.optimizer`.

    Use it with `nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)` for an NNX model, and with `tx.init(model.lora)` for a
    `LinenModel` or `PytreeModel`. Settings mean what they mean in `lora_one.optimizer`; here `learning_rate` may also
    be an optax schedule.

    Args:
        start_steps: where a start is made, the transformation must be the last of its chain: clip before it. Each step
            of the start tells the report on the host what it did (jax.debug.callback). JAX calls a program with that
            from Python, does not keep it in its persistent cache, and does not export it. `lora_adamw` makes the same
            start without a report.

    Raises:
        ConfigError: an invalid setting.
        ModelError: no LoRA in the model; with `start_steps`, B is not zero.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> import lora_one
        >>> model = nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
        >>> def loss_fn(model, x):
        ...     return jnp.mean((model(x) - 1) ** 2)
        >>> x = jnp.ones((2, 4))
        >>> model, report = lora_one.init(model, [x], loss_fn, lora_one.Config(rank=1))
        >>> tx = lora_one.optimizer(model, learning_rate=1e-2, precondition=True)
        >>> trainer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
        >>> before = loss_fn(model, x)
        >>> _ = trainer.update(model, nnx.grad(loss_fn, argnums=nnx.DiffState(0, nnx.LoRAParam))(model, x))
        >>> bool(loss_fn(model, x) < before)
        True
    """
    check_optimizer_settings(reg, damping, loraplus_lr_ratio)
    start, stack_axes = model_start(model, start_steps)
    diagonal = reg if precondition else None
    tx = _adamw(learning_rate, *betas, eps, weight_decay, diagonal, damping, loraplus_lr_ratio, stack_axes, start)
    optimizer_made(model, tx.update)  # a named tuple cannot be referred to weakly
    return tx


# All pairs of one shape share one trace; in a step that is compiled as a whole this jit leaves nothing else behind.
@partial(jax.jit, static_argnames=("layout", "damping"))
def _direction(layout: Layout, pair: Leaves, gradient: Leaves, reg: Any, damping: Damping) -> Leaves:
    direction = precondition(_OPS, _mirrored(layout, pair), _mirrored(layout, gradient), reg, damping)
    a, b = direction.lora_B, direction.lora_A  # (n, in, r), (n, r, out)
    return Leaves(*layout.from_matrices(a, b))


def _mirrored(layout: Layout, leaves: Leaves) -> Factors:
    """Return the spec's pair of the transposed layer, (n, r, out) and (n, in, r); n only for a stack.

    The preconditioner treats both sides alike, so the numbers are the same, and no array is transposed.
    """
    rank, stack = layout.rank(leaves.a), [layout.shape[axis] for axis in layout.stack]
    return Factors(
        layout.in_front(leaves.b).reshape(*stack, rank, layout.out_features),
        layout.in_front(leaves.a).reshape(*stack, layout.in_features, rank),
    )


def _scale_b(ratio: float | Array) -> optax.GradientTransformation:
    if isinstance(ratio, (int, float)) and ratio == 1.0:
        return optax.identity()

    def scale(updates: Any, params: Any = None) -> Any:
        leaves, structure = jax.tree.flatten(updates)
        for places in find_pairs(updates).values():
            leaves[places.b] = leaves[places.b] * ratio
        return jax.tree.unflatten(structure, leaves)

    return optax.stateless(scale)


def _wide(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)
