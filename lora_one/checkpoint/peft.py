"""Read PEFT's layout of an adapter folder, check that it belongs to a model, and write it."""

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from lora_one.checks import shown
from lora_one.core.factors import Factors
from lora_one.errors import CheckpointError
from lora_one.files.json_files import read_object

from .adapter import LINEAR, Adapter, Form, LoraLayer
from .folder import CONFIG, MLX_WEIGHTS, PICKLED, WEIGHTS, is_file
from .magnitudes import MAGNITUDE_KEY, magnitude_problems, magnitude_tensors
from .peft_config import check_patterns, config_problems
from .plain_lora import remedy, setting_problems, tensor_reason
from .scales import layer_ranks, layer_scalings, plain_settings
from .tensors import Tensor, read_tensors, wider, write_tensors
from .whole import PREFIX, whole_in_file, whole_modules, whole_problems

PEFT_BASE_KEY = "base_model.model.{path}.base_layer.weight"

_KEY = "base_model.model.{path}.lora_{side}.weight"
_EMBEDDING_KEY = "base_model.model.{path}.lora_embedding_{side}"
_FACTOR_KEY = re.compile(
    r"base_model\.model\.(?P<layer>.+)"
    r"\.lora_(?:(?P<side>[AB])\.weight|embedding_(?P<of_embedding>[AB])|(?P<vector>magnitude_vector))"
)
_MAGNITUDE = "magnitude_vector"

Shape = tuple[int, ...]
LinearShapes = Mapping[str, tuple[int, int]]  # layer -> (out, in)
NO_FORMS: Mapping[str, Form] = MappingProxyType({})


@dataclass(frozen=True)
class AdapterFolder:
    """The configuration and the shapes in an adapter folder, without the factors' values."""

    path: Path
    config: dict[str, Any]
    lora_A: dict[str, Shape]  # layer -> shape, (r, in)
    lora_B: dict[str, Shape]  # layer -> shape, (out, r)
    ranks: dict[str, int]  # layer -> its rank by the configuration
    scalings: dict[str, float]  # layer -> the factor s by the configuration
    others: Mapping[str, Shape]  # tensors that are no LoRA factors and no magnitudes: key -> shape
    forms: Mapping[str, Form] = field(default_factory=dict)  # of the layers that are not linear
    magnitudes: Mapping[str, Shape] = field(default_factory=dict)  # DoRA's: layer -> shape, (out,)

    @property
    def use_dora(self) -> bool:
        """Whether the configuration says that each layer has magnitudes."""
        return bool(self.config.get("use_dora"))

    def key(self, layer: str, side: str) -> str:
        """Return the name of a factor in the file, "A" or "B"."""
        return peft_key(layer, side, self.forms.get(layer, LINEAR))

    @property
    def whole(self) -> dict[str, Shape]:
        """The parameters of modules that were trained whole: path in the base model -> shape."""
        return whole_in_file(self.config, self.others)

    @property
    def modules_to_save(self) -> tuple[str, ...]:
        """The paths of the modules that were trained whole."""
        return whole_modules(self.whole, self.config.get("modules_to_save") or ())


def peft_key(layer: str, side: str, form: Form = LINEAR) -> str:
    """Return PEFT's name of a factor, "A" or "B"."""
    return (_EMBEDDING_KEY if form.is_embedding else _KEY).format(path=layer, side=side)


def read_folder(path: Path) -> AdapterFolder:
    """Read an adapter folder's configuration and shapes.

    Raises:
        CheckpointError: a file is missing or cannot be read, or the adapter is not LoRA.
    """
    _check_files(path)
    config = _read_config(path / CONFIG)
    shapes, others, forms = _read_shapes(path / WEIGHTS)
    try:
        ranks = layer_ranks(config, sorted(shapes["A"] | shapes["B"]))
        scalings = layer_scalings(config, ranks)
        check_patterns(config, list(ranks))
    except ValueError as error:
        raise CheckpointError(f"{path / CONFIG}: its settings cannot be used: {error}") from error
    return AdapterFolder(path, config, shapes["A"], shapes["B"], ranks, scalings, others, forms, shapes[_MAGNITUDE])


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


def _read_shapes(file: Path) -> tuple[dict[str, dict[str, Shape]], dict[str, Shape], dict[str, Form]]:
    """Return the shapes of the factors, as matrices, and of the magnitudes; of other tensors; and the layers' forms."""
    shapes: dict[str, dict[str, Shape]] = {"A": {}, "B": {}, _MAGNITUDE: {}}
    others: dict[str, Shape] = {}
    forms: dict[str, Form] = {}
    try:
        with safe_open(file, framework="numpy") as tensors:
            for key in tensors.keys():  # noqa: SIM118  (not a mapping)
                match, shape = _FACTOR_KEY.fullmatch(key), tuple(tensors.get_slice(key).get_shape())
                if match is None:
                    others[key] = shape
                    continue
                shapes[match["side"] or match["of_embedding"] or match["vector"]][match["layer"]] = shape
                if match["of_embedding"]:
                    forms[match["layer"]] = Form(is_embedding=True)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    for layer, a in shapes["A"].items():
        b = shapes["B"].get(layer, ())
        if len(a) == len(b) > 2 and set(b[2:]) == {1} and layer not in forms:
            forms[layer] = Form(kernel=a[2:])
            shapes["A"][layer], shapes["B"][layer] = (a[0], math.prod(a[1:])), b[:2]
    return shapes, others, forms


def read_adapter(folder: AdapterFolder) -> Adapter:
    """Read the factors of a folder in PEFT's layout, with each layer's own scale, and what was trained whole.

    Raises:
        CheckpointError: factors do not have the configuration's ranks, lack a partner, are not floating point, or
            belong to experts that are one parameter.
    """
    if folder.config.get("target_parameters"):
        named = setting_problems({"target_parameters": folder.config["target_parameters"]})
        raise CheckpointError(f"{folder.path} is an adapter for PyTorch and PEFT alone", named)
    problems = check_factors(folder, own_shapes(folder), folder.forms)
    if problems:
        raise CheckpointError(f"{folder.path / WEIGHTS} does not hold what {CONFIG} says", problems)
    names = {layer: [folder.key(layer, side) for side in "AB"] for layer in folder.lora_A}
    of_modules = {path: f"{PREFIX}{path}" for path in folder.whole}
    of_magnitudes = {layer: MAGNITUDE_KEY.format(path=layer) for layer in folder.magnitudes}
    of_factors = (name for pair in names.values() for name in pair)
    tensors = read_tensors(folder.path / WEIGHTS, {*of_factors, *of_modules.values(), *of_magnitudes.values()})
    layers = {}
    for layer, (a, b) in names.items():
        pair = Factors(*(tensors[key].array.reshape(len(tensors[key].array), -1) for key in (a, b)))
        dtype, form = wider(tensors[a].dtype, tensors[b].dtype), folder.forms.get(layer, LINEAR)
        m = tensors[of_magnitudes[layer]] if layer in of_magnitudes else None
        layers[layer] = LoraLayer([pair], folder.scalings[layer], dtype, form=form, magnitude=m)
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
    forms: Mapping[str, Form] = NO_FORMS,
) -> list[str]:
    """Return all reasons why an adapter does not belong to a model: its factors, and other tensors in the file.

    Args:
        linear: the model's layers that may have LoRA, and `forms`: the kinds of those that are not linear.
        parameters: those that can be trained whole, default none; and `held`: see `whole_problems`.

    Returns:
        One sentence per problem; empty if there is none.
    """
    whole = folder.whole
    unknown = [key for key in folder.others if key.removeprefix(PREFIX) not in whole]
    problems = check_factors(folder, linear, forms) + [unknown_tensor(key) for key in unknown]
    return problems + whole_problems(whole, folder.modules_to_save, parameters, held)


def check_factors(folder: AdapterFolder, linear: LinearShapes, forms: Mapping[str, Form] = NO_FORMS) -> list[str]:
    """Return the problems of `check_folder` that concern factors: partners, layers, ranks and shapes."""
    problems = []
    if not folder.ranks:
        problems.append(f"{WEIGHTS}: no LoRA factors in it")
    for layer in sorted(folder.lora_A.keys() ^ folder.lora_B.keys()):
        problems.append(f"{layer}: lora_{'B' if layer in folder.lora_A else 'A'} is missing")
    for layer in sorted(folder.lora_A.keys() | folder.lora_B.keys()):
        if layer not in linear:
            problems.append(f"{layer}: the model has no such linear layer")
            continue
        has, got = (x.get(layer, LINEAR) for x in (forms, folder.forms))
        if has != got:
            problems.append(f"{layer}: the model has {has.name} there, the file factors of {got.name}")
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
        if layer in folder.magnitudes and folder.magnitudes[layer] != (out_features,):
            problems.append(f"{layer}: lora_magnitude_vector must be {(out_features,)}, got {folder.magnitudes[layer]}")
    layers = folder.lora_A.keys() | folder.lora_B.keys()
    return problems + magnitude_problems(layers, folder.magnitudes, folder.use_dora, folder.forms)


def unknown_tensor(key: str) -> str:
    """Return the sentence about a tensor that the configuration does not mention."""
    return f"{key}: {tensor_reason(key)}{remedy(key)}"


def write_peft(path: Path, adapter: Adapter) -> None:
    """Write an adapter into an empty folder, as PEFT, vLLM and `lora_one.load` open it."""
    write_tensors(path / WEIGHTS, peft_tensors(adapter), "pt", adapter.notes)
    write_config(path, peft_config(adapter))


def peft_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """Return the tensors of `adapter_model.safetensors`, by PEFT's names."""
    tensors = {
        peft_key(name, side, layer.form): Tensor(with_kernel(factor, side, layer.form), layer.dtype)
        for name, layer in adapter.layers.items()
        for side, factor in zip("AB", layer.pairs[0], strict=True)
    }
    return (
        tensors
        | magnitude_tensors(adapter.layers)
        | {f"{PREFIX}{path}": tensor for path, tensor in adapter.whole.items()}
    )


def with_kernel(factor: np.ndarray, side: str, form: Form) -> np.ndarray:
    """Return a factor, a matrix, with the axes that PEFT keeps it with."""
    sizes = form.kernel if side == "A" else (1,) * len(form.kernel)
    return factor.reshape(len(factor), -1, *sizes) if sizes else factor


def peft_config(adapter: Adapter) -> dict[str, Any]:
    """Return PEFT's settings for `adapter_config.json`."""
    return {
        "peft_type": "LORA",
        "task_type": adapter.task,
        "base_model_name_or_path": None,
        "inference_mode": True,
        **plain_settings({name: (layer.rank, layer.scaling) for name, layer in adapter.layers.items()}),
        "lora_dropout": adapter.dropout,
        "use_dora": adapter.is_dora,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": list(adapter.modules_to_save) or None,
        "target_modules": list(adapter.layers),
    }


def write_config(path: Path, config: Mapping[str, Any]) -> None:
    """Write `adapter_config.json` into a folder."""
    (path / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
