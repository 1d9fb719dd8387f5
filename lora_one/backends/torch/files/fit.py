"""Whether an adapter folder belongs to a PyTorch model: what can be said before it is attached, and after."""

import peft
import torch
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_one.backends.torch.attachment.attach import find_sites
from lora_one.checkpoint.folder import WEIGHTS
from lora_one.checkpoint.peft import PEFT_BASE_KEY, PEFT_KEY, AdapterFolder, check_factors, unknown_tensor
from lora_one.checkpoint.plain_lora import settings_beyond
from lora_one.errors import ModelError

from .embeddings import base_path, base_vocabulary, embedding_paths, is_wrapped
from .state import PREFIX, adapter_state

_TOKENS = ".token_adapter."


def problems_before(
    folder: AdapterFolder, config: peft.LoraConfig, base: nn.Module, held: peft.LoraConfig | None
) -> list[str]:
    """What keeps an adapter from being attached to a base model.

    Args:
        held: the settings of the adapter that the model has, if the folder is for that one.
    """
    tensors = (*base.named_parameters(remove_duplicate=False), *base.named_buffers(remove_duplicate=False))
    shapes = {base_path(name): tuple(tensor.shape) for name, tensor in tensors if ".lora_" not in name}
    problems = []
    if not config.layer_replication:  # its paths are of layers that are still to come
        problems += check_factors(folder, _linear_layers(base))
    embeddings = embedding_paths(base)
    for key, shape in folder.others.items():
        path = base_path(key)
        if not _expected(key, config, embeddings, folder):
            problems.append(unknown_tensor(key))
        elif shapes.get(path, shape) != shape:
            more = shape[0] - shapes[path][0] if len(shape) == len(shapes[path]) else 0
            problems.append(f"{key}: must be {shapes[path]}, got {shape}{_remedy(path, embeddings, shape, more)}")
    problems += _tokens_out_of_range(config, base, shapes)
    if not problems:
        problems += _changed_base_weights(folder, base)
    if held is not None:
        problems += _other_settings(config, held)
    return problems


def problems_after(folder: AdapterFolder, config: peft.LoraConfig, model: peft.PeftModel, adapter: str) -> list[str]:
    """What the model has and the folder has not, or has in another shape, and what only the folder has."""
    try:
        sites = find_sites(model)
    except ModelError as error:  # adapters that lora-one does not start
        return str(error).splitlines()
    problems = []
    for site in sites:
        name = site.layer.name
        if name not in folder.lora_A:
            problems.append(f"{name}: the model has LoRA here, the file has none")
        elif site.layer.rank != folder.lora_A[name][0]:
            problems.append(f"{name}: the model has rank {site.layer.rank}, the file {folder.lora_A[name][0]}")
    # PEFT passes over what only one side has: a trained head would be lost without a word.
    shapes = {key: tuple(tensor.shape) for key, tensor in adapter_state(model, adapter).items()}
    kept = {key for key in shapes if ".lora_" not in key}
    problems += [f"{key}: the model keeps it whole, the file has none" for key in sorted(kept - set(folder.others))]
    embeddings = embedding_paths(model.get_base_model())
    held = {PEFT_KEY.format(path=path, side=side) for path in folder.lora_A for side in "AB"}
    for key, shape in folder.others.items():
        if key in shapes and shapes[key] != shape:
            problems.append(f"{key}: must be {shapes[key]}, got {shape}")
        elif key not in shapes and not (_is_base(key, embeddings, folder) and _is_beside(key, config)):
            problems.append(f"{key}: the file has it, the model has no such module to save")
    if not problems:  # layers that were replicated are seen here for the first time
        problems += [f"{key}: the model has no such linear layer" for key in sorted(held - shapes.keys())]
    return problems


def _expected(key: str, config: peft.LoraConfig, embeddings: list[str], folder: AdapterFolder) -> bool:
    """Whether the configuration speaks of a tensor that is no LoRA factor."""
    if ".lora_" in key:
        return False
    return (
        _is_kept(key, config)
        or (config.bias != "none" and key.endswith(".bias"))
        or (bool(config.trainable_token_indices) and _TOKENS in key)
        or _is_base(key, embeddings, folder)
    )


def _is_kept(key: str, config: peft.LoraConfig) -> bool:
    """Whether a tensor is of one of `modules_to_save`, which are ends of paths: PEFT takes "norm" for "layer_norm"."""
    *path, _ = key.split(".")
    modules = [".".join(path[: i + 1]) for i in range(len(path))]
    return any(module.endswith(name) for module in modules for name in config.modules_to_save or ())


def _is_beside(key: str, config: peft.LoraConfig) -> bool:
    """Whether a weight of the base model's is no more than that: a module that is trained whole is the adapter's."""
    return is_wrapped(key) or not _is_kept(key, config)


def _is_base(key: str, embeddings: list[str], folder: AdapterFolder) -> bool:
    """Whether a tensor is one of the base model's that PEFT keeps beside the adapter."""
    return _of_embedding(key, embeddings) or _is_base_copy(key, folder)


def _of_embedding(key: str, embeddings: list[str]) -> bool:
    return key.startswith(PREFIX) and base_path(key).rpartition(".")[0] in embeddings


def _is_base_copy(key: str, folder: AdapterFolder) -> bool:
    return any(key == PEFT_BASE_KEY.format(path=layer) for layer in folder.lora_A)


def _remedy(path: str, embeddings: list[str], shape: tuple[int, ...], more: int) -> str:
    if path.rpartition(".")[0] not in embeddings or more == 0:
        return ""
    return f"; the adapter is for {shape[0]} tokens: call model.resize_token_embeddings({shape[0]}) before load"


def _tokens_out_of_range(config: peft.LoraConfig, base: nn.Module, shapes: dict[str, tuple[int, ...]]) -> list[str]:
    chosen = config.trainable_token_indices or {}
    if not isinstance(chosen, dict):
        chosen = dict.fromkeys(embedding_paths(base)[:1], chosen)
    problems = []
    for name, tokens in chosen.items():
        rows = [shape[0] for path, shape in shapes.items() if f".{path}".endswith(f".{name}.weight")]
        if rows and max(tokens, default=0) >= rows[0]:
            problems.append(
                f"{name}: token {max(tokens)} was trained, the model has {rows[0]}: call "
                "model.resize_token_embeddings with the number of tokens that the adapter is for, before load"
            )
    return problems


def _changed_base_weights(folder: AdapterFolder, base: nn.Module) -> list[str]:
    """PEFT saves a copy of the base weight with LoRA on an output layer: it must be the model's, but for new tokens."""
    copies = [key for key in folder.others if _is_base_copy(key, folder)]
    if not copies:
        return []
    weights = {base_path(key): tensor for key, tensor in base.state_dict().items()}
    known = base_vocabulary(base) if isinstance(base, PreTrainedModel) else None
    embeddings = embedding_paths(base)
    problems = []
    with safe_open(folder.path / WEIGHTS, framework="pt") as file:
        for key in copies:
            weight = weights[base_path(key)]
            rows = known if _of_embedding(key, embeddings) else None
            if not torch.equal(file.get_tensor(key).to(weight)[:rows], weight[:rows]):
                problems.append(unknown_tensor(key))
    return problems


def _other_settings(config: peft.LoraConfig, held: peft.LoraConfig) -> list[str]:
    """An adapter that is there computes as it does: scales are set, the rest must be the same."""
    theirs, ours = (settings_beyond(c.to_dict()) for c in (config, held))
    differing = {name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name)}
    return [
        f"{name}: the folder has {theirs.get(name)!r}, the model's adapter {ours.get(name)!r}"
        for name in sorted(differing - {"modules_to_save"})  # told by the tensors' names
    ]


def _linear_layers(base: nn.Module) -> dict[str, tuple[int, int]]:
    """name -> (out, in), names as in the base model."""
    shapes = {}
    for name, module in base.named_modules():
        if isinstance(module, (nn.Linear, LoraLayer)):
            shapes[name] = (int(module.out_features), int(module.in_features))
        elif isinstance(module, Conv1D):
            shapes[name] = (module.weight.shape[1], module.weight.shape[0])
    return shapes
