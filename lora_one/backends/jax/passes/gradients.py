"""The loss of a model and its gradients by the factors, as compiled functions of factors and a batch."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_one.backends.checks import check_finite_loss, with_last
from lora_one.backends.interface import LossFn
from lora_one.backends.jax.sites import Binding, Leaves

from .batches import arrays_and_rest, check_loss, rejoin
from .loss_scale import STEP, LossScale, all_finite, computes_in_float16
from .uses import Uses, uses_of

Gradients = dict[str, Leaves]  # site -> its factors, or their gradients


class Scale(NamedTuple):
    """A `LossScale` as the compiled step gets it."""

    value: Any  # (), float32
    is_last: Any  # (), bool


class GradientFunction:
    """The loss of a model over batches, with or without gradients.

    The frozen weights are arguments of the compiled functions: XLA would spend minutes on folding constants. Each pass
    takes the gradients of both factors, although one of them is zero: so one compilation serves all passes, and the sum
    over the batches is updated where it lies.

    Attributes:
        step: the compiled function of one batch with gradients: (sums, factors, frozen, scale, arrays, rest) -> (loss,
            new sums, whether all gradients are finite).
        uses: what the loss does with the frozen arrays; filled by the first pass.
    """

    def __init__(self, binding: Binding, loss_fn: LossFn):
        self._binding = binding
        self._batch = 0  # the number of the current batch, for errors raised while tracing
        self._scale: LossScale | None = None  # set by the first pass
        self.uses = Uses(set(), set())

        def loss(factors: Gradients, frozen: Any, arrays: list[Any], rest: Any) -> jax.Array:
            # Overrides the user's precision flags: the error of TF32 and bf16 exceeds a small singular value.
            with jax.default_matmul_precision("highest"):
                return check_loss(binding.loss(loss_fn, frozen, factors, rejoin(arrays, rest)), self._batch)

        def step(total: Gradients, factors: Gradients, frozen: Any, scale: Scale, arrays: list[Any], rest: Any) -> Any:
            def wide_loss(factors: Gradients) -> jax.Array:
                value = loss(factors, frozen, arrays, rest)
                return value.astype(jnp.promote_types(value.dtype, jnp.float32))

            value, pullback = jax.vjp(wide_loss, factors)
            (gradients,) = pullback(scale.value.astype(value.dtype))
            finite = all_finite(gradients)
            added = jax.tree.map(
                lambda sum, x: jnp.where(finite | scale.is_last, sum + x / scale.value.astype(x.dtype), sum),
                total,
                gradients,
            )
            return value, added, finite

        self._loss: Any = jax.jit(loss, static_argnums=3)
        # The sums keep their sharding, or the next batch would find another one and compile again.
        shardings = {name: site.shardings() for name, site in binding.sites.items()}
        self.step: Any = jax.jit(step, static_argnums=5, donate_argnums=0, out_shardings=(None, shardings, None))

    def gradients(self, batches: Iterable[Any], factors: Gradients) -> tuple[float, int, Gradients]:
        """Run all batches backward.

        Returns:
            The mean loss, the number of batches, and the mean gradients of the factors.

        Raises:
            BatchError: no batches, or a loss that has no gradient.
            GradientError: a loss that is not finite.
        """
        total = jax.tree.map(_zeros, factors)

        def run(arrays: list[Any], rest: Any) -> Any:
            nonlocal total
            frozen = self._binding.frozen
            if self._scale is None:  # the call below reuses the trace made here
                traced = self.step.trace(total, factors, frozen, _as_arrays(LossScale(False)), arrays, rest)
                program = getattr(traced.jaxpr, "jaxpr", traced.jaxpr)  # closed or not, depending on JAX's version
                self._scale = LossScale(computes_in_float16(program))
                before = len(jax.tree.leaves((total, factors)))
                self.uses = uses_of(program, range(before, before + len(jax.tree.leaves(frozen))))
            while True:
                value, total, finite = self.step(total, factors, frozen, _as_arrays(self._scale), arrays, rest)
                if self._scale.is_last or not jnp.isfinite(value):
                    return value
                if finite:
                    break
                self._scale.lower()
            if not self._scale.checked:  # this is the first batch: the sum holds its gradients only
                lower = Scale(np.float32(self._scale.value * STEP), np.bool_(True))
                again = self.step(jax.tree.map(_zeros, factors), factors, frozen, lower, arrays, rest)[1]
                self._scale.check(_relative_changes(again, total))
            return value

        mean, count = self._over(batches, run)
        return mean, count, _mean(total, count)

    @property
    def rounded_away(self) -> dict[str, float]:
        """The share of each site's gradient norm that float16 lost in the first batch, by the site's name."""
        return {} if self._scale is None else self._scale.rounded_away

    def mean_loss(self, batches: Iterable[Any]) -> tuple[float, int]:
        """Return the mean loss with the factors that are in the model, and the number of batches."""
        factors = self._binding.factors()
        return self._over(batches, lambda arrays, rest: self._loss(factors, self._binding.frozen, arrays, rest))

    def _over(self, batches: Iterable[Any], run: Callable[[list[Any], Any], Any]) -> tuple[float, int]:
        total = 0.0
        self._batch = 0
        for batch, _ in with_last(batches):
            self._batch += 1
            total += check_finite_loss(float(run(*arrays_and_rest(batch))), self._batch)
        return total / self._batch, self._batch


@jax.jit
def _mean(total: Gradients, count: int) -> Gradients:
    return jax.tree.map(lambda x: x / count, total)


@jax.jit
def _relative_changes(others: Gradients, gradients: Gradients) -> dict[str, jax.Array]:
    """Return |other - gradient| / |gradient| of each site, 0 for a gradient that is zero."""

    def norm(leaves: Leaves) -> jax.Array:
        return jnp.sqrt(sum(jnp.sum(jnp.square(x / unit)) for x in leaves))

    changes = {}
    for name, leaves in gradients.items():
        unit = jnp.maximum(jnp.max(jnp.abs(leaves.a)), jnp.max(jnp.abs(leaves.b)))
        unit = jnp.where(unit > 0, unit, 1.0)  # the squares of small numbers would be zero without a unit
        size = norm(leaves)
        change = norm(Leaves(others[name].a - leaves.a, others[name].b - leaves.b))
        changes[name] = jnp.where(size > 0, change / jnp.where(size > 0, size, 1.0), 0.0)
    return changes


def _as_arrays(scale: LossScale) -> Scale:
    return Scale(np.float32(scale.value), np.bool_(scale.is_last))


def _zeros(x: jax.Array) -> jax.Array:
    return jnp.zeros_like(x, device=x.sharding if x.committed else None)
