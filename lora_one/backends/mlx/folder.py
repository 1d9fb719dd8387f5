"""Adapter folders in both dialects: what mlx-lm and PEFT each need to find in the same folder.

adapter_config.json       one file: PEFT ignores mlx-lm's keys, mlx-lm ignores PEFT's
adapters.safetensors      mlx-lm's factors, at one rank and one scale for all layers, which is all that mlx-lm knows
adapter_model.safetensors PEFT's factors; not for mixtures of experts, whose stacked layers PEFT has no name for
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
from safetensors import SafetensorError, safe_open

from lora_one.checkpoint import CONFIG, WEIGHTS, check_folder, read_folder
from lora_one.core.factors import Factors
from lora_one.errors import CheckpointError

MLX_WEIGHTS = "adapters.safetensors"
PEFT_KEY = "base_model.model.{path}.lora_{side}.weight"


class Pairs(NamedTuple):
    """What one LoRA layer of an adapter holds."""

    pairs: list[Factors]  # one, or one an expert
    scale: float
    is_switch: bool


class Adapter(NamedTuple):
    """An adapter in memory."""

    layers: dict[str, Pairs]  # by path
    dropout: float


Shapes = dict[str, tuple[int, ...]]  # path -> (out, in), or (experts, out, in)


def write_folder(path: Path, adapter: Adapter, num_layers: int) -> None:
    """Write all files of an adapter folder but lora_one.json.

    Args:
        num_layers: blocks of the model, which mlx-lm's configuration wants to hold.
    """
    path.mkdir(parents=True, exist_ok=True)
    rank = max(layer.pairs[0].lora_A.shape[0] for layer in adapter.layers.values())
    scale = next(iter(adapter.layers.values())).scale
    config: dict[str, Any] = {
        "fine_tune_type": "lora",
        "num_layers": num_layers,
        "lora_parameters": {
            "rank": rank,
            "scale": scale,
            "dropout": adapter.dropout,
            "keys": list(adapter.layers),
        },
    }
    weights: dict[str, mx.array] = {}
    for name, layer in adapter.layers.items():
        padded = [_padded(pair, rank, layer.scale / scale) for pair in layer.pairs]
        if layer.is_switch:
            weights[f"{name}.lora_a"] = mx.stack([pair.lora_A for pair in padded])  # (experts, r, in)
            weights[f"{name}.lora_b"] = mx.stack([pair.lora_B for pair in padded])  # (experts, out, r)
        else:
            weights[f"{name}.lora_a"] = padded[0].lora_A.T  # (in, r)
            weights[f"{name}.lora_b"] = padded[0].lora_B.T  # (r, out)
    _save(path / MLX_WEIGHTS, weights, "mlx")
    (path / WEIGHTS).unlink(missing_ok=True)  # one of an earlier adapter would be read in the place of this one
    if not any(layer.is_switch for layer in adapter.layers.values()):
        config.update(_peft_config(adapter, rank, scale))
        _save(path / WEIGHTS, {
            PEFT_KEY.format(path=name, side=side): factor
            for name, layer in adapter.layers.items()
            for side, factor in zip("AB", layer.pairs[0], strict=True)
        }, "pt")  # fmt: skip
    (path / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def read_adapter(path: Path, model: Shapes) -> Adapter:
    """Read a folder that lora-one, mlx-lm or PEFT wrote; mlx-lm's own file comes first, since mlx-lm trains on in it.

    Args:
        model: the linear layers that the adapter may be for.

    Raises:
        CheckpointError: all that is wrong with files, names, ranks and shapes, at once.
    """
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not an adapter folder", [f"{CONFIG}: {error}"]) from error
    if isinstance(config, dict) and isinstance(config.get("lora_parameters"), dict) and (path / MLX_WEIGHTS).is_file():
        return _read_mlx_lm(path, config, model)
    return _read_peft(path, model)


def _read_mlx_lm(path: Path, config: dict[str, Any], model: Shapes) -> Adapter:
    parameters = config["lora_parameters"]
    kind, rank, scale = config.get("fine_tune_type", "lora"), parameters.get("rank"), parameters.get("scale")
    if kind != "lora" or not isinstance(rank, int) or not isinstance(scale, (int, float)):
        raise CheckpointError(
            f'{path / CONFIG}: "fine_tune_type" must be "lora" with a rank and a scale, '
            f"got {kind!r}, {rank!r}, {scale!r}"
        )
    arrays = _load(path / MLX_WEIGHTS)
    problems = []
    layers: dict[str, Pairs] = {}
    for name in sorted({key.rpartition(".")[0] for key in arrays}):
        a, b = arrays.pop(f"{name}.lora_a", None), arrays.pop(f"{name}.lora_b", None)
        if a is None or b is None:
            if a is not None or b is not None:
                problems.append(f"{name}: lora_{'b' if b is None else 'a'} is missing")
            continue
        if name not in model:
            problems.append(f"{name}: the model has no such linear layer")
            continue
        *experts, out_features, in_features = model[name]
        expected = [(*experts, rank, in_features), (*experts, out_features, rank)]
        if not experts:
            expected = [shape[::-1] for shape in expected]
        for factor, x, shape in (("lora_a", a, expected[0]), ("lora_b", b, expected[1])):
            if x.shape != shape:
                problems.append(f"{name}: {factor} must be {shape}, got {x.shape}")
        pairs = [Factors(*pair) for pair in zip(a, b, strict=False)] if experts else [Factors(a.T, b.T)]
        layers[name] = Pairs(pairs, float(scale), bool(experts))
    problems += [f"{key}: neither lora_a nor lora_b of a linear layer" for key in arrays]
    if not layers and not problems:
        problems.append(f"{MLX_WEIGHTS}: no LoRA factors in it")
    if problems:
        raise CheckpointError(f"the adapter in {path} does not fit the model", problems)
    return Adapter(layers, float(parameters.get("dropout", 0.0)))


def _read_peft(path: Path, model: Shapes) -> Adapter:
    folder = read_folder(path)
    dense = {name: (shape[0], shape[1]) for name, shape in model.items() if len(shape) == 2}
    problems = check_folder(folder, dense)
    if folder.config.get("use_dora"):
        problems.append("use_dora: DoRA is another adapter than plain LoRA")
    if folder.config.get("modules_to_save"):
        problems.append("modules_to_save: layers that were trained whole have no place beside LoRA on MLX")
    if problems:
        raise CheckpointError(f"the adapter in {path} does not fit the model", problems)
    arrays = _load(path / WEIGHTS)
    layers = {}
    for name in folder.lora_A:
        pair = Factors(*(arrays[PEFT_KEY.format(path=name, side=side)] for side in "AB"))
        layers[name] = Pairs([pair], folder.scaling(name), is_switch=False)
    return Adapter(layers, float(folder.config.get("lora_dropout") or 0.0))


def _peft_config(adapter: Adapter, rank: int, scale: float) -> dict[str, Any]:
    ranks = {name: layer.pairs[0].lora_A.shape[0] for name, layer in adapter.layers.items()}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": scale * rank,
        "lora_dropout": adapter.dropout,
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": list(adapter.layers),
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {
            name: layer.scale * ranks[name]
            for name, layer in adapter.layers.items()
            if layer.scale * ranks[name] != scale * rank
        },
    }


def _padded(pair: Factors, rank: int, ratio: float) -> Factors:
    """The pair at a larger rank, with zeros, and with the ratio of two scales folded into lora_B."""
    missing = rank - pair.lora_A.shape[0]
    lora_B = pair.lora_B if ratio == 1.0 else (pair.lora_B * ratio).astype(pair.lora_B.dtype)
    if missing == 0:
        return Factors(pair.lora_A, lora_B)
    return Factors(mx.pad(pair.lora_A, [(0, missing), (0, 0)]), mx.pad(lora_B, [(0, 0), (0, missing)]))


def _save(path: Path, arrays: dict[str, mx.array], format_: str) -> None:
    # MLX's own writer, for bfloat16. Contiguous first: safetensors files hold no strides, and NumPy's writer for one
    # stores a transposed array as it lies in memory, without a word.
    mx.save_safetensors(str(path), {name: mx.contiguous(x) for name, x in arrays.items()}, metadata={"format": format_})


def _load(path: Path) -> dict[str, mx.array]:
    try:
        with safe_open(path, framework="numpy"):  # a truncated file raises here, and not while a model is half written
            pass
        arrays: Any = mx.load(str(path))
        mx.eval(arrays)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    bad = [name for name, x in arrays.items() if x.dtype not in _FLOATS]
    if bad:
        raise CheckpointError(f"{path}: factors must be floating point", bad)
    loaded: dict[str, mx.array] = arrays
    return loaded


_FLOATS = (mx.float32, mx.bfloat16, mx.float16, mx.float64)
