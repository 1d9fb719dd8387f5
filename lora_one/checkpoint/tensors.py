"""safetensors files in NumPy, bfloat16 included, which NumPy does not have."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, deserialize, safe_open

from lora_one.errors import CheckpointError


class Tensor(NamedTuple):
    """An array, and what it is stored as."""

    array: np.ndarray  # float32 or float64, which hold every value of the stored dtype
    dtype: str  # by safetensors' name: F64, F32, F16, BF16


_STORED = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}


def wider(one: str, other: str) -> str:
    """The smallest dtype that holds every value of both."""
    if one == other:
        return one
    return "F64" if "F64" in (one, other) else "F32"


def tensor_names(path: Path) -> list[str]:
    """The names in a file, sorted, without its data.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            return sorted(file.keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def read_tensors(path: Path, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """The tensors of a file: all, or those named.

    Raises:
        CheckpointError: the file cannot be read, or holds tensors that are not floating.
    """
    try:
        stored = deserialize(path.read_bytes())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    tensors, problems = {}, []
    for name, spec in stored:
        if names is not None and name not in names:
            continue
        kind, data = spec["dtype"], spec["data"]
        if kind == "BF16":  # the upper half of a float32
            array = (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
        elif kind in _STORED:
            array = np.frombuffer(data, _STORED[kind])
        else:
            problems.append(f"{name} must be floating, got {kind}")
            continue
        wide = np.float64 if kind == "F64" else np.float32
        tensors[name] = Tensor(array.astype(wide).reshape(spec["shape"]), kind)
    if problems:
        raise CheckpointError(f"{path}: factors must be floating point", problems)
    return tensors


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], framework: str, notes: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Write a file.

    By hand, since safetensors' writer for NumPy takes no bfloat16, and stores a transposed array as it lies in memory,
    without a word. The format: the header's length in 8 bytes, the header as JSON, the data.

    Args:
        framework: what the file says of its origin: "pt", "mlx".
        notes: further entries of its header's metadata.
    """
    header: dict[str, object] = {"__metadata__": {"format": framework, **notes}}
    chunks, end = [], 0
    for name, (array, dtype) in sorted(tensors.items(), key=lambda item: (-_size(item[1].dtype), item[0])):
        chunk = _bytes(array, dtype)
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [end, end + len(chunk)]}
        chunks.append(chunk)
        end += len(chunk)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8, the wide tensors first: all are aligned
    path.write_bytes(b"".join([len(text).to_bytes(8, "little"), text, *chunks]))


def _size(dtype: str) -> int:
    return 2 if dtype == "BF16" else np.dtype(_STORED[dtype]).itemsize


def _bytes(array: np.ndarray, dtype: str) -> bytes:
    if dtype != "BF16":
        return array.astype(_STORED[dtype]).tobytes()  # in C order, however the array lies
    bits = np.ascontiguousarray(array, "<f4").view("<u4")
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)  # to nearest, ties to even
    # Rounding may carry a NaN's payload into infinity: its quiet bit keeps it a NaN.
    upper = np.where(np.isnan(array), (bits >> 16) | 0x40, rounded >> 16)
    return upper.astype("<u2").tobytes()
