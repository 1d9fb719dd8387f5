"""Adapter folders in mlx-lm's layout (see `formats`), read into no framework's arrays."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_one.checks import is_number, shown
from lora_one.core.factors import Factors
from lora_one.errors import CheckpointError
from lora_one.files.json_files import read_object

from .adapter import Adapter, LoraLayer
from .peft import CONFIG, MLX_WEIGHTS, is_file
from .peft_config import LARGEST_ALPHA, is_rank
from .tensors import Tensor, read_tensors, tensor_names, wider

Shapes = Mapping[str, tuple[int, ...]]  # path -> (out, in), or (experts, out, in)

_OTHER_KINDS = {
    "dora": "its magnitudes m are no part of plain LoRA",
    "full": "whole weights were trained, and there is no adapter",
}


def is_mlx_lm(path: Path) -> bool:
    """Whether a folder is to be read in mlx-lm's layout: where it has both, mlx-lm may have trained on in its own.

    Raises:
        CheckpointError: there is no configuration, or it cannot be read.
    """
    config = _read_config(path)
    speaks = isinstance(config.get("lora_parameters"), dict) or "peft_type" not in config
    return speaks and is_file(path / MLX_WEIGHTS)


def read_mlx_lm(path: Path, model: Shapes | None = None) -> Adapter:
    """Read a folder in mlx-lm's layout.

    Args:
        model: the linear layers that the adapter may be for; None takes the file's word for their shapes.

    Raises:
        CheckpointError: all that is wrong with files, names, ranks and shapes, at once.
    """
    rank, scale, dropout = _read_parameters(path)
    tensors = read_tensors(path / MLX_WEIGHTS)
    layers, problems = {}, []
    for name in sorted({key.rpartition(".")[0] for key in tensors}):
        a, b = tensors.pop(f"{name}.lora_a", None), tensors.pop(f"{name}.lora_b", None)
        if a is None or b is None:
            if a is not None or b is not None:
                problems.append(f"{name}: lora_{'b' if b is None else 'a'} is missing")
            continue
        wrong = _shape_problems(name, a.array.shape, b.array.shape, rank, model)
        problems += wrong
        if not wrong:
            layers[name] = _layer(a, b, scale)
    problems += [f"{key}: neither lora_a nor lora_b of a linear layer" for key in tensors]
    if not layers and not problems:
        problems.append(f"{MLX_WEIGHTS}: no LoRA factors in it")
    if problems:
        verdict = "cannot be read" if model is None else "does not fit the model"
        raise CheckpointError(f"the adapter in {path} {verdict}", problems)
    return Adapter(layers, dropout)


def _read_parameters(path: Path) -> tuple[int, float, float]:
    """(rank, scale, dropout), for all layers."""
    config = _read_config(path)
    kind, parameters = config.get("fine_tune_type", "lora"), config.get("lora_parameters") or {}
    if kind != "lora":
        names = tensor_names(path / MLX_WEIGHTS)
        raise CheckpointError(
            f'{path / CONFIG}: "fine_tune_type" must be "lora", got {shown(kind)}: '
            f"{_OTHER_KINDS.get(str(kind), 'not LoRA')}",
            [name for name in names if kind != "dora" or name.endswith(".m")],
        )
    found: dict[str, Any] = parameters if isinstance(parameters, dict) else {}
    rank: Any = found.get("rank")
    scale: Any = found.get("scale")
    dropout = found.get("dropout") or 0.0
    if not is_rank(rank) or not is_number(scale) or abs(scale) > LARGEST_ALPHA:
        raise CheckpointError(
            f'{path / CONFIG}: "lora_parameters" must have a rank, an integer from 1 on, and a scale, a number, '
            f"got {shown(parameters)}"
        )
    if not is_number(dropout) or not 0 <= dropout <= 1:
        raise CheckpointError(
            f'{path / CONFIG}: the dropout in "lora_parameters" must be in [0, 1], got {shown(dropout)}'
        )
    return rank, float(scale), float(dropout)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        return read_object(path / CONFIG)
    except CheckpointError as error:
        raise CheckpointError(f"{path} is not an adapter folder", [f"{CONFIG}: {error}"]) from error


def _shape_problems(name: str, a: tuple[int, ...], b: tuple[int, ...], rank: int, model: Shapes | None) -> list[str]:
    if model is not None and name not in model:
        return [f"{name}: the model has no such linear layer"]
    if len(a) != len(b) or len(a) not in (2, 3) or 0 in (*a, *b):
        return [f"{name}: lora_a and lora_b must be matrices, or stacks of them, got {a} and {b}"]
    own = (b[-1], a[0]) if len(a) == 2 else (a[0], b[-2], a[-1])
    *experts, out_features, in_features = own if model is None else model[name]
    expected = [(*experts, rank, in_features), (*experts, out_features, rank)]
    if not experts:
        expected = [shape[::-1] for shape in expected]
    found = zip(("lora_a", "lora_b"), (a, b), expected, strict=True)
    return [f"{name}: {factor} must be {want}, got {got}" for factor, got, want in found if got != want]


def _layer(a: Tensor, b: Tensor, scale: float) -> LoraLayer:
    dtype = wider(a.dtype, b.dtype)
    if a.array.ndim == 2:
        return LoraLayer([Factors(a.array.T, b.array.T)], scale, dtype)
    return LoraLayer([Factors(*pair) for pair in zip(a.array, b.array, strict=True)], scale, dtype, is_switch=True)
