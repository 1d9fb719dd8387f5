"""AdamW for LoRA, with the r x r preconditioner, as an mlx.optimizers.Optimizer."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.optimizers import AdamW
from mlx.utils import tree_unflatten

from lora_one.backends.checks import check_optimizer_settings
from lora_one.core.factors import Factors
from lora_one.core.precondition import Damping, apply_inverses, damped_inverse, grams
from lora_one.errors import ModelError

from .attach import find_sites
from .ops import MlxOps
from .tree import flat

_OPS = MlxOps()

LearningRate = float | Callable[[mx.array], mx.array]


class LoraOneAdamW(AdamW):
    """mlx.optimizers.AdamW, with bias correction, that can precondition LoRA pairs first (arXiv 2502.01235, Alg. 1).

    gA <- (B^T B + reg I)^-1 gA and gB <- gB (A A^T + reg I)^-1, from the current A and B; all other parameters follow
    plain AdamW. Moments and arithmetic are float32 or wider, whatever the parameters are. One batched Cholesky solve a
    step for all pairs of one rank. Works under mx.compile, with gradients of the whole tree or of a part of it.

    Args:
        learning_rate: or a schedule, as for mlx.optimizers.
        pairs: paths of the LoRA layers to precondition, as in `model.named_modules()`.
        reg, damping: see `lora_one.core.precondition.damped_inverse`.
        adamw: betas, eps, weight_decay of mlx.optimizers.AdamW.
    """

    def __init__(
        self,
        learning_rate: LearningRate,
        pairs: Iterable[str] = (),
        reg: float = 1e-6,
        damping: Damping = "absolute",
        **adamw: Any,
    ):
        super().__init__(learning_rate, bias_correction=True, **adamw)
        self.pairs = tuple(pairs)
        self.reg = reg
        self.damping: Damping = damping

    def init_single(self, parameter: mx.array, state: dict[str, Any]) -> None:
        super().init_single(_OPS.at_least_float32(parameter), state)

    def apply_gradients(self, gradients: dict[str, Any], parameters: dict[str, Any]) -> dict[str, Any]:
        if self.pairs:
            gradients = self._preconditioned(gradients, parameters)
        self._corrections: dict[mx.Dtype, tuple[mx.array, mx.array]] = {}
        updated: dict[str, Any] = super().apply_gradients(gradients, parameters)
        return updated

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict[str, Any]) -> mx.array:
        gradient, wide = _OPS.at_least_float32(gradient), _OPS.at_least_float32(parameter)
        (b1, b2), rate = self.betas, self.learning_rate
        # Once for all parameters: computed for each, it would be in mx.compile's loops, at every entry.
        if wide.dtype not in self._corrections:
            self._corrections[wide.dtype] = self._bias_corrections(self.step.astype(wide.dtype))
        of_mean, of_root = self._corrections[wide.dtype]
        state["m"] = mean = b1 * state["m"] + (1.0 - b1) * gradient
        state["v"] = square = b2 * state["v"] + (1.0 - b2) * mx.square(gradient)
        direction = of_mean * mean / (of_root * mx.sqrt(square) + self.eps)
        return (wide * (1.0 - rate * self.weight_decay) - rate * direction).astype(parameter.dtype)

    def _bias_corrections(self, steps: mx.array) -> tuple[mx.array, mx.array]:
        """What the mean and the root of the mean square are multiplied by, (), to the last digits.

        As core.step has it, and not super()'s: MLX takes 1 - 0.999^t in float32, of which four digits are left.
        """
        b1, b2 = self.betas
        of_mean, of_square = (1.0 / -mx.expm1(steps * math.log(b)) if b > 0 else mx.ones_like(steps) for b in (b1, b2))
        return of_mean, mx.sqrt(of_square)

    def _preconditioned(self, gradients: dict[str, Any], parameters: dict[str, Any]) -> dict[str, Any]:
        arrays = flat(gradients)
        factors = {path: _factors(_child(parameters, path)) for path in self.pairs if f"{path}.lora_a" in arrays}
        by_rank: dict[int, list[str]] = defaultdict(list)
        for path, pair in factors.items():
            by_rank[pair.lora_A.shape[-2]].append(path)
        for rank, paths in by_rank.items():
            # Each Gram as (pairs in the layer, r, r), so that dense layers and experts go in one solve.
            both = [gram.reshape(-1, rank, rank) for path in paths for gram in grams(_OPS, factors[path])]
            inverses = damped_inverse(_OPS, mx.concatenate(both), self.reg, self.damping)  # (2 pairs, r, r)
            at = 0
            for path in paths:
                pair = factors[path]
                leading = pair.lora_A.shape[:-2]
                count = leading[0] if leading else 1
                inverse_b, inverse_a = (
                    inverses[at + k * count : at + (k + 1) * count].reshape(*leading, rank, rank) for k in (0, 1)
                )
                at += 2 * count
                gradient = _factors({name: arrays[f"{path}.{name}"] for name in ("lora_a", "lora_b")})
                direction = apply_inverses(_OPS, gradient, inverse_b, inverse_a)
                arrays[f"{path}.lora_a"], arrays[f"{path}.lora_b"] = _mlx_lm(direction)
        tree: dict[str, Any] = tree_unflatten(list(arrays.items()))
        return tree


def _factors(module: Any) -> Factors:
    """A LoRA layer's arrays, or their gradients, as the spec's: experts' (e, r, in) and (e, out, r) are, and a dense
    layer's (in, r) and (r, out) are those of the transposed layer.

    The preconditioner treats the sides alike, so the numbers are the same, and no array is transposed.
    """
    a, b = module["lora_a"], module["lora_b"]
    return Factors(a, b) if a.ndim == 3 else Factors(b, a)


def _mlx_lm(pair: Factors) -> tuple[mx.array, mx.array]:
    """The inverse of `_factors`: lora_a, lora_b."""
    return (pair.lora_A, pair.lora_B) if pair.lora_A.ndim == 3 else (pair.lora_B, pair.lora_A)


def _child(tree: Any, path: str) -> Any:
    for key in path.split("."):
        tree = tree[int(key)] if isinstance(tree, (list, tuple)) else tree[key]
    return tree


def optimizer(
    model: nn.Module,
    learning_rate: LearningRate = 2e-4,
    weight_decay: float = 0.0,
    precondition: bool = False,
    reg: float = 1e-6,
    damping: Damping = "absolute",
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> LoraOneAdamW:
    """AdamW over the trainable parameters of a model with LoRA layers of mlx-lm, its state ready to be compiled.

    Args:
        model: what `init` or `load` returned, or any module with mlx-lm's LoRA layers in it.
        learning_rate: a number or a schedule of mlx.optimizers.
        weight_decay: decoupled.
        precondition: whether LoRA pairs are preconditioned; other parameters never are.
        reg, damping: see `lora_one.core.precondition.damped_inverse`.
        betas, eps: Adam's.

    Returns:
        An mlx.optimizers.AdamW with bias correction. `optimizer.state` is a tree of arrays: save it with
        mx.save_safetensors(path, dict(tree_flatten(optimizer.state))), and set it again before training is compiled.

    Raises:
        ConfigError: a setting that cannot be.
        ModelError: nothing is trainable, or nothing to precondition.
    """
    check_optimizer_settings(reg, damping)
    trainable = model.trainable_parameters()
    names = set(flat(trainable))
    if not names:
        raise ModelError(
            "the model must have trainable parameters, got none: was the adapter loaded with trainable=True?"
        )
    pairs = []
    if precondition:
        paths = [site.path for site in find_sites(model)]
        pairs = [path for path in paths if {f"{path}.lora_a", f"{path}.lora_b"} <= names]
        if not pairs:
            raise ModelError("precondition=True needs trainable LoRA layers of mlx-lm, got none")
    made = LoraOneAdamW(
        learning_rate, pairs, reg, damping, betas=list(betas), eps=eps, weight_decay=weight_decay
    )  # fmt: skip
    made.init(trainable)
    return made
