"""Read and write mlx-lm's layout of an adapter folder."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_one.checks import is_number, shown
from lora_one.core.factors import Factors
from lora_one.errors import CheckpointError
from lora_one.files.json_files import read_object

from .adapter import Adapter, LoraLayer
from .folder import CONFIG, MLX_WEIGHTS, WEIGHTS, is_file
from .peft import peft_config, peft_tensors, write_config, write_peft
from .peft_config import LARGEST_ALPHA, config_problems, is_dropout, is_rank
from .tensors import Tensor, read_tensors, tensor_names, wider, write_tensors
from .whole import channels_first, channels_last, whole_module, whole_modules

Shapes = Mapping[str, tuple[int, ...]]  # path -> (out, in), or (experts, out, in)

_KINDS = ("lora", "dora")


def is_mlx_lm(path: Path) -> bool:
    """Return whether a folder is to be read in mlx-lm's layout.

    A folder with both layouts is: mlx-lm may have continued to train in its own.

    Raises:
        CheckpointError: there is no configuration, or it cannot be read.
    """
    config = _read_config(path)
    is_configured = isinstance(config.get("lora_parameters"), dict) or "peft_type" not in config
    return is_configured and is_file(path / MLX_WEIGHTS)


def read_mlx_lm(path: Path, model: Shapes | None = None) -> Adapter:
    """Read a folder in mlx-lm's layout.

    Args:
        model: the linear layers that the adapter may be for; None accepts the shapes in the file.

    Raises:
        CheckpointError: all that is wrong with files, names, ranks and shapes, at once.
    """
    config = _read_config(path)
    kind, rank, scale, dropout = _parameters(path, config)
    tensors = read_tensors(path / MLX_WEIGHTS)
    layers, problems = {}, []
    for name in sorted({key.rpartition(".")[0] for key in tensors}):
        a, b = tensors.pop(f"{name}.lora_a", None), tensors.pop(f"{name}.lora_b", None)
        if a is None or b is None:
            if a is not None or b is not None:
                problems.append(f"{name}: lora_{'b' if b is None else 'a'} is missing")
            continue
        m = tensors.pop(f"{name}.m", None)
        wrong_shapes = _shape_problems(name, a.array.shape, b.array.shape, rank, model)
        wrong_shapes += _magnitude_problems(name, m, b, kind)
        problems += wrong_shapes
        if not wrong_shapes:
            layers[name] = _layer(a, b, scale)._replace(magnitude=m)
    names = _names_to_save(path, config)
    whole = {
        key: Tensor(channels_first(key, array), dtype)
        for key, (array, dtype) in tensors.items()
        if key.rpartition(".")[2] not in ("lora_a", "lora_b") and whole_module(key, names)
    }
    problems += [f"{key}: neither lora_a, lora_b nor m of a linear layer" for key in tensors if key not in whole]
    if not layers and not problems:
        problems.append(f"{MLX_WEIGHTS}: no LoRA factors in it")
    if problems:
        verdict = "cannot be read" if model is None else "does not fit the model"
        raise CheckpointError(f"the adapter in {path} {verdict}", problems)
    return Adapter(layers, dropout, modules_to_save=whole_modules(whole, names), whole=whole)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        return read_object(path / CONFIG)
    except CheckpointError as error:
        raise CheckpointError(f"{path} is not an adapter folder", [f"{CONFIG}: {error}"]) from error


def _parameters(path: Path, config: Mapping[str, Any]) -> tuple[str, int, float, float]:
    """Return (kind, rank, scale, dropout), which hold for all layers."""
    kind, parameters = config.get("fine_tune_type", "lora"), config.get("lora_parameters") or {}
    if kind not in _KINDS:
        raise CheckpointError(
            f'{path / CONFIG}: "fine_tune_type" must be "lora" or "dora", got {shown(kind)}: '
            f"{'whole weights were trained, and there is no adapter' if kind == 'full' else 'not LoRA'}",
            tensor_names(path / MLX_WEIGHTS),
        )
    settings: dict[str, Any] = parameters if isinstance(parameters, dict) else {}
    rank, scale = settings.get("rank"), settings.get("scale")
    dropout = settings.get("dropout") or 0.0
    if not is_rank(rank) or not is_number(scale) or abs(scale) > LARGEST_ALPHA:
        raise CheckpointError(
            f'{path / CONFIG}: "lora_parameters" must have a rank, an integer from 1 on, and a scale, a number, '
            f"got {shown(parameters)}"
        )
    if not is_dropout(dropout):
        raise CheckpointError(
            f'{path / CONFIG}: the dropout in "lora_parameters" must be in [0, 1], got {shown(dropout)}'
        )
    return str(kind), rank, float(scale), float(dropout)


def _names_to_save(path: Path, config: Mapping[str, Any]) -> list[str]:
    """Return the modules that were trained whole, of which only a configuration in both dialects tells."""
    problems = config_problems({"modules_to_save": config.get("modules_to_save")})
    if problems:
        raise CheckpointError(f"{path / CONFIG}: its settings cannot be used", problems)
    return config.get("modules_to_save") or []


def _shape_problems(name: str, a: tuple[int, ...], b: tuple[int, ...], rank: int, model: Shapes | None) -> list[str]:
    if model is not None and name not in model:
        return [f"{name}: the model has no such linear layer"]
    if len(a) != len(b) or len(a) not in (2, 3) or 0 in (*a, *b):
        return [f"{name}: lora_a and lora_b must be matrices, or stacks of them, got {a} and {b}"]
    shape_in_file = (b[-1], a[0]) if len(a) == 2 else (a[0], b[-2], a[-1])
    *experts, out_features, in_features = shape_in_file if model is None else model[name]
    expected = [(*experts, rank, in_features), (*experts, out_features, rank)]
    if not experts:
        expected = [shape[::-1] for shape in expected]
    shapes = zip(("lora_a", "lora_b"), (a, b), expected, strict=True)
    return [f"{name}: {factor} must be {want}, got {got}" for factor, got, want in shapes if got != want]


def _magnitude_problems(name: str, m: Tensor | None, b: Tensor, kind: str) -> list[str]:
    """Return why a layer does not have the magnitudes, (out,), that its kind has."""
    if m is None or kind != "dora":
        wrong = (m is None) == (kind == "dora")
        return [f'{name}: m {"is missing" if m is None else "is there"}, and "fine_tune_type" is "{kind}"'] * wrong
    expected, got = b.array.shape[1:], m.array.shape
    return [] if b.array.ndim == 2 and got == expected else [f"{name}: m must be {expected}, got {got}"]


def _layer(a: Tensor, b: Tensor, scale: float) -> LoraLayer:
    dtype = wider(a.dtype, b.dtype)
    if a.array.ndim == 2:
        return LoraLayer([Factors(a.array.T, b.array.T)], scale, dtype)
    return LoraLayer([Factors(*pair) for pair in zip(a.array, b.array, strict=True)], scale, dtype, is_switch=True)


def write_mlx_lm(path: Path, adapter: Adapter, num_layers: int, fits_peft: bool = True) -> None:
    """Write an adapter into an empty folder, as mlx-lm opens it, and in PEFT's layout beside it.

    PEFT's layout is left out for a stack of experts, which PEFT cannot name, and mlx-lm's where modules were trained
    whole, since mlx-lm opens nothing but factors. With both in one adapter, `lora_one.load` alone opens the folder.

    Args:
        num_layers: the number of blocks of the model, which mlx-lm's configuration must hold.
        fits_peft: whether PEFT would compute the same, so that its layout goes beside.
    """
    has_experts = any(layer.is_switch for layer in adapter.layers.values())
    if adapter.modules_to_save and not has_experts:
        write_peft(path, adapter)
        return
    rank = max(layer.rank for layer in adapter.layers.values())
    scales = Counter(layer.scaling for layer in adapter.layers.values() if layer.scaling)
    scale = scales.most_common(1)[0][0] if scales else 1.0  # layers of scale 0 get a lora_b of zeros
    parameters = {"rank": rank, "scale": scale, "dropout": adapter.dropout, "keys": list(adapter.layers)}
    kind = "dora" if adapter.is_dora else "lora"
    config: dict[str, Any] = {"fine_tune_type": kind, "num_layers": num_layers, "lora_parameters": parameters}
    config["modules_to_save"] = list(adapter.modules_to_save) or None
    tensors = {}
    for name, layer in adapter.layers.items():
        tensors.update(_tensors(name, layer, rank, scale))
    for name, (array, dtype) in adapter.whole.items():
        tensors[name] = Tensor(channels_last(name, array), dtype)
    write_tensors(path / MLX_WEIGHTS, tensors, "mlx")
    if fits_peft and not has_experts:
        config.update(peft_config(adapter))
        write_tensors(path / WEIGHTS, peft_tensors(adapter), "pt")
    write_config(path, config)


def _tensors(name: str, layer: LoraLayer, rank: int, scale: float) -> dict[str, Tensor]:
    """Return the layer's factors, converted to the rank and the scale of the whole folder."""
    pairs = layer.with_scale(scale, rank).pairs
    a = np.stack([pair.lora_A for pair in pairs])  # (experts, r, in)
    b = np.stack([pair.lora_B for pair in pairs])  # (experts, out, r)
    # In bfloat16 the product with the ratio of the scales would be rounded again.
    dtype = layer.dtype if layer.scaling == scale else wider(layer.dtype, "F32")
    a, b = (a, b) if layer.is_switch else (a[0].T, b[0].T)
    m = {} if layer.magnitude is None else {f"{name}.m": layer.magnitude}
    return {f"{name}.lora_a": Tensor(a, layer.dtype), f"{name}.lora_b": Tensor(b, dtype), **m}
