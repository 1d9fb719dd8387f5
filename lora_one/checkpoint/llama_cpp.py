"""Write an adapter as a gguf file, which llama.cpp opens beside the base model's gguf file.

llama.cpp computes W x + alpha / r B A x, with one alpha for all layers and each layer's own rank r. It calls layers by
names of its own. In models of the Llama family it rotates the rows 2i and 2i + 1 of a head together, where transformers
rotates i and i + d / 2: the rows of q_proj and k_proj, and so those of their lora_B, are in another order.
"""

import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lora_one.checks import shown
from lora_one.errors import BackendError, CheckpointError
from lora_one.files.atomic import replacing_file
from lora_one.files.json_files import read_object

from .adapter import Adapter, LoraLayer
from .folder import CONFIG, is_file
from .scales import plain_alpha

# "architectures" in config.json -> member of gguf.MODEL_ARCH
_ARCHITECTURES = {
    "LlamaForCausalLM": "LLAMA",
    "MistralForCausalLM": "LLAMA",
    "Qwen2ForCausalLM": "QWEN2",
    "Qwen3ForCausalLM": "QWEN3",
    "GemmaForCausalLM": "GEMMA",
    "Gemma2ForCausalLM": "GEMMA2",
    "Gemma3ForCausalLM": "GEMMA3",
}
_ROTATES_NEIGHBOURS = {"LLAMA"}
_BASE_CONFIG = "config.json"
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_OPTIONAL_SIZES = ("num_key_value_heads", "head_dim")
_MOST_BLOCKS = 1000  # the paths below have three digits at most
_PATH = re.compile(
    r"model\.layers\.(?P<block>0|[1-9][0-9]{0,2})\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)|lm_head"
)


class BaseModel(NamedTuple):
    """What the conversion must know of the base model, from its config.json."""

    architecture: str  # member of gguf.MODEL_ARCH
    blocks: int
    head_dim: int
    is_tied: bool  # the output layer is the embedding, and gguf has no tensor for it
    shapes: dict[str, tuple[int, int]]  # last part of a layer's path -> (out, in)


def read_base(src: Path, base: Path | None) -> BaseModel:
    """Read the base model's config.json, in the folder `base` or in the one that the adapter in `src` names.

    Raises:
        CheckpointError: there is no such file, or it describes a model that cannot be converted.
    """
    named = read_object(src / CONFIG).get("base_model_name_or_path") if base is None else str(base)
    if not isinstance(named, str) or not named or not is_file(Path(named) / _BASE_CONFIG):
        origin = f"the adapter in {src} names" if base is None else "base is"
        raise CheckpointError(
            f"gguf needs the base model's {_BASE_CONFIG}, for the numbers of heads and blocks; {origin} {shown(named)},"
            " which is no folder here that has one. Give the folder: --base FOLDER, or base=FOLDER in Python"
        )
    return _described(Path(named) / _BASE_CONFIG)


def _described(file: Path) -> BaseModel:
    config = read_object(file)
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if not isinstance(name, str) or name not in _ARCHITECTURES:
        raise CheckpointError(
            f'{file}: "architectures" must begin with one of {", ".join(_ARCHITECTURES)}, got {shown(names)}. '
            "For others merge the adapter with lora_one.merge, and convert the whole model with llama.cpp's converter"
        )
    sizes: dict[str, Any] = {key: config.get(key) for key in _SIZES}
    sizes |= {key: config[key] for key in _OPTIONAL_SIZES if config.get(key) is not None}
    wrong = [f'"{key}" must be an integer from 1 on, got {shown(x)}' for key, x in sizes.items() if not _is_size(x)]
    if wrong:
        raise CheckpointError(f"{file} cannot be used", wrong)
    hidden, inner, blocks, heads, vocabulary = (sizes[key] for key in _SIZES)
    key_heads, head_dim = sizes.get("num_key_value_heads", heads), sizes.get("head_dim", hidden // heads)
    architecture = _ARCHITECTURES[name]
    if architecture in _ROTATES_NEIGHBOURS and head_dim % 2:
        raise CheckpointError(f"{file}: the rows of a head must be an even number, got {head_dim}")
    shapes = {
        "q_proj": (heads * head_dim, hidden),
        "k_proj": (key_heads * head_dim, hidden),
        "v_proj": (key_heads * head_dim, hidden),
        "o_proj": (hidden, heads * head_dim),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
        "lm_head": (vocabulary, hidden),
    }
    is_tied = architecture.startswith("GEMMA") or bool(config.get("tie_word_embeddings"))
    return BaseModel(architecture, blocks, head_dim, is_tied, shapes)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def write_gguf(file: Path, adapter: Adapter, base: BaseModel) -> None:
    """Write an adapter as a gguf file, in float32.

    Raises:
        BackendError: the package gguf is not installed.
        CheckpointError: the adapter has layers that are not the base model's, or that gguf has no place for.
    """
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise BackendError("a gguf file needs the package 'gguf': pip install 'lora-one[gguf]'") from error
    problems = [problem for path, layer in adapter.layers.items() for problem in _problems(path, layer, base)]
    if problems:
        raise CheckpointError("the adapter cannot be written for llama.cpp", problems)
    architecture = gguf.MODEL_ARCH[base.architecture]
    names = gguf.get_tensor_name_map(architecture, min(base.blocks, _MOST_BLOCKS))
    alpha = _common_alpha(adapter)
    with replacing_file(file) as path:
        writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        for name, layer in adapter.layers.items():
            a, b = _factors(name, layer, alpha, base)
            writer.add_tensor(f"{names[name]}.weight.lora_a", a)
            writer.add_tensor(f"{names[name]}.weight.lora_b", b)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _problems(path: str, layer: LoraLayer, base: BaseModel) -> list[str]:
    match = _PATH.fullmatch(path)
    if match is None:
        return [f"{path}: gguf adapters are for linear layers such as model.layers.0.mlp.up_proj; rename may help"]
    if match["block"] and int(match["block"]) >= base.blocks:
        return [f"{path}: the base model has {base.blocks} blocks, counted from 0"]
    if path == "lm_head" and base.is_tied:
        return ["lm_head: the base model's is tied to its embedding, so its gguf file has no output layer"]
    if layer.magnitude is not None:
        return [f"{path}: DoRA, whose magnitudes llama.cpp does not have; merge it, and convert the whole model"]
    pair, expected = layer.pairs[0], base.shapes[path.rpartition(".")[2]]
    got = (int(pair.lora_B.shape[0]), int(pair.lora_A.shape[1]))  # (out, in)
    return [] if got == expected else [f"{path}: must be {expected} by the base model's config.json, got {got}"]


def _common_alpha(adapter: Adapter) -> float:
    """Return the alpha of most layers. It is never 0, since llama.cpp takes 0 to mean a scale of 1."""
    alphas = Counter(plain_alpha(layer.scaling, layer.rank) for layer in adapter.layers.values() if layer.scaling)
    return alphas.most_common(1)[0][0] if alphas else 1.0


def _factors(path: str, layer: LoraLayer, alpha: float, base: BaseModel) -> tuple[Any, Any]:
    """Return the layer's factors as llama.cpp expects them: the scale alpha / r, and rows in its order."""
    a, b = layer.with_scale(alpha / layer.rank, layer.rank).pairs[0]  # (r, in), (out, r)
    if base.architecture in _ROTATES_NEIGHBOURS and path.endswith((".q_proj", ".k_proj")):
        halves = b.reshape(-1, 2, base.head_dim // 2, layer.rank)  # (heads, 2, d / 2, r)
        b = halves.swapaxes(1, 2).reshape(b.shape)  # row i of a half becomes row 2i or 2i + 1
    return a.astype(np.float32), b.astype(np.float32)
