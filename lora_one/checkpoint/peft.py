"""Adapters on disk, in PEFT's format: what a folder holds, and whether it belongs to a model.

A folder has `adapter_config.json`, `adapter_model.safetensors`, and, if lora-one wrote it, `lora_one.json`.
"""

import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lora_one.checks import shown
from lora_one.core.factors import Factors
from lora_one.errors import CheckpointError
from lora_one.files.atomic import replacing
from lora_one.files.json_files import read_object

from .adapter import Adapter, LoraLayer
from .peft_config import check_patterns, config_problems, layer_ranks, layer_scalings
from .plain_lora import remedy, tensor_reason
from .tensors import read_tensors, wider

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
METADATA = "lora_one.json"
PICKLED = "adapter_model.bin"
MLX_WEIGHTS = "adapters.safetensors"  # mlx-lm's layout: see `formats`
ADAPTER_FILES = (CONFIG, WEIGHTS, PICKLED, MLX_WEIGHTS, METADATA)  # of one adapter: none may outlive it
PEFT_KEY = "base_model.model.{path}.lora_{side}.weight"
PEFT_BASE_KEY = "base_model.model.{path}.base_layer.weight"

_KEY = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<factor>[AB])\.weight")


@dataclass(frozen=True)
class AdapterFolder:
    """What an adapter folder says of itself, without its numbers."""

    path: Path
    config: dict[str, Any]
    lora_A: dict[str, tuple[int, ...]]  # layer -> shape, (r, in)
    lora_B: dict[str, tuple[int, ...]]  # layer -> shape, (out, r)
    ranks: dict[str, int]  # layer -> what the configuration says
    scalings: dict[str, float]  # layer -> the factor s, by the configuration
    others: Mapping[str, tuple[int, ...]]  # what is no LoRA factor: key -> shape

    def rank(self, layer: str) -> int:
        """The rank that the configuration gives a layer of the file."""
        return self.ranks[layer]

    def scaling(self, layer: str) -> float:
        """The factor s that the configuration gives a layer of the file."""
        return self.scalings[layer]


def read_folder(path: Path) -> AdapterFolder:
    """Read an adapter folder's configuration and shapes.

    Raises:
        CheckpointError: a file that is missing or cannot be read, or an adapter that is not LoRA.
    """
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
    config = read_object(path / CONFIG)
    kind = config.get("peft_type")
    if kind != "LORA" or config.get("r") is None:
        raise CheckpointError(f'{path / CONFIG}: "peft_type" must be "LORA" with an integer "r", got {shown(kind)}')
    problems = config_problems(config)
    if problems:
        raise CheckpointError(f"{path / CONFIG}: its settings cannot be used", problems)
    shapes: dict[str, dict[str, tuple[int, ...]]] = {"A": {}, "B": {}}
    others: dict[str, tuple[int, ...]] = {}
    try:
        with safe_open(path / WEIGHTS, framework="numpy") as file:
            for key in file.keys():  # noqa: SIM118  (not a mapping)
                match, shape = _KEY.fullmatch(key), tuple(file.get_slice(key).get_shape())
                if match is None:
                    others[key] = shape
                else:
                    shapes[match["factor"]][match["layer"]] = shape
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path / WEIGHTS} cannot be read: {error}") from error
    try:
        ranks = layer_ranks(config, sorted(shapes["A"] | shapes["B"]))
        scalings = layer_scalings(config, ranks)
        check_patterns(config, list(ranks))
    except ValueError as error:
        raise CheckpointError(f"{path / CONFIG}: its settings cannot be used: {error}") from error
    return AdapterFolder(path, config, shapes["A"], shapes["B"], ranks, scalings, others)


def is_file(path: Path) -> bool:
    """Whether there is one, also under a name that no file can have."""
    try:
        return path.is_file()
    except OSError:  # a name that is too long, a folder that may not be looked into
        return False


def own_shapes(folder: AdapterFolder) -> dict[str, tuple[int, int]]:
    """layer -> (out, in), by its own factors, where no model is at hand to ask."""
    a, b = folder.lora_A, folder.lora_B
    return {layer: ((*b.get(layer, ()), 0)[0], (0, *a.get(layer, ()))[-1]) for layer in a.keys() | b.keys()}


def read_adapter(folder: AdapterFolder) -> Adapter:
    """The pairs of an adapter in PEFT's layout, with each layer's own scale.

    Raises:
        CheckpointError: factors that are no pairs of the configuration's ranks, or whose dtype is not floating.
    """
    problems = check_folder(replace(folder, others={}), own_shapes(folder))
    if problems:
        raise CheckpointError(f"{folder.path / WEIGHTS} does not hold what {CONFIG} says", problems)
    names = {layer: [PEFT_KEY.format(path=layer, side=side) for side in "AB"] for layer in folder.lora_A}
    tensors = read_tensors(folder.path / WEIGHTS, {name for pair in names.values() for name in pair})
    layers = {}
    for layer, (a, b) in names.items():
        pair = Factors(tensors[a].array, tensors[b].array)
        layers[layer] = LoraLayer([pair], folder.scaling(layer), wider(tensors[a].dtype, tensors[b].dtype))
    return Adapter(layers, float(folder.config.get("lora_dropout") or 0.0), folder.config.get("task_type"))


def check_folder(folder: AdapterFolder, linear: Mapping[str, tuple[int, int]]) -> list[str]:
    """All that keeps an adapter from belonging to a model: of its factors, and of what else is in the file.

    Args:
        linear: the model's linear layers: name -> (out, in).

    Returns:
        One sentence a problem; empty if there is none.
    """
    kept = tuple(folder.config.get("modules_to_save") or ())
    others = [key for key in folder.others if not any(f".{name}." in f".{key}." for name in kept)]
    return check_factors(folder, linear) + [unknown_tensor(key) for key in others]


def check_factors(folder: AdapterFolder, linear: Mapping[str, tuple[int, int]]) -> list[str]:
    """The part of `check_folder` that is about factors: partners, layers, ranks and shapes."""
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
        rank = folder.rank(layer)
        if not out_features or not in_features:
            problems.append(f"{layer}: lora_A or lora_B is empty")
        for name, shapes, expected in (
            ("lora_A", folder.lora_A, (rank, in_features)),
            ("lora_B", folder.lora_B, (out_features, rank)),
        ):
            if layer in shapes and shapes[layer] != expected:
                problems.append(f"{layer}: {name} must be {expected}, got {shapes[layer]}")
    return problems


def replacing_adapter(path: Path) -> AbstractContextManager[Path]:
    """An empty folder to write an adapter into, which replaces the one in `path`, of any library's, in one step.

    Raises:
        CheckpointError: see `lora_one.files.atomic.replacing`.
    """
    return replacing(path, ADAPTER_FILES)


def unknown_tensor(key: str) -> str:
    """The sentence about a tensor that nothing in the configuration speaks of."""
    return f"{key}: {tensor_reason(key)}{remedy(key)}"
