"""The loss of a model and its gradients, as compiled functions of factors and a batch."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_one.backends.checks import check_finite_loss, with_last
from lora_one.backends.interface import LossFn
from lora_one.backends.jax.processes import Processes
from lora_one.backends.jax.sites import Binding
from lora_one.core.fold import FoldState
from lora_one.errors import BatchError

from .batches import arrays_and_rest, check_loss, fingerprint, rejoin
from .loss_scale import STEP, LossScale, computes_in_float16
from .totals import (
    FOLDS,
    SUMS,
    Folding,
    Folds,
    Gradients,
    Rule,
    Scale,
    first_folds,
    if_finite,
    mean,
    relative_changes,
    zeros_like,
)
from .uses import Uses, uses_of


class GradientFunction:
    """The loss of a model over batches, with or without gradients.

    The frozen weights are arguments of the compiled functions: XLA would spend minutes on folding constants. A pass
    that sums takes the gradients of both factors: so one compilation serves all passes. Totals are updated where they
    lie.

    Attributes:
        step: the compiled function of one batch that adds to sums of gradients: (sums, factors, frozen, scale, arrays,
            rest) -> (loss, new sums, whether they are finite).
        fold_step: the same with `Folds` instead of sums; no factors are needed.
        loss: the compiled loss of one batch: (factors, frozen, arrays, rest) -> loss.
        uses: what the loss does with the frozen arrays; filled by the first pass.
    """

    def __init__(self, binding: Binding, loss_fn: LossFn, processes: Processes):
        self._binding = binding
        self._processes = processes
        self._batch = 0  # the number of the current batch, for errors raised while tracing
        self._scale: LossScale | None = None  # set by the first pass
        self.uses = Uses(set(), set())

        def loss(factors: Gradients, frozen: Any, arrays: list[Any], rest: Any) -> jax.Array:
            # Overrides the user's precision flags: the error of TF32 and bf16 exceeds a small singular value.
            with jax.default_matmul_precision("highest"):
                return check_loss(binding.loss(loss_fn, frozen, factors, rejoin(arrays, rest)), self._batch)

        def step_by(rule: Rule, places: Any) -> Any:
            def step(total: Any, factors: Gradients, frozen: Any, scale: Scale, arrays: list[Any], rest: Any) -> Any:
                def wide_loss(factors: Gradients) -> jax.Array:
                    value = loss(factors, frozen, arrays, rest)
                    return value.astype(jnp.promote_types(value.dtype, jnp.float32))

                value, pullback = jax.vjp(wide_loss, rule.installed(total, factors, scale))
                (gradients,) = pullback(scale.value.astype(value.dtype))
                return value, *if_finite(rule.taken_in(total, gradients, scale), total, scale)

            # Totals keep their sharding, or the next batch would find another one and compile again.
            return jax.jit(step, static_argnums=5, donate_argnums=0, out_shardings=(None, places, None))

        sites = binding.sites
        self.loss: Any = jax.jit(loss, static_argnums=3)
        self.step: Any = step_by(SUMS, {name: site.shardings() for name, site in sites.items()})
        self.fold_step: Any = step_by(FOLDS, {name: site.sharding for name, site in sites.items()})

    def gradients(self, batches: Iterable[Any], factors: Gradients) -> tuple[float, int, Gradients]:
        """Run all batches backward.

        Returns:
            The mean loss, the number of batches, and the mean gradients of the factors.

        Raises:
            BatchError: no batches, or a loss that has no gradient.
            GradientError: a loss that is not finite.
        """
        zeros = jax.tree.map(zeros_like, factors)
        loss, count, total = self._total(batches, self.step, SUMS, zeros, factors)
        return loss, count, mean(total, count)

    def folds(self, batches: Iterable[Any], states: dict[str, FoldState]) -> tuple[float, int, Folds]:
        """Run all batches backward, and renew the states by each of them.

        Args:
            batches: the batches.
            states: by site; donated, so do not use them afterwards.

        Returns:
            The mean loss, the number of batches, and the states of the sum over them.

        Raises:
            BatchError: no batches, or a loss that has no gradient.
            GradientError: a loss that is not finite.
        """
        return self._total(batches, self.fold_step, FOLDS, first_folds(states), {})

    def fold_program(self, batch: Any, states: dict[str, FoldState]) -> Any:
        """Return the jaxpr of `fold_step` on a batch. A pass over such batches does not trace it again.

        Args:
            batch: the first batch.
            states: by site; shapes are enough.
        """
        self._batch = 1
        no_calls = jax.ShapeDtypeStruct((), jnp.float32)
        folds = {name: Folding(state, no_calls) for name, state in states.items()}
        return self._look(self.fold_step, folds, {}, *arrays_and_rest(batch))

    @property
    def rounded_away(self) -> dict[str, float]:
        """The share of each site's gradient norm that float16 lost in the first batch, by the site's name."""
        return {} if self._scale is None else self._scale.rounded_away

    def mean_loss(self, batches: Iterable[Any]) -> tuple[float, int]:
        """Return the mean loss with the factors that are in the model, and the number of batches."""
        factors = self._binding.factors()
        frozen = self._binding.frozen
        return self._over(
            batches,
            lambda arrays, rest: self.loss.trace(factors, frozen, arrays, rest),
            lambda arrays, rest: self.loss(factors, frozen, arrays, rest),
        )

    def _total(
        self, batches: Iterable[Any], step: Any, rule: Rule, total: Any, factors: Gradients
    ) -> tuple[float, int, Any]:
        """Return the mean loss, the number of batches, and the total after the steps of all of them."""
        frozen = self._binding.frozen

        def trace(arrays: list[Any], rest: Any) -> None:  # the call below reuses the trace made here
            if self._scale is None:
                self._look(step, total, factors, arrays, rest)
            elif self._processes.size > 1:
                step.trace(total, factors, frozen, _as_arrays(self._scale), arrays, rest)

        def run(arrays: list[Any], rest: Any) -> Any:
            nonlocal total
            scale: Any = self._scale
            start = None if scale.checked else jax.tree.map(jnp.copy, total)
            while True:
                value, total, finite = step(total, factors, frozen, _as_arrays(scale), arrays, rest)
                if scale.is_last or not jnp.isfinite(value):
                    return value
                if finite:
                    break
                scale.lower()
            if not scale.checked:  # this is the first batch: the total holds its gradients only
                lower = Scale(np.float32(scale.value * STEP), np.bool_(True))
                again = step(start, factors, frozen, lower, arrays, rest)[1]
                scale.check(relative_changes(rule.linear(again), rule.linear(total)))
            return value

        loss, count = self._over(batches, trace, run)
        return loss, count, total

    def _look(self, step: Any, total: Any, factors: Gradients, arrays: list[Any], rest: Any) -> Any:
        """Return the jaxpr of a step, and note what it says of the loss: the dtypes, and the uses of the weights."""
        frozen = self._binding.frozen
        traced = step.trace(total, factors, frozen, _as_arrays(LossScale(False)), arrays, rest)
        program = getattr(traced.jaxpr, "jaxpr", traced.jaxpr)  # closed or not, depending on JAX's version
        self._scale = LossScale(computes_in_float16(program))
        before = len(jax.tree.leaves((total, factors)))
        self.uses = uses_of(program, range(before, before + len(jax.tree.leaves(frozen))))
        return program

    def _over(
        self,
        batches: Iterable[Any],
        trace: Callable[[list[Any], Any], object],
        run: Callable[[list[Any], Any], Any],
    ) -> tuple[float, int]:
        """Return the mean of what `run` returns for each batch, and the number of batches.

        A user's error arises in the batches or in `trace`. Then no process waits in `run`, a program of all of them.
        """
        total = 0.0
        self._batch = 0
        for batch, _ in with_last(batches):
            self._batch += 1
            arrays, rest = arrays_and_rest(batch)
            trace(arrays, rest)
            self._check_same(partial(fingerprint, batch))
            total += check_finite_loss(float(run(arrays, rest)), self._batch)
        self._batch += 1
        self._check_same(lambda: "end")
        return total / (self._batch - 1), self._batch - 1

    def _check_same(self, batch: Callable[[], str]) -> None:
        if self._processes.size > 1 and not self._processes.agree(batch()):
            raise BatchError(
                f"batch {self._batch} must be the same in all {self._processes.size} processes, got another one, or "
                "none, in some: make it of the processes' shares, jax.make_array_from_process_local_data(sharding, "
                "share), or hand in the same numbers everywhere"
            )


def _as_arrays(scale: LossScale) -> Scale:
    return Scale(np.float32(scale.value), np.bool_(scale.is_last))
