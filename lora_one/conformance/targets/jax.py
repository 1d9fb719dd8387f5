"""The JAX target: eager, jax.jit, and lora_adamw, whose step is compiled as users compile it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from lora_one.backends.jax.ops import JaxOps
from lora_one.backends.jax.optimizer import lora_adamw
from lora_one.conformance.computations import Problem
from lora_one.conformance.target import Target
from lora_one.core.factors import Factors
from lora_one.errors import ConfigError

_OPS = JaxOps()
_NOTE = "optax computes Adam's 1 - 0.999^t in the working precision; its own AdamW rows allow for that"


def open_target(dtype: str, device: str | None = None) -> Target | None:
    """Return JAX on a platform ("cpu", "gpu", "tpu"; default: JAX's choice). TPUs have no float64: None."""
    platform = {"cuda": "gpu"}.get(device or "", device) or jax.default_backend()
    if platform == "tpu" and dtype == "float64":
        return None
    try:
        place = jax.devices(platform)[0]
    except RuntimeError as error:
        raise ConfigError(f"jax has no device {device!r} here: {str(error).splitlines()[0]}") from error

    @contextmanager
    def scope() -> Iterator[None]:
        with jax.enable_x64(dtype == "float64"), jax.default_device(place):
            yield

    with scope():
        like = jnp.zeros((), dtype=dtype)
    # optax computes 1 - b^t from b = 0.999 rounded to the working precision, and rounds b^t too. The relative error of
    # a step is eps/4 (1 + 1/t) / (1 - b), and a step moves factors of order 1/2 by the rate. Below: twenty steps.
    excess = 250.0 * (20.0 / 2.0 + 3.6) * 2.0**-7 / 0.5
    return Target("jax", dtype, _OPS, like, jax.jit, _train, excess, scope, platform, _NOTE)


def _train(problems: Sequence[Problem], params: Mapping[str, Any]) -> list[Array]:
    settings = {name: params[name] for name in ("weight_decay", "reg", "damping")}
    optimizer = lora_adamw(params["rate"], **settings)
    tree = [{"w_lora_a": p.pair.lora_A.T, "w_lora_b": p.pair.lora_B.T} for p in problems]

    @jax.jit
    def step(tree: Any, state: Any) -> Any:
        gradients = []
        for leaves, problem in zip(tree, problems, strict=True):
            pair = Factors(leaves["w_lora_a"].T, leaves["w_lora_b"].T)
            gradient = problem.gradient(_OPS, pair, params["loss"])
            gradients.append({"w_lora_a": gradient.lora_A.T, "w_lora_b": gradient.lora_B.T})
        updates, state = optimizer.update(gradients, state, tree)
        return optax.apply_updates(tree, updates), state

    state = optimizer.init(tree)
    for _ in range(params["steps"]):
        tree, state = step(tree, state)
    return [leaves[name].T for leaves in tree for name in ("w_lora_a", "w_lora_b")]
