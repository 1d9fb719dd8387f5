"""Merge an adapter folder into a model folder of Hugging Face: W + s B A, tensor by tensor, without a framework.

Each file of weights is copied, and the bytes of the tensors that change are written over in the copy. So names, dtypes
and order of all tensors stay, and one tensor at a time is in memory.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lora_one.checks import shown_names
from lora_one.errors import CheckpointError
from lora_one.files.atomic import replacing
from lora_one.files.json_files import read_object

from .adapter import Adapter, LoraLayer
from .conversion import check_free, read_whole_adapter, renamed
from .mlx_lm import is_mlx_lm, read_mlx_lm
from .tensors import STORED_NAMES, decode, encode

MODEL_CONFIG = "config.json"
_OF_OTHER_FORMATS = {".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".ckpt", ".onnx", ".gguf", ".ot"}
_OF_THE_BASE = {"README.md", ".gitattributes"}  # they speak of the base model
_WITH_CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_QUANTISED = ("quantization_config", "quantization")  # transformers', mlx-lm's


class Stored(NamedTuple):
    """A tensor in a file of weights."""

    file: str
    dtype: str  # by safetensors' name
    shape: tuple[int, ...]
    begin: int  # bytes from the beginning of the file
    end: int


def merge_folders(
    model: str | Path,
    adapter: str | Path,
    out: str | Path,
    rename: Mapping[str, str] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write a model folder with an adapter merged into its weights, as any library opens it.

    Use it after training, for programs that take whole models: transformers, vLLM, mlx-lm, llama.cpp's converter. The
    framework that trained the adapter is not needed. Each sum W + s B A is computed in float32 or wider and rounded
    once to the dtype of W. Modules that were trained whole (`modules_to_save`) replace the model's own.

    Args:
        model: folder with config.json and weights as safetensors, in one file or in several.
        adapter: folder of lora-one, PEFT or mlx-lm. If it has both layouts, mlx-lm's is read.
        out: folder to write; it must not exist, or be empty. Configuration and tokenizer are copied into it.
        rename: old prefix -> new prefix of the adapter's module paths, where the model's files have others, such as
            {"transformer": ""} for the GPT-2 of the Hub. Default: none.
        progress: told how many of the files and of the changed tensors are written, and how many there are.

    Raises:
        CheckpointError: all that is wrong with the folders, or does not fit, at once. Nothing was written.
        ConfigError: a prefix in `rename` that no path has.

    >>> import lora_one, torch
    >>> from transformers import AutoModelForCausalLM
    >>> from lora_one import demo
    >>> from lora_one.checkpoint.merging import merge_folders
    >>> config = lora_one.Config(rank=2, targets=["q_proj"])
    >>> model, _ = lora_one.init(AutoModelForCausalLM.from_pretrained(demo.MODEL), config=config)
    >>> lora_one.save(model, "adapter")
    >>> merge_folders(demo.MODEL, "adapter", "merged")
    >>> type(AutoModelForCausalLM.from_pretrained("merged")).__name__
    'LlamaForCausalLM'
    """
    model, adapter, out = Path(model), Path(adapter), Path(out)
    check_free(out)
    config = _read_config(model)
    stored = {key: tensor for file in _weight_files(model) for key, tensor in _tensors_in(model, file)}
    merged = renamed(read_mlx_lm(adapter) if is_mlx_lm(adapter) else read_whole_adapter(adapter), rename or {})
    problems = _problems(merged, stored, config)
    if problems:
        raise CheckpointError(f"the adapter in {adapter} cannot be merged into {model}", problems)
    with replacing(out) as folder:
        jobs = list(_jobs(model, folder, merged, stored, config))
        for done, job in enumerate(jobs, start=1):
            job()
            progress(done, len(jobs))


def _jobs(
    model: Path, folder: Path, adapter: Adapter, stored: Mapping[str, Stored], config: Mapping[str, Any]
) -> Iterator[Callable[[], object]]:
    """Yield what is to be done, in order: all files are copied, then the tensors that change are written over."""
    for name in [*(file.name for file in _other_files(model)), *sorted({tensor.file for tensor in stored.values()})]:
        yield partial(shutil.copyfile, model / name, folder / name)
    conv1d = _has_conv1d(adapter, stored, config)
    for path, layer in adapter.layers.items():
        yield partial(_add, folder, stored[f"{path}.weight"], layer, conv1d)
    for path, whole in adapter.whole.items():
        yield partial(_write, folder, stored[path], whole.array)


def _add(folder: Path, tensor: Stored, layer: LoraLayer, conv1d: bool) -> None:
    _write(folder, tensor, _read(folder, tensor) + _delta(layer, tensor.shape, conv1d))


def _read_config(model: Path) -> dict[str, Any]:
    try:
        config = read_object(model / MODEL_CONFIG)
    except CheckpointError as error:
        raise CheckpointError(f"{model} is not a model folder", [f"{MODEL_CONFIG}: {error}"]) from error
    for name in _QUANTISED:
        if config.get(name):
            raise CheckpointError(
                f"the weights in {model} are quantised ({name} in {MODEL_CONFIG}): merge into the model that they were "
                "made from, or into a float copy (mlx_lm.convert --dequantize), and quantise the result"
            )
    return config


def _weight_files(model: Path) -> list[str]:
    """Return the names of the files that an index lists, or of all safetensors files without one."""
    indices = sorted(model.glob("*.safetensors.index.json"))
    if not indices:
        names = sorted(file.name for file in model.glob("*.safetensors"))
    else:
        weight_map = read_object(indices[0]).get("weight_map")
        names = sorted(set(weight_map.values())) if isinstance(weight_map, dict) else []
    missing = [name for name in names if not (model / name).is_file()]
    if not names or missing:
        raise CheckpointError(f"{model} must hold its weights as safetensors, got {missing or 'none'}")
    return names


def _tensors_in(model: Path, name: str) -> Iterator[tuple[str, Stored]]:
    try:
        with open(model / name, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for key, entry in header.items():
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            yield key, Stored(name, entry["dtype"], tuple(entry["shape"]), begin, end)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{model / name} cannot be read: {error}") from error


def _other_files(model: Path) -> list[Path]:
    return [
        file
        for file in sorted(model.iterdir())
        if file.is_file() and file.suffix not in _OF_OTHER_FORMATS and file.name not in _OF_THE_BASE
        if not file.name.endswith((".bin.index.json", ".h5.index.json", ".msgpack.index.json"))
    ]


def _problems(adapter: Adapter, stored: Mapping[str, Stored], config: Mapping[str, Any]) -> list[str]:
    problems = []
    if adapter.is_dora:
        problems.append("DoRA's magnitudes give whole rows another length: merge in the framework (lora_one.merge)")
    wanted = {f"{path}.weight": _shapes(layer) for path, layer in adapter.layers.items()}
    wanted |= {path: [tensor.array.shape] for path, tensor in adapter.whole.items()}
    for key, shapes in wanted.items():
        tensor = stored.get(key)
        if tensor is None:
            problems.append(f"{key}: not in the model's files{_remedy(key, stored)}")
        elif tensor.dtype not in STORED_NAMES.values():
            problems.append(f"{key}: must be floating, got {tensor.dtype}")
        elif tensor.shape not in shapes:
            problems.append(f"{key}: must be {' or '.join(map(str, shapes))}, got {tensor.shape}")
    if "lm_head.weight" not in stored and config.get("tie_word_embeddings", True):
        problems += [
            f"{path}: it is tied to the output layer in the model, and only one of them was trained: untie the model "
            "(tie_word_embeddings=False, save_pretrained) and train again, or merge in the framework (lora_one.merge)"
            for path in wanted
            if path in stored and path.endswith((".embed_tokens.weight", ".wte.weight", ".shared.weight"))
        ]
    return problems


def _remedy(key: str, stored: Mapping[str, Stored]) -> str:
    _, dot, end = key.partition(".")
    while dot and "." in end:  # with the layer's number, if it has one
        near = [other for other in stored if f".{other}".endswith(f".{end}")]
        if near:
            return f", which have {shown_names(near, 2)}: rename a prefix"
        first, dot, end = end.partition(".")
        if first.isdigit():
            break
    return "; a new head must be in the model's folder first, and a tied output layer has no weight of its own"


def _shapes(layer: LoraLayer) -> list[tuple[int, ...]]:
    """Return the shapes that the weight of a layer may have: (out, in), or (in, out) in GPT-2's Conv1D."""
    (_, in_features), (out_features, _) = layer.pairs[0].lora_A.shape, layer.pairs[0].lora_B.shape
    if layer.is_switch:
        return [(len(layer.pairs), out_features, in_features)]
    if layer.form.is_embedding:
        return [(in_features, out_features)]
    if layer.form.kernel:
        return [(out_features, in_features // math.prod(layer.form.kernel), *layer.form.kernel)]
    return [(out_features, in_features), (in_features, out_features)]


def _has_conv1d(adapter: Adapter, stored: Mapping[str, Stored], config: Mapping[str, Any]) -> bool:
    """Return whether the weights are (in, out). Where all are square, the model's family says it."""
    of_layers = {path: _shapes(layer) for path, layer in adapter.layers.items()}
    shown = {stored[f"{path}.weight"].shape == shapes[1] for path, shapes in of_layers.items() if len(set(shapes)) > 1}
    return all(shown) if shown else config.get("model_type") in _WITH_CONV1D


def _delta(layer: LoraLayer, shape: tuple[int, ...], conv1d: bool) -> np.ndarray:
    """Return s B A in the shape of the weight."""
    products = np.stack([layer.scaling * (b @ a) for a, b in layer.pairs])  # (experts, out, in)
    if layer.is_switch:
        return products
    delta: np.ndarray = products[0]
    if layer.form.kernel:
        return delta.reshape(shape)
    is_square = shape[0] == shape[1]
    return delta.T if delta.shape != shape or (is_square and (conv1d or layer.form.is_embedding)) else delta


def _read(folder: Path, tensor: Stored) -> np.ndarray:
    with open(folder / tensor.file, "rb") as file:
        file.seek(tensor.begin)
        return decode(file.read(tensor.end - tensor.begin), tensor.dtype, tensor.shape)


def _write(folder: Path, tensor: Stored, array: np.ndarray) -> None:
    with open(folder / tensor.file, "r+b") as file:
        file.seek(tensor.begin)
        file.write(encode(array, tensor.dtype))
