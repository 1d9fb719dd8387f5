"""Convert an adapter folder from one library's layout to another's, without a model and without a framework."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from lora_one.errors import CheckpointError, ConfigError

from .adapter import Adapter
from .diffusers import check_component, write_diffusers
from .folder import METADATA, is_file, replacing_adapter
from .llama_cpp import read_base, write_gguf
from .mlx_lm import is_mlx_lm, read_mlx_lm, write_mlx_lm
from .peft import check_factors, own_shapes, read_adapter, read_folder, write_peft
from .plain_lora import setting_problems, tensor_reason
from .whole import PREFIX

LAYOUTS = ("peft", "mlx", "flax", "diffusers", "gguf")
_TIED = (
    "which mlx-lm adds to a tied output layer too and PEFT does not: load it onto the model with lora_one.load, and "
    "save it there"
)
_NO_EMBEDDING = {
    "mlx": _TIED,
    "gguf": "which gguf adapters are not written with here",
    "diffusers": "which diffusers does not read",
}
# mlx-lm names an embedding's factors like a linear layer's. Only the order of axes differs, so the name must tell.
_EMBEDDINGS = {"embed_tokens", "embed_in", "embedding", "embeddings", "tok_embeddings", "word_embeddings", "wte", "wpe"}


def convert(
    src: str | Path,
    dst: str | Path,
    to: str,
    rename: Mapping[str, str] | None = None,
    base: str | Path | None = None,
    component: str | None = None,
) -> None:
    """Write a copy of an adapter folder in the layout that another library opens.

    Use it to train an adapter with one library and run it with another, without the model at hand. Every tensor keeps
    its values and its dtype, with these exceptions: mlx-lm, diffusers and llama.cpp have one scale for all layers, so a
    layer with another gets the ratio multiplied into its lora_b, in float32 or wider. gguf is float32 throughout.

    Args:
        src: folder that PEFT, mlx-lm or lora-one wrote. If it has both layouts, mlx-lm's is read, since mlx-lm may
            have continued to train in it.
        dst: folder to write; it must not exist, or be empty. With "gguf" it is a file, which must not exist.
        to: the layout to write. "peft": for PEFT, vLLM and `lora_one.load` on PyTorch. "flax": the same layout, for
            `lora_one.load` on JAX. "mlx": mlx-lm's layout, and PEFT's beside it. "diffusers": for its pipelines.
            "gguf": one file, for llama.cpp.
        rename: old prefix -> new prefix of module paths, where the two libraries name the base model's modules
            differently, such as {"transformer": "model"} for GPT-2 from transformers to mlx-lm. Default: none.
        base: folder with the base model's config.json, for "gguf" alone. Default: the one that the adapter names.
        component: the pipeline's model that the adapter is for, such as "unet" or "transformer"; "diffusers" needs it.

    Raises:
        ConfigError: an invalid `to`, `rename`, `base` or `component`.
        BackendError: "gguf" without the package gguf.
        CheckpointError: all that is wrong with the source, or that the destination cannot hold, at once. Nothing was
            written.

    >>> import lora_one, pathlib, torch
    >>> base = torch.nn.Sequential(torch.nn.Linear(6, 4))
    >>> batches = [(torch.randn(8, 6), torch.randn(8, 4))]
    >>> mean_square = lambda model, batch: (model(batch[0]) - batch[1]).square().mean()
    >>> model, report = lora_one.init(base, batches, mean_square, lora_one.Config(rank=2, targets=["0"]))
    >>> lora_one.save(model, "adapter", report)
    >>> lora_one.convert("adapter", "for-mlx-lm", to="mlx")
    >>> sorted(file.name for file in pathlib.Path("for-mlx-lm").iterdir())
    ['adapter_config.json', 'adapter_model.safetensors', 'adapters.safetensors', 'lora_one.json']
    """
    src, dst = Path(src), Path(dst)
    _check_layout(to, base, component)
    check_free(dst, to == "gguf")
    adapter = renamed(_read_mlx_lm(src) if is_mlx_lm(src) else read_whole_adapter(src), rename or {})
    _check_forms(src, adapter, to)
    if to == "gguf":
        write_gguf(dst, adapter, read_base(src, None if base is None else Path(base)))
        return
    metadata = _metadata(src)
    with replacing_adapter(dst) as folder:
        if to == "mlx":
            write_mlx_lm(folder, adapter, _blocks(adapter))
        elif component is not None:
            write_diffusers(folder, adapter, component)
        else:
            write_peft(folder, adapter)
        if metadata is not None:
            (folder / METADATA).write_bytes(metadata)


def _check_layout(to: str, base: str | Path | None, component: str | None) -> None:
    if to not in LAYOUTS:
        raise ConfigError(f"to must be one of {', '.join(LAYOUTS)}, got {to!r}")
    for name, value, layout in (("base", base, "gguf"), ("component", component, "diffusers")):
        if value is not None and to != layout:
            raise ConfigError(
                f"{name} is for to={layout!r} alone, got {name}={str(value)!r} with to={to!r}: leave it out"
            )
    if to == "diffusers":
        check_component(component)


def check_free(dst: Path, is_for_a_file: bool = False) -> None:
    """Raise CheckpointError for a destination that exists, unless it is an empty folder."""
    try:
        free = not dst.exists() or (not is_for_a_file and dst.is_dir() and not any(dst.iterdir()))
    except OSError as error:
        raise CheckpointError(f"the folder {dst} cannot be written: {error.strerror or error}") from error
    if not free:
        what = " yet: gguf is one file, such as adapter.gguf, and" if is_for_a_file else ", or be an empty folder:"
        raise CheckpointError(f"{dst} must not exist{what} nothing is overwritten")


def _metadata(src: Path) -> bytes | None:
    """Read the source's `lora_one.json`, which `lora-one inspect` needs; None if there is none."""
    file = src / METADATA
    try:
        return file.read_bytes() if is_file(file) else None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error


def read_whole_adapter(src: Path) -> Adapter:
    """Read a folder in PEFT's layout. Raise CheckpointError, with all reasons, if an `Adapter` cannot hold it all."""
    folder = read_folder(src)
    problems = setting_problems(folder.config, allowed=("modules_to_save",))
    whole = folder.whole
    unknown = [name for name in sorted(folder.others) if name.removeprefix(PREFIX) not in whole]
    problems += [f"{name}: {tensor_reason(name)}" for name in unknown]
    if not folder.config.get("target_parameters"):  # whose factors are those of many experts in one
        problems += check_factors(folder, own_shapes(folder), folder.forms)
    if problems:
        _refuse(src, problems)
    return read_adapter(folder)


def _read_mlx_lm(src: Path) -> Adapter:
    adapter = read_mlx_lm(src)
    problems = []
    for name, layer in adapter.layers.items():
        if layer.is_switch:
            problems.append(f"{name}: a stack of {len(layer.pairs)} experts, which only mlx-lm has a layout for")
        elif name.rpartition(".")[2] in _EMBEDDINGS:
            problems.append(f"{name}: LoRA on an embedding, {_TIED}")
    if problems:
        _refuse(src, problems)
    return adapter


def _refuse(src: Path, problems: list[str]) -> NoReturn:
    raise CheckpointError(f"the adapter in {src} is more than plain LoRA on linear layers", problems)


def _check_forms(src: Path, adapter: Adapter, to: str) -> None:
    """Raise CheckpointError for layers that the other library computes in another way, or not at all."""
    if to in ("mlx", "diffusers", "gguf") and adapter.modules_to_save:
        _refuse(src, setting_problems({"modules_to_save": list(adapter.modules_to_save)}))
    problems = []
    for name, layer in adapter.layers.items():
        if layer.form.is_embedding and to in _NO_EMBEDDING:
            problems.append(f"{name}: LoRA on an embedding, {_NO_EMBEDDING[to]}")
        elif layer.form.kernel and to in ("mlx", "gguf"):
            problems.append(f"{name}: LoRA on a convolution, which {to} adapters have no place for")
    if problems:
        raise CheckpointError(f"the adapter in {src} cannot be written for {to}", problems)


def renamed(adapter: Adapter, prefixes: Mapping[str, str]) -> Adapter:
    """Return an adapter with other prefixes of module paths: old -> new. Raise ConfigError for one of no path."""
    used = set()

    def new_name(name: str) -> str:
        for old, new in prefixes.items():
            if name == old or name.startswith(f"{old}."):
                used.add(old)
                return f"{new}{name.removeprefix(old)}".removeprefix(".")
        return name

    layers = {new_name(name): layer for name, layer in adapter.layers.items()}
    whole = {new_name(name): tensor for name, tensor in adapter.whole.items()}
    unused = sorted(prefixes.keys() - used)
    if unused:
        raise ConfigError(f"rename must name prefixes of module paths, got {unused}; paths are as {next(iter(layers))}")
    if len(layers) != len(adapter.layers):
        raise ConfigError(f"rename must keep module paths apart, got {dict(prefixes)}: two would have one name")
    modules = tuple(map(new_name, adapter.modules_to_save))
    return adapter._replace(layers=layers, modules_to_save=modules, whole=whole)


def _blocks(adapter: Adapter) -> int:
    """Return the number of blocks by the numbers in the layers' paths.

    mlx-lm's configuration must hold a number, but mlx-lm finds the layers by their full paths.
    """
    number = re.compile(r"[0-9]{1,6}")
    indices = [next((int(part) for part in name.split(".") if number.fullmatch(part)), -1) for name in adapter.layers]
    return max(indices) + 1
