"""Adapter folders from one library's layout into another's, without a model and without a framework."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from lora_one.errors import CheckpointError, ConfigError

from .adapter import Adapter
from .layouts import write_mlx_lm, write_peft
from .mlx_lm import is_mlx_lm, read_mlx_lm
from .peft import METADATA, check_folder, is_file, own_shapes, read_adapter, read_folder, replacing_adapter
from .plain_lora import setting_problems, tensor_reason

LAYOUTS = ("peft", "mlx", "flax")
# mlx-lm names an embedding's factors as a linear layer's, and only their order of axes differs: the name has to tell.
_EMBEDDINGS = {"embed_tokens", "embed_in", "embedding", "embeddings", "tok_embeddings", "word_embeddings", "wte", "wpe"}


def convert(src: str | Path, dst: str | Path, to: str, rename: Mapping[str, str] | None = None) -> None:
    """Write an adapter folder again, in the layout that another library opens.

    Every tensor of the source keeps its values and its dtype; only where mlx-lm's one scale for all layers makes a
    layer's own ratio go into lora_b is that lora_b written in float32 or wider.

    Args:
        src: a folder that PEFT, mlx-lm or lora-one wrote. Where it has both layouts, mlx-lm's is read, which mlx-lm
            may have trained on in.
        dst: made; must not exist, or be empty.
        to: "peft": PEFT, vLLM and `lora_one.load` on PyTorch. "flax": the same layout, which `lora_one.load` on JAX
            opens. "mlx": mlx-lm's layout, and PEFT's beside it.
        rename: for base models whose module paths differ: old prefix -> new prefix, as {"transformer": "model"} for
            GPT-2 from transformers to mlx-lm.

    Raises:
        ConfigError: `to` or `rename` cannot be.
        CheckpointError: all that is wrong with the source, or that the destination cannot hold, at once. Nothing was
            written.
    """
    src, dst = Path(src), Path(dst)
    if to not in LAYOUTS:
        raise ConfigError(f"to must be one of {', '.join(LAYOUTS)}, got {to!r}")
    _check_free(dst)
    adapter = _renamed(_read_mlx_lm(src) if is_mlx_lm(src) else _read_peft(src), rename or {})
    metadata = _metadata(src)
    with replacing_adapter(dst) as folder:
        if to == "mlx":
            write_mlx_lm(folder, adapter, _blocks(adapter))
        else:
            write_peft(folder, adapter)
        if metadata is not None:
            (folder / METADATA).write_bytes(metadata)


def _check_free(dst: Path) -> None:
    try:
        free = not dst.exists() or (dst.is_dir() and not any(dst.iterdir()))
    except OSError as error:
        raise CheckpointError(f"the folder {dst} cannot be written: {error.strerror or error}") from error
    if not free:
        raise CheckpointError(f"{dst} must not exist, or be an empty folder: convert overwrites nothing")


def _metadata(src: Path) -> bytes | None:
    """The report of the start: `lora-one inspect` reads it."""
    file = src / METADATA
    try:
        return file.read_bytes() if is_file(file) else None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error


def _read_peft(src: Path) -> Adapter:
    folder = read_folder(src)
    problems = setting_problems(folder.config)
    problems += [f"{name}: {tensor_reason(name)}" for name in sorted(folder.others)]
    problems += check_folder(replace(folder, others={}), own_shapes(folder))
    if problems:
        raise CheckpointError(f"the adapter in {src} is more than plain LoRA on linear layers", problems)
    return read_adapter(folder)


def _read_mlx_lm(src: Path) -> Adapter:
    adapter = read_mlx_lm(src)
    problems = []
    for name, layer in adapter.layers.items():
        if layer.is_switch:
            problems.append(f"{name}: a stack of {len(layer.pairs)} experts, which only mlx-lm has a layout for")
        elif name.rpartition(".")[2] in _EMBEDDINGS:
            problems.append(f"{name}: LoRA on an embedding: its factors are looked up, not multiplied")
    if problems:
        raise CheckpointError(f"the adapter in {src} is more than plain LoRA on linear layers", problems)
    return adapter


def _renamed(adapter: Adapter, prefixes: Mapping[str, str]) -> Adapter:
    layers, used = {}, set()
    for name, layer in adapter.layers.items():
        for old, new in prefixes.items():
            if name == old or name.startswith(f"{old}."):
                used.add(old)
                name = f"{new}{name.removeprefix(old)}".removeprefix(".")
                break
        layers[name] = layer
    unused = sorted(prefixes.keys() - used)
    if unused:
        raise ConfigError(f"rename must name prefixes of module paths, got {unused}; paths are as {next(iter(layers))}")
    if len(layers) != len(adapter.layers):
        raise ConfigError(f"rename must keep module paths apart, got {dict(prefixes)}: two would have one name")
    return adapter._replace(layers=layers)


def _blocks(adapter: Adapter) -> int:
    """How many blocks the adapter's paths tell of. mlx-lm wants a number, and goes by the full paths all the same."""
    numbers = re.compile(r"[0-9]{1,6}")
    indices = [next((int(x) for x in name.split(".") if numbers.fullmatch(x)), -1) for name in adapter.layers]
    return max(indices) + 1
