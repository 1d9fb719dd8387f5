"""Tiny mlx-lm models with random weights, their batches, and the numbers that LoRA-One must give on them."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models import llama, mixtral
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.tuner.trainer import default_loss

from lora_one.backends.mlx.tree import places
from lora_one.report import Report

VOCABULARY = 96
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj")

# What a base weight may be quantised to: mode, group size, bits.
QUANTIZED = [("affine", 32, 4), ("affine", 64, 4), ("affine", 64, 8), ("mxfp4", 32, 4), ("nvfp4", 16, 4)]


def tiny_llama(seed: int = 0, layers: int = 2, **changes: Any) -> nn.Module:
    """A Llama of mlx-lm with 64 features per token."""
    mx.random.seed(seed)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    model = llama.Model(llama.ModelArgs(model_type="llama", **{**sizes, **changes}))
    model.eval()
    mx.eval(model.parameters())
    return model


def tiny_mixtral(seed: int = 0, experts: int = 4) -> nn.Module:
    """A mixture of experts: a layer of each kind of SwitchLinear, two experts per token."""
    mx.random.seed(seed)
    args = mixtral.ModelArgs(
        model_type="mixtral",
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=experts,
        num_experts_per_tok=2,
    )
    model = mixtral.Model(args)
    model.eval()
    mx.eval(model.parameters())
    return model


def quantize(model: nn.Module, mode: str, group_size: int, bits: int) -> nn.Module:
    """Quantise all that can be, in place."""
    nn.quantize(model, group_size=group_size, bits=bits, mode=mode)
    mx.eval(model.parameters())
    return model


def dequantized(model: nn.Module, make: Any = tiny_llama) -> nn.Module:
    """A float32 model that computes the same function."""
    weights: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    for place in places(model):
        module: Any = place.module
        if isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding, QuantizedSwitchLinear)):
            wide = mx.dequantize(
                module.weight, module.scales, module.get("biases"), module.group_size, module.bits, mode=module.mode
            )
            weights[f"{place.path}.weight"] = wide.astype(mx.float32)
            for name in ("scales", "biases"):
                weights.pop(f"{place.path}.{name}", None)
    other = make()
    other.update(tree_unflatten([(name, weight.astype(mx.float32)) for name, weight in weights.items()]), strict=True)
    mx.eval(other.parameters())
    return other


def token_batches(
    count: int = 2, sequences: int = 3, length: int = 20, seed: int = 0
) -> list[tuple[mx.array, mx.array]]:
    """Batches as mlx-lm's iterate_batches yields them, with padding."""
    rng = np.random.default_rng(seed)
    batches = []
    for _ in range(count):
        tokens = rng.integers(1, VOCABULARY, (sequences, length))
        lengths = rng.integers(length // 2, length, sequences)
        batches.append((mx.array(tokens), mx.array(np.stack([np.zeros_like(lengths), lengths], axis=1))))
    return batches


def mean_gradients(model: nn.Module, batches: list[Any]) -> dict[str, np.ndarray]:
    """dL/dW of every linear layer of a float model, (out, in) or (experts, out, in), by MLX itself, float64."""
    linear = {place.path for place in places(model) if isinstance(place.module, (nn.Linear, SwitchLinear))}
    model.unfreeze()
    sums: dict[str, np.ndarray] = {}
    for batch in batches:
        gradients = nn.value_and_grad(model, lambda model, batch: default_loss(model, *batch)[0])(model, batch)[1]
        for name, gradient in tree_flatten(gradients):
            path, _, leaf = name.rpartition(".")
            if leaf == "weight" and path in linear:
                sums[path] = sums.get(path, 0.0) + np.array(gradient).astype(np.float64) / len(batches)
    return sums


def expected_product(gradient: np.ndarray, rank: int, scaling: float, gamma: float = 128.0) -> np.ndarray:
    """s B0 A0 = (s / gamma) (best rank-r part of -G) / ||G||_2, by LAPACK in float64."""
    u, s, vt = np.linalg.svd(gradient)
    return -scaling / gamma * (u[:, :rank] * (s[:rank] / s[0])) @ vt[:rank]


def product(module: nn.Module, expert: int | None = None) -> np.ndarray:
    """s B A of a LoRA layer of mlx-lm, (out, in), float64."""
    a, b = (np.array(x.astype(mx.float32)).astype(np.float64) for x in (module.lora_a, module.lora_b))
    return module.scale * (b.T @ a.T if expert is None else b[expert] @ a[expert])


def assert_lora_one_start(
    model: nn.Module, report: Report, gradients: dict[str, np.ndarray], tolerance: float = 1e-5
) -> None:
    """Compare each layer's s B A with LAPACK's in float64, in the spectral norm.

    Truncating at rank r amplifies rounding errors of G by s_1 / (s_r - s_r+1) (Wedin 1972): where that gap is below a
    tenth, as it often is in random models, the tolerance grows with it.
    """
    modules = modules_of(model)
    for layer in report.layers:
        path, _, index = layer.name.partition("[")
        expert = int(index[:-1]) if index else None
        gradient = gradients[path] if expert is None else gradients[path][expert]
        expected = expected_product(gradient, layer.rank, modules[path].scale)
        error = np.linalg.norm(product(modules[path], expert) - expected, 2) / np.linalg.norm(expected, 2)
        s = np.append(np.linalg.svd(gradient, compute_uv=False), 0.0)
        gap = (s[layer.rank - 1] - s[layer.rank]) / s[0]
        allowed = tolerance * max(1.0, 0.1 / gap) if s[layer.rank] > 1e-6 * s[0] else tolerance
        assert error < allowed, f"{layer.name}: {error:.1e}, allowed {allowed:.1e}"


@contextmanager
def warned(category: type[Warning]) -> Iterator[list[str]]:
    """The messages of all warnings of a category, in a list that is filled at the end."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        yield messages
    messages += [str(warning.message) for warning in seen if issubclass(warning.category, category)]


def contents(model: nn.Module) -> dict[str, np.ndarray]:
    """Every array of the model, as raw bytes."""
    arrays = [(name, x) for name, x in tree_flatten(model.parameters()) if isinstance(x, mx.array)]
    return {name: np.array(mx.view(mx.contiguous(x.reshape(-1)), mx.uint8)) for name, x in arrays}


def flat_factors(model: nn.Module) -> dict[str, mx.array]:
    """lora_a and lora_b of every layer by mlx-lm's names."""
    return {name: x for name, x in tree_flatten(model.parameters()) if name.endswith(("lora_a", "lora_b"))}


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """path -> module."""
    return {place.path: place.module for place in places(model)}
