"""The gradient oracle: one jitted function from factors and a batch to the loss and the factors' gradients."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_one.backends.checks import check_finite_loss, with_last
from lora_one.backends.jax.sites import Binding, Leaves

from .batches import arrays_and_rest, check_loss, rejoin
from .loss_scale import STEP, LossScale, all_finite, computes_in_float16
from .uses import Uses, uses_of

Gradients = dict[str, Leaves]


class Scale(NamedTuple):
    """A `LossScale` as the compiled step gets it."""

    value: Any  # (), float32
    is_last: Any  # (), bool


class Oracle:
    """Losses of a model over batches, with or without gradients.

    The frozen weights are arguments of the jitted functions: closed over, they would be constants, which XLA spends
    minutes folding. The gradients of both factors are taken in each pass, though one of them is zero: so one
    compilation serves all passes, and the sum over the batches is updated where it lies.
    """

    def __init__(self, binding: Binding, loss_fn: Callable[[Any, Any], Any]):
        self._binding = binding
        self.traces = 0  # of the function with gradients: one for each shape of batch
        self._batch = 0  # the number of the batch at hand, for errors raised while tracing

        def loss(factors: dict[str, Leaves], frozen: Any, arrays: list[Any], rest: Any) -> jax.Array:
            # Whatever the user's precision flags say: TF32 and bf16 passes would be most of a small singular value.
            with jax.default_matmul_precision("highest"):
                return check_loss(binding.loss(loss_fn, frozen, factors, rejoin(arrays, rest)), self._batch)

        def step(total: Gradients, factors: Gradients, frozen: Any, scale: Scale, arrays: list[Any], rest: Any) -> Any:
            self.traces += 1

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
        # The sums stay where they are, or the next batch would find other shardings and compile again.
        where = {name: site.shardings() for name, site in binding.sites.items()}
        self._step: Any = jax.jit(step, static_argnums=5, donate_argnums=0, out_shardings=(None, where, None))
        self._scale: LossScale | None = None  # known, as what follows is, once the step was traced
        self.uses = Uses(set(), set())  # of the frozen arrays

    def compilations(self) -> int:
        """Programs that XLA has made of the function with gradients."""
        return self._step._cache_size()

    def program(self, batch: Any, factors: dict[str, Leaves]) -> str:
        """The compiled function with gradients as text: what each device does, collectives included."""
        arrays, rest = arrays_and_rest(batch)
        total = jax.tree.map(_zeros, factors)
        scale = _as_arrays(LossScale(False))
        return self._step.lower(total, factors, self._binding.frozen, scale, arrays, rest).compile().as_text()

    def gradients(self, batches: Iterable[Any], factors: dict[str, Leaves]) -> tuple[float, int, Gradients]:
        """(mean loss, batches, mean gradients of the factors).

        Raises:
            BatchError, GradientError: no batches, or a loss that no gradient can be had from.
        """
        total = jax.tree.map(_zeros, factors)

        def run(arrays: list[Any], rest: Any) -> Any:
            nonlocal total
            frozen = self._binding.frozen
            if self._scale is None:  # the call below finds the trace made here
                traced = self._step.trace(total, factors, frozen, _as_arrays(LossScale(False)), arrays, rest)
                program = getattr(traced.jaxpr, "jaxpr", traced.jaxpr)  # closed or not, as JAX's version has it
                self._scale = LossScale(computes_in_float16(program))
                before = len(jax.tree.leaves((total, factors)))
                self.uses = uses_of(program, range(before, before + len(jax.tree.leaves(frozen))))
            while True:
                value, total, finite = self._step(total, factors, frozen, _as_arrays(self._scale), arrays, rest)
                if self._scale.is_last or not jnp.isfinite(value):
                    return value
                if finite:
                    break
                self._scale.lower()
            if not self._scale.checked:  # the sum is of this one batch yet
                lower = Scale(np.float32(self._scale.value * STEP), np.bool_(True))
                again = self._step(jax.tree.map(_zeros, factors), factors, frozen, lower, arrays, rest)[1]
                self._scale.check(_relative_changes(again, total))
            return value

        mean, count = self._over(batches, run)
        return mean, count, _mean(total, count)

    @property
    def rounded_away(self) -> dict[str, float]:
        """Site -> the share of its gradient's norm that float16 lost in the first batch."""
        return {} if self._scale is None else self._scale.rounded_away

    def mean_loss(self, batches: Iterable[Any]) -> tuple[float, int]:
        """(mean loss, batches) with the factors that are in the model."""
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
def _relative_changes(those: Gradients, these: Gradients) -> dict[str, jax.Array]:
    def norm(leaves: Leaves) -> jax.Array:
        return jnp.sqrt(sum(jnp.sum(jnp.square(x / largest)) for x in leaves))

    found = {}
    for name, leaves in these.items():
        largest = jnp.maximum(jnp.max(jnp.abs(leaves.a)), jnp.max(jnp.abs(leaves.b)))
        largest = jnp.where(largest > 0, largest, 1.0)  # a unit: squares of small numbers would be zero
        size = norm(leaves)
        off = norm(Leaves(those[name].a - leaves.a, those[name].b - leaves.b))
        found[name] = jnp.where(size > 0, off / jnp.where(size > 0, size, 1.0), 0.0)
    return found


def _as_arrays(scale: LossScale) -> Scale:
    return Scale(np.float32(scale.value), np.bool_(scale.is_last))


def _zeros(x: jax.Array) -> jax.Array:
    return jnp.zeros_like(x, device=x.sharding if x.committed else None)
