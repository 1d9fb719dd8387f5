"""The MLX target: eager, mx.compile, and LoraOneAdamW."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from lora_one.backends.mlx.lora_adamw import LoraOneAdamW
from lora_one.backends.mlx.ops import MlxOps
from lora_one.conformance.computations import Problem
from lora_one.conformance.target import Target
from lora_one.core.factors import Factors
from lora_one.errors import ConfigError

_OPS = MlxOps()
_DEVICES = {"cpu": mx.cpu, "gpu": mx.gpu}


def open_target(dtype: str, device: str | None = None) -> Target | None:
    """Return MLX on "cpu" or "gpu" (default: MLX's choice). float64 exists on the CPU only, so it always runs there."""
    place = device or ("gpu" if mx.default_device() == mx.gpu else "cpu")
    if place not in _DEVICES or (place == "gpu" and not mx.is_available(mx.gpu)):
        raise ConfigError(f"mlx has no device {place!r} here: it may be cpu or, where there is one, gpu")
    if dtype == "float64":
        place = "cpu"

    @contextmanager
    def scope() -> Iterator[None]:
        before = mx.default_device()
        mx.set_default_device(_DEVICES[place])
        try:
            yield
        finally:
            mx.set_default_device(before)

    with scope():
        like = mx.zeros((), dtype=getattr(mx, dtype))
    return Target("mlx", dtype, _OPS, like, mx.compile, _train, scope=scope, device=place)


def _train(problems: Sequence[Problem], params: Mapping[str, Any]) -> list[mx.array]:
    paths = [f"layer{index}" for index in range(len(problems))]
    tree: Any = {
        path: {"lora_a": problem.pair.lora_A.T, "lora_b": problem.pair.lora_B.T}
        for path, problem in zip(paths, problems, strict=True)
    }
    preconditioned = {} if params["reg"] is None else {"reg": params["reg"], "damping": params["damping"]}
    optimizer = LoraOneAdamW(
        params["rate"], paths if preconditioned else (), **preconditioned, weight_decay=params["weight_decay"]
    )
    optimizer.init(tree)
    for _ in range(params["steps"]):
        gradients = {}
        for path, problem in zip(paths, problems, strict=True):
            pair = Factors(tree[path]["lora_a"].T, tree[path]["lora_b"].T)
            gradient = problem.gradient(_OPS, pair, params["loss"])
            gradients[path] = {"lora_a": gradient.lora_A.T, "lora_b": gradient.lora_B.T}
        tree = optimizer.apply_gradients(gradients, tree)
    return [tree[path][name].T for path in paths for name in ("lora_a", "lora_b")]
