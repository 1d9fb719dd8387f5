"""AdamW for LoRA with the r x r preconditioner, as an mlx.optimizers.Optimizer."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import mlx.core as mx
from mlx.optimizers import AdamW
from mlx.utils import tree_map_with_path, tree_unflatten

from lora_one.core.factors import Factors
from lora_one.core.precondition import Damping, apply_inverses, damped_inverse, grams

from .ops import MlxOps
from .tree import flat

_OPS = MlxOps()

LearningRate = float | Callable[[mx.array], mx.array]


class LoraOneAdamW(AdamW):
    """AdamW of mlx.optimizers with bias correction, which can precondition the gradients of LoRA pairs first.

    `lora_one.optimizer(model, precondition=True)` makes it with all pairs of the model; use the class to choose them.
    Other parameters follow plain AdamW. Moments and arithmetic are in float32 or wider. It works under mx.compile,
    with gradients of all parameters or of some.

    gA <- (B^T B + reg I)^-1 gA and gB <- gB (A A^T + reg I)^-1, with the current A and B.

    Args:
        learning_rate: a number, or a schedule of mlx.optimizers.
        pairs: paths of the LoRA layers to precondition, as in `model.named_modules()`; default none.
        reg: damping of the inverses, >= 0, default 1e-6.
        damping: "absolute" adds reg I, "relative" reg times the mean eigenvalue; default "absolute". See
            `lora_one.core.precondition.damped_inverse`.
        loraplus_lr_ratio: learning rate of all `lora_b` divided by that of the other parameters, default 1 (LoRA+,
            arXiv 2402.12354).
        adamw: betas, eps and weight_decay of mlx.optimizers.AdamW.

    Source: Zhang, Liu and Chen, "LoRA-One" (ICML 2025, arXiv 2502.01235), Algorithm 1.

    >>> import mlx.core as mx
    >>> import mlx.nn as nn
    >>> from mlx_lm.tuner.lora import LoRALinear
    >>> model = nn.Sequential(LoRALinear.from_base(nn.Linear(6, 5), r=2))
    >>> optimizer = LoraOneAdamW(1e-2, pairs=["layers.0"], reg=1e-3)
    >>> loss, gradients = nn.value_and_grad(model, lambda model: mx.mean(model(mx.ones((3, 6))) ** 2))(model)
    >>> optimizer.update(model, gradients)
    >>> mx.any(model.layers[0].lora_b != 0).item()
    True
    """

    def __init__(
        self,
        learning_rate: LearningRate,
        pairs: Iterable[str] = (),
        reg: float = 1e-6,
        damping: Damping = "absolute",
        loraplus_lr_ratio: float = 1.0,
        **adamw: Any,
    ):
        super().__init__(learning_rate, bias_correction=True, **adamw)
        self.pairs = tuple(pairs)
        self.reg = reg
        self.damping: Damping = damping
        self.loraplus_lr_ratio = loraplus_lr_ratio

    def init_single(self, parameter: mx.array, state: dict[str, Any]) -> None:
        super().init_single(_OPS.at_least_float32(parameter), state)

    def apply_gradients(self, gradients: dict[str, Any], parameters: dict[str, Any]) -> dict[str, Any]:
        if self.pairs:
            gradients = self._preconditioned(gradients, parameters)
        self._corrections: dict[mx.Dtype, tuple[mx.array, mx.array]] = {}
        if not self._initialized:
            self.init(gradients)
        super().apply_gradients({}, {})  # the schedules and the count of steps: MLX's own tells no names
        updated: dict[str, Any] = tree_map_with_path(self._apply_named, gradients, parameters, self.state)
        return updated

    def _apply_named(self, name: str, gradient: mx.array, parameter: mx.array, state: dict[str, Any]) -> mx.array:
        """Return a parameter after a step with its own learning rate."""
        ratio = self.loraplus_lr_ratio if name.rpartition(".")[2] == "lora_b" else 1.0
        return self.apply_single(gradient, parameter, state, ratio)

    def apply_single(
        self, gradient: mx.array, parameter: mx.array, state: dict[str, Any], ratio: float = 1.0
    ) -> mx.array:
        gradient, wide = _OPS.at_least_float32(gradient), _OPS.at_least_float32(parameter)
        (b1, b2), rate = self.betas, self.learning_rate
        rate = rate if ratio == 1.0 else ratio * rate
        # Once for all parameters: otherwise mx.compile would put it into its loops over the entries.
        if wide.dtype not in self._corrections:
            self._corrections[wide.dtype] = self._bias_corrections(self.step.astype(wide.dtype))
        mean_correction, root_correction = self._corrections[wide.dtype]
        state["m"] = mean = b1 * state["m"] + (1.0 - b1) * gradient
        state["v"] = square = b2 * state["v"] + (1.0 - b2) * mx.square(gradient)
        direction = mean_correction * mean / (root_correction * mx.sqrt(square) + self.eps)
        return (wide * (1.0 - rate * self.weight_decay) - rate * direction).astype(parameter.dtype)

    def _bias_corrections(self, steps: mx.array) -> tuple[mx.array, mx.array]:
        """Return the factors of the mean and of the root of the mean square, (), to the last digits.

        They are computed as in core.step. MLX's own take 1 - 0.999^t in float32, which leaves four digits.
        """
        mean_correction, square_correction = (
            1.0 / -mx.expm1(steps * math.log(beta)) if beta > 0 else mx.ones_like(steps) for beta in self.betas
        )
        return mean_correction, mx.sqrt(square_correction)

    def _preconditioned(self, gradients: dict[str, Any], parameters: dict[str, Any]) -> dict[str, Any]:
        arrays = flat(gradients)
        factors = {path: _factors(child(parameters, path)) for path in self.pairs if f"{path}.lora_a" in arrays}
        by_rank: dict[int, list[str]] = defaultdict(list)
        for path, pair in factors.items():
            by_rank[pair.lora_A.shape[-2]].append(path)
        for rank, paths in by_rank.items():
            # Each Gram as (pairs in the layer, r, r): dense layers and experts are solved together.
            stacked = [gram.reshape(-1, rank, rank) for path in paths for gram in grams(_OPS, factors[path])]
            inverses = damped_inverse(_OPS, mx.concatenate(stacked), self.reg, self.damping)  # (2 pairs, r, r)
            start = 0
            for path in paths:
                pair = factors[path]
                leading = pair.lora_A.shape[:-2]
                count = leading[0] if leading else 1
                inverse_b, inverse_a = (
                    inverses[start + k * count : start + (k + 1) * count].reshape(*leading, rank, rank) for k in (0, 1)
                )
                start += 2 * count
                gradient = _factors({name: arrays[f"{path}.{name}"] for name in ("lora_a", "lora_b")})
                direction = apply_inverses(_OPS, gradient, inverse_b, inverse_a)
                arrays[f"{path}.lora_a"], arrays[f"{path}.lora_b"] = _mlx_lm(direction)
        tree: dict[str, Any] = tree_unflatten(list(arrays.items()))
        return tree


def _factors(module: Any) -> Factors:
    """Return a LoRA layer's arrays, or their gradients, as lora_A and lora_B of the layer or of its transpose.

    Arrays of experts, (e, r, in) and (e, out, r), have our layout. Those of a dense layer, (in, r) and (r, out), are
    lora_B and lora_A of the transposed layer. The preconditioner treats both sides alike, so the numbers are the same,
    and no array is transposed.
    """
    a, b = module["lora_a"], module["lora_b"]
    return Factors(a, b) if a.ndim == 3 else Factors(b, a)


def _mlx_lm(pair: Factors) -> tuple[mx.array, mx.array]:
    """Return the inverse of `_factors`: lora_a, lora_b."""
    return (pair.lora_A, pair.lora_B) if pair.lora_A.ndim == 3 else (pair.lora_B, pair.lora_A)


def child(tree: Any, path: str) -> Any:
    """Return the part of a tree of dicts and lists at a dotted path."""
    for key in path.split("."):
        tree = tree[int(key)] if isinstance(tree, (list, tuple)) else tree[key]
    return tree
