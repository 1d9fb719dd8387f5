"""Read and write safetensors files in NumPy, including bfloat16, which NumPy does not have."""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, deserialize, safe_open

from lora_one.errors import CheckpointError

# dtype in NumPy, JAX and MLX -> in safetensors
STORED_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}


class Tensor(NamedTuple):
    """An array, and the dtype that it has in the file."""

    array: np.ndarray  # float32 or float64, which hold every value of the stored dtype
    dtype: str  # by safetensors' name: F64, F32, F16, BF16


_NUMPY_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}


def wider(first: str, second: str) -> str:
    """Return the smallest dtype that holds every value of both."""
    if first == second:
        return first
    return "F64" if "F64" in (first, second) else "F32"


def tensor_names(path: Path) -> list[str]:
    """Return the sorted names of the tensors in a file.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            return sorted(file.keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def read_tensors(path: Path, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """Read the tensors of a file: all of them, or those named.

    Raises:
        CheckpointError: the file cannot be read, or holds tensors that are not floating point.
    """
    try:
        stored = deserialize(path.read_bytes())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    tensors, problems = {}, []
    for name, spec in stored:
        if names is not None and name not in names:
            continue
        dtype = spec["dtype"]
        if dtype in STORED_NAMES.values():
            tensors[name] = Tensor(decode(spec["data"], dtype, spec["shape"]), dtype)
        else:
            problems.append(f"{name} must be floating, got {dtype}")
    if problems:
        raise CheckpointError(f"{path}: factors must be floating point", problems)
    return tensors


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], framework: str, notes: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Write a safetensors file: the header's length in 8 bytes, the header as JSON, the data.

    It does not call safetensors' own writer for NumPy, which has no bfloat16 and silently writes a transposed array in
    the wrong order.

    Args:
        framework: the format that the header's metadata states: "pt" or "mlx".
        notes: further entries of the header's metadata.
    """
    header: dict[str, object] = {"__metadata__": {"format": framework, **notes}}
    chunks, end = [], 0
    for name, (array, dtype) in sorted(tensors.items(), key=lambda item: (-_size(item[1].dtype), item[0])):
        chunk = encode(array, dtype)
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [end, end + len(chunk)]}
        chunks.append(chunk)
        end += len(chunk)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8, wide tensors first, so all are aligned
    path.write_bytes(b"".join([len(text).to_bytes(8, "little"), text, *chunks]))


def _size(dtype: str) -> int:
    return 2 if dtype == "BF16" else np.dtype(_NUMPY_DTYPES[dtype]).itemsize


def decode(data: bytes | bytearray, dtype: str, shape: Sequence[int]) -> np.ndarray:
    """Return the array in the bytes of a tensor, in float32 or wider."""
    if dtype == "BF16":  # the upper half of a float32
        array = (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    else:
        array = np.frombuffer(data, _NUMPY_DTYPES[dtype])
    return array.astype(np.float64 if dtype == "F64" else np.float32).reshape(shape)


def encode(array: np.ndarray, dtype: str) -> bytes:
    """Return the bytes of a tensor, rounded to its dtype: the inverse of `decode`."""
    if dtype != "BF16":
        return array.astype(_NUMPY_DTYPES[dtype]).tobytes()  # in C order, also for a transposed array
    bits = np.ascontiguousarray(array, "<f4").view("<u4")
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)  # to nearest, ties to even
    # Rounding may turn a NaN into infinity; its quiet bit keeps it a NaN.
    upper = np.where(np.isnan(array), (bits >> 16) | 0x40, rounded >> 16)
    return upper.astype("<u2").tobytes()
