"""The gradient oracle: one jitted function from factors and a batch to the loss and the factors' gradients."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from lora_one.backends.checks import check_finite_loss, with_last

from .batches import arrays_and_rest, check_loss, rejoin
from .sites import Binding, Leaves

Gradients = dict[str, Leaves]


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

        def step(total: Gradients, factors: Gradients, frozen: Any, arrays: list[Any], rest: Any) -> Any:
            self.traces += 1
            value, gradients = jax.value_and_grad(loss)(factors, frozen, arrays, rest)
            return value, jax.tree.map(jnp.add, total, gradients)

        self._loss: Any = jax.jit(loss, static_argnums=3)
        # The sums stay where they are, or the next batch would find other shardings and compile again.
        where = {name: site.shardings() for name, site in binding.sites.items()}
        self._step: Any = jax.jit(step, static_argnums=4, donate_argnums=0, out_shardings=(None, where))

    def compilations(self) -> int:
        """Programs that XLA has made of the function with gradients."""
        return self._step._cache_size()

    def program(self, batch: Any, factors: dict[str, Leaves]) -> str:
        """The compiled function with gradients as text: what each device does, collectives included."""
        arrays, rest = arrays_and_rest(batch)
        total = jax.tree.map(_zeros, factors)
        return self._step.lower(total, factors, self._binding.frozen, arrays, rest).compile().as_text()

    def gradients(self, batches: Iterable[Any], factors: dict[str, Leaves]) -> tuple[float, int, Gradients]:
        """(mean loss, batches, mean gradients of the factors).

        Raises:
            BatchError, GradientError: no batches, or a loss that no gradient can be had from.
        """
        total = jax.tree.map(_zeros, factors)

        def run(arrays: list[Any], rest: Any) -> Any:
            nonlocal total
            value, total = self._step(total, factors, self._binding.frozen, arrays, rest)
            return value

        mean, count = self._over(batches, run)
        return mean, count, _mean(total, count)

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


def _zeros(x: jax.Array) -> jax.Array:
    return jnp.zeros_like(x, device=x.sharding if x.committed else None)
