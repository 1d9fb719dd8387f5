"""Flax NNX and optax."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lora_one.backends.jax import load_llama
from lora_one.backends.jax.llama.model import causal_lm_loss
from lora_one.core.factors import Factors

from .job import Batch
from .record import Step

_EVERY_WEIGHT = nnx.DiffState(0, nnx.Param)
_EVERY_FACTOR = nnx.DiffState(0, nnx.LoRAParam)


class Runner:
    """See `benchmarks.agreement.record.Framework`."""

    name = "jax"
    loss_fn = staticmethod(causal_lm_loss)

    def __init__(self, dtype: str):
        self._dtype = jnp.dtype(dtype)

    def precision(self) -> Any:
        return jax.enable_x64(self._dtype == jnp.float64)

    def open(self, folder: Path) -> Any:
        return load_llama(folder, self._dtype)

    def batch(self, batch: Batch) -> dict[str, jax.Array]:
        return {name: jnp.asarray(value) for name, value in batch.items()}

    def weights(self, model: Any) -> dict[str, np.ndarray]:
        return _weights(nnx.state(model, nnx.Param))

    def evaluate(self, model: Any, batch: dict[str, jax.Array]) -> tuple[np.ndarray, float, dict[str, np.ndarray]]:
        (loss, logits), gradients = _evaluate(model, batch)
        return np.array(logits), float(loss), _weights(gradients)

    def factors(self, model: Any) -> dict[str, Factors]:
        return _factors(nnx.state(model, nnx.LoRAParam))

    def train(self, model: Any, optimizer: Any, batches: list[dict[str, jax.Array]]) -> Iterator[Step]:
        state = nnx.Optimizer(model, optimizer, wrt=nnx.LoRAParam)
        for batch in batches:
            loss, gradients = _step(model, state, batch)
            yield Step(float(loss), _factors(gradients), self.factors(model))


@nnx.jit
def _evaluate(model: Any, batch: Any) -> Any:
    def loss(model: Any) -> Any:
        logits = model(batch["input_ids"])
        return causal_lm_loss(lambda *_: logits, batch), logits

    return nnx.value_and_grad(loss, argnums=_EVERY_WEIGHT, has_aux=True)(model)


@nnx.jit
def _step(model: Any, state: nnx.Optimizer, batch: Any) -> Any:
    loss, gradients = nnx.value_and_grad(causal_lm_loss, argnums=_EVERY_FACTOR)(model, batch)
    state.update(model, gradients)
    return loss, gradients


def _weights(state: nnx.State) -> dict[str, np.ndarray]:
    found = {}
    for (*module, leaf), value in nnx.to_flat_state(state):
        array = np.array(value[...])
        name = ".".join(map(str, module))
        if leaf in ("kernel", "embedding"):
            found[f"{name}.weight"] = array.T if leaf == "kernel" else array  # a kernel is (in, out)
        else:
            found[f"{name}.{leaf}"] = array
    return found


def _factors(state: nnx.State) -> dict[str, Factors]:
    leaves = {".".join(map(str, path)): np.array(value[...]) for path, value in nnx.to_flat_state(state)}
    layers = [name.removesuffix(".kernel_lora_a") for name in leaves if name.endswith("_lora_a")]
    return {name: Factors(leaves[f"{name}.kernel_lora_a"].T, leaves[f"{name}.kernel_lora_b"].T) for name in layers}
