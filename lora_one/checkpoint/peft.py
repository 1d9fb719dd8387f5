"""Read PEFT's layout of an adapter folder, check that it belongs to a model, and write it."""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safetensors import SafetensorError, safe_open

from lora_one.checks import shown
from lora_one.core.factors import Factors
from lora_one.errors import CheckpointError
from lora_one.files.json_files import read_object

from .adapter import Adapter, LoraLayer
from .folder import CONFIG, MLX_WEIGHTS, PICKLED, WEIGHTS, is_file
from .peft_config import check_patterns, config_problems
from .plain_lora import remedy, tensor_reason
from .scales import layer_ranks, layer_scalings, plain_settings
from .tensors import Tensor, read_tensors, wider, write_tensors
from .whole import PREFIX, whole_in_file, whole_modules, whole_problems

PEFT_KEY = "base_model.model.{path}.lora_{side}.weight"
PEFT_BASE_KEY = "base_model.model.{path}.base_layer.weight"

_FACTOR_KEY = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<side>[AB])\.weight")

Shape = tuple[int, ...]
LinearShapes = Mapping[str, tuple[int, int]]  # layer -> (out, in)


@dataclass(frozen=True)
class AdapterFolder:
    """The configuration and the shapes in an adapter folder, without the factors' values."""

    path: Path
    config: dict[str, Any]
    lora_A: dict[str, Shape]  # layer -> shape, (r, in)
    lora_B: dict[str, Shape]  # layer -> shape, (out, r)
    ranks: dict[str, int]  # layer -> its rank by the configuration
    scalings: dict[str, float]  # layer -> the factor s by the configuration
    others: Mapping[str, Shape]  # tensors that are no LoRA factors: key -> shape

    @property
    def whole(self) -> dict[str, Shape]:
        """The parameters of modules that were trained whole: path in the base model -> shape."""
        return whole_in_file(self.config, self.others)

    @property
    def modules_to_save(self) -> tuple[str, ...]:
        """The paths of the modules that were trained whole."""
        return whole_modules(self.whole, self.config.get("modules_to_save") or ())


def read_folder(path: Path) -> AdapterFolder:
    """Read an adapter folder's configuration and shapes.

    Raises:
        CheckpointError: a file is missing or cannot be read, or the adapter is not LoRA.
    """
    _check_files(path)
    config = _read_config(path / CONFIG)
    shapes, others = _read_shapes(path / WEIGHTS)
    try:
        ranks = layer_ranks(config, sorted(shapes["A"] | shapes["B"]))
        scalings = layer_scalings(config, ranks)
        check_patterns(config, list(ranks))
    except ValueError as error:
        raise CheckpointError(f"{path / CONFIG}: its settings cannot be used: {error}") from error
    return AdapterFolder(path, config, shapes["A"], shapes["B"], ranks, scalings, others)


def _check_files(path: Path) -> None:
    missing = [name for name in (CONFIG, WEIGHTS) if not is_file(path / name)]
    if WEIGHTS in missing and is_file(path / PICKLED):
        raise CheckpointError(
            f"{path} has {PICKLED}, which is a pickle, and no {WEIGHTS}: open it in PEFT and save it again"
        )
    if WEIGHTS in missing and is_file(path / MLX_WEIGHTS):
        raise CheckpointError(
            f"{path} is in mlx-lm's layout only ({MLX_WEIGHTS}): lora-one convert {path} DESTINATION --to peft"
        )
    if missing:
        raise CheckpointError(f"{path} is not an adapter folder", [f"{name}: not found" for name in missing])


def _read_config(file: Path) -> dict[str, Any]:
    config = read_object(file)
    kind = config.get("peft_type")
    if kind != "LORA" or config.get("r") is None:
        raise CheckpointError(f'{file}: "peft_type" must be "LORA" with an integer "r", got {shown(kind)}')
    problems = config_problems(config)
    if problems:
        raise CheckpointError(f"{file}: its settings cannot be used", problems)
    return config


def _read_shapes(file: Path) -> tuple[dict[str, dict[str, Shape]], dict[str, Shape]]:
    """Return the shapes of the factors, side -> layer -> shape, and of all other tensors, key -> shape."""
    shapes: dict[str, dict[str, Shape]] = {"A": {}, "B": {}}
    others: dict[str, Shape] = {}
    try:
        with safe_open(file, framework="numpy") as tensors:
            for key in tensors.keys():  # noqa: SIM118  (not a mapping)
                match, shape = _FACTOR_KEY.fullmatch(key), tuple(tensors.get_slice(key).get_shape())
                if match is None:
                    others[key] = shape
                else:
                    shapes[match["side"]][match["layer"]] = shape
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    return shapes, others


def read_adapter(folder: AdapterFolder) -> Adapter:
    """Read the factors of a folder in PEFT's layout, with each layer's own scale, and what was trained whole.

    Raises:
        CheckpointError: factors do not have the configuration's ranks, lack a partner, or are not floating point.
    """
    problems = check_factors(folder, own_shapes(folder))
    if problems:
        raise CheckpointError(f"{folder.path / WEIGHTS} does not hold what {CONFIG} says", problems)
    names = {layer: [PEFT_KEY.format(path=layer, side=side) for side in "AB"] for layer in folder.lora_A}
    of_modules = {path: f"{PREFIX}{path}" for path in folder.whole}
    tensors = read_tensors(
        folder.path / WEIGHTS, {name for pair in (*names.values(), of_modules.values()) for name in pair}
    )
    layers = {}
    for layer, (a, b) in names.items():
        pair = Factors(tensors[a].array, tensors[b].array)
        layers[layer] = LoraLayer([pair], folder.scalings[layer], wider(tensors[a].dtype, tensors[b].dtype))
    return Adapter(
        layers,
        float(folder.config.get("lora_dropout") or 0.0),
        folder.config.get("task_type"),
        modules_to_save=folder.modules_to_save,
        whole={path: tensors[key] for path, key in of_modules.items()},
    )


def own_shapes(folder: AdapterFolder) -> dict[str, tuple[int, int]]:
    """Return layer -> (out, in), read from the factors themselves; 0 for a factor that is missing or empty."""
    shapes = {}
    for layer in folder.lora_A.keys() | folder.lora_B.keys():
        a, b = folder.lora_A.get(layer), folder.lora_B.get(layer)
        shapes[layer] = (b[0] if b else 0, a[-1] if a else 0)
    return shapes


def check_folder(
    folder: AdapterFolder,
    linear: LinearShapes,
    parameters: Mapping[str, Shape | str] = MappingProxyType({}),
    held: Collection[str] | None = None,
) -> list[str]:
    """Return all reasons why an adapter does not belong to a model: its factors, and other tensors in the file.

    Args:
        linear: the model's linear layers.
        parameters: those that can be trained whole, default none; and `held`: see `whole_problems`.

    Returns:
        One sentence per problem; empty if there is none.
    """
    whole = folder.whole
    unknown = [key for key in folder.others if key.removeprefix(PREFIX) not in whole]
    problems = check_factors(folder, linear) + [unknown_tensor(key) for key in unknown]
    return problems + whole_problems(whole, folder.modules_to_save, parameters, held)


def check_factors(folder: AdapterFolder, linear: LinearShapes) -> list[str]:
    """Return the problems of `check_folder` that concern factors: partners, layers, ranks and shapes."""
    problems = []
    if not folder.lora_A and not folder.lora_B:
        problems.append(f"{WEIGHTS}: no LoRA factors in it")
    for layer in sorted(folder.lora_A.keys() ^ folder.lora_B.keys()):
        problems.append(f"{layer}: lora_{'B' if layer in folder.lora_A else 'A'} is missing")
    for layer in sorted(folder.lora_A.keys() | folder.lora_B.keys()):
        if layer not in linear:
            problems.append(f"{layer}: the model has no such linear layer")
            continue
        out_features, in_features = linear[layer]
        rank = folder.ranks[layer]
        if not out_features or not in_features:
            problems.append(f"{layer}: lora_A or lora_B is empty")
        for name, shapes, expected in (
            ("lora_A", folder.lora_A, (rank, in_features)),
            ("lora_B", folder.lora_B, (out_features, rank)),
        ):
            if layer in shapes and shapes[layer] != expected:
                problems.append(f"{layer}: {name} must be {expected}, got {shapes[layer]}")
    return problems


def unknown_tensor(key: str) -> str:
    """Return the sentence about a tensor that the configuration does not mention."""
    return f"{key}: {tensor_reason(key)}{remedy(key)}"


def write_peft(path: Path, adapter: Adapter) -> None:
    """Write an adapter into an empty folder, as PEFT, vLLM and `lora_one.load` open it."""
    write_tensors(path / WEIGHTS, peft_tensors(adapter), "pt", adapter.notes)
    write_config(path, peft_config(adapter))


def peft_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """Return the tensors of `adapter_model.safetensors`, by PEFT's names."""
    return {
        PEFT_KEY.format(path=name, side=side): Tensor(factor, layer.dtype)
        for name, layer in adapter.layers.items()
        for side, factor in zip("AB", layer.pairs[0], strict=True)
    } | {f"{PREFIX}{path}": tensor for path, tensor in adapter.whole.items()}


def peft_config(adapter: Adapter) -> dict[str, Any]:
    """Return PEFT's settings for `adapter_config.json`."""
    return {
        "peft_type": "LORA",
        "task_type": adapter.task,
        "base_model_name_or_path": None,
        "inference_mode": True,
        **plain_settings({name: (layer.rank, layer.scaling) for name, layer in adapter.layers.items()}),
        "lora_dropout": adapter.dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": list(adapter.modules_to_save) or None,
        "target_modules": list(adapter.layers),
    }


def write_config(path: Path, config: Mapping[str, Any]) -> None:
    """Write `adapter_config.json` into a folder."""
    (path / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
