"""Checks that an adapter folder belongs to a PyTorch model, before the adapter is attached and after."""

from collections.abc import Mapping
from dataclasses import replace

import peft
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_one.backends.targets import matches
from lora_one.backends.torch.attachment.attach import find_sites
from lora_one.backends.torch.attachment.experts import layer_path
from lora_one.backends.torch.attachment.kinds import CONVOLUTIONS, features_of
from lora_one.backends.torch.attachment.sharding import gathered, shape_of
from lora_one.checkpoint.adapter import Form
from lora_one.checkpoint.folder import WEIGHTS
from lora_one.checkpoint.peft import PEFT_BASE_KEY, AdapterFolder, Shape, check_factors, peft_key, unknown_tensor
from lora_one.checkpoint.plain_lora import settings_beyond
from lora_one.errors import ModelError

from .embeddings import base_path, base_vocabulary, embedding_paths, is_wrapped
from .state import PREFIX, adapter_state, lora_layers

_TOKENS = ".token_adapter."


def problems_before(
    folder: AdapterFolder, config: peft.LoraConfig, base: nn.Module, held: peft.LoraConfig | None
) -> list[str]:
    """Return what keeps an adapter from being attached to a base model.

    Args:
        held: the settings of the adapter that the model has, if the folder's factors are to replace its factors.
    """
    tensors = (*base.named_parameters(remove_duplicate=False), *base.named_buffers(remove_duplicate=False))
    shapes = {base_path(name): shape_of(tensor) for name, tensor in tensors if ".lora_" not in name}
    problems = []
    if not config.layer_replication:  # its paths belong to layers that do not exist yet
        problems += check_factors(_without_experts(folder, config, shapes), _linear_layers(base), _forms(base))
    embeddings = embedding_paths(base)
    for key, shape in folder.others.items():
        path = base_path(key)
        if not _expected(key, config, embeddings, folder):
            problems.append(unknown_tensor(key))
        elif shapes.get(path, shape) != shape:
            problems.append(
                f"{key}: must be {shapes[path]}, got {shape}{_remedy(path, embeddings, shape, shapes[path])}"
            )
    problems += _tokens_out_of_range(config, base, shapes)
    if not problems:
        problems += _changed_base_weights(folder, base)
    if held is not None:
        problems += _other_settings(config, held)
    return problems


def problems_after(folder: AdapterFolder, config: peft.LoraConfig, model: peft.PeftModel, adapter: str) -> list[str]:
    """Return what only the model or only the folder has, and what they have in different shapes."""
    try:
        sites = find_sites(model)
    except ModelError as error:  # adapters that lora-one does not start
        return str(error).splitlines()
    problems = []
    for site in sites:
        name = site.layer.name
        if site.expert is not None:  # below, all of a parameter at once
            continue
        if name not in folder.lora_A:
            problems.append(f"{name}: the model has LoRA here, the file has none")
        elif site.layer.rank != folder.lora_A[name][0]:
            problems.append(f"{name}: the model has rank {site.layer.rank}, the file {folder.lora_A[name][0]}")
    # PEFT ignores what only one side has, so that a trained head would be lost without a message.
    shapes = {key: shape_of(tensor) for key, tensor in adapter_state(model, adapter).items()}
    for path, module in lora_layers(model, adapter):
        for side, in_file in (("A", folder.lora_A), ("B", folder.lora_B)) if isinstance(module, ParamWrapper) else ():
            if (expected := shapes[peft_key(path, side)]) != in_file.get(path):
                name, got = layer_path(path, module), in_file.get(path, "none")
                problems.append(f"{name}: lora_{side} of its experts must be {expected}, got {got}")
    kept = {key for key in shapes if ".lora_" not in key}
    problems += [f"{key}: the model keeps it whole, the file has none" for key in sorted(kept - set(folder.others))]
    embeddings = embedding_paths(model.get_base_model())
    held = {folder.key(path, side) for path in folder.lora_A for side in "AB"}
    for key, shape in folder.others.items():
        if key in shapes and shapes[key] != shape:
            problems.append(f"{key}: must be {shapes[key]}, got {shape}")
        elif key not in shapes and not (_is_base(key, embeddings, folder) and _is_beside(key, config)):
            problems.append(f"{key}: the file has it, the model has no such module to save")
    if not problems:  # replicated layers exist only now
        problems += [f"{key}: the model has no such linear layer" for key in sorted(held - shapes.keys())]
    return problems


def _expected(key: str, config: peft.LoraConfig, embeddings: list[str], folder: AdapterFolder) -> bool:
    """Return whether the configuration explains a tensor that is not a LoRA factor."""
    if ".lora_" in key:
        return False
    return (
        _is_kept(key, config)
        or (config.bias != "none" and key.endswith(".bias"))
        or (bool(config.trainable_token_indices) and _TOKENS in key)
        or _is_base(key, embeddings, folder)
    )


def _is_kept(key: str, config: peft.LoraConfig) -> bool:
    """Return whether a tensor belongs to one of `modules_to_save`. PEFT lets "norm" match the end of "layer_norm"."""
    *path, _ = key.split(".")
    modules = [".".join(path[: i + 1]) for i in range(len(path))]
    return any(module.endswith(name) for module in modules for name in config.modules_to_save or ())


def _is_beside(key: str, config: peft.LoraConfig) -> bool:
    """Return whether a base weight lies beside the adapter only: a module that is trained as a whole is part of it."""
    return is_wrapped(key) or not _is_kept(key, config)


def _is_base(key: str, embeddings: list[str], folder: AdapterFolder) -> bool:
    """Return whether a tensor belongs to the base model, and PEFT keeps it beside the adapter."""
    return _is_embedding(key, embeddings) or _is_base_copy(key, folder)


def _is_embedding(key: str, embeddings: list[str]) -> bool:
    return key.startswith(PREFIX) and base_path(key).rpartition(".")[0] in embeddings


def _is_base_copy(key: str, folder: AdapterFolder) -> bool:
    return any(key == PEFT_BASE_KEY.format(path=layer) for layer in folder.lora_A)


def _remedy(path: str, embeddings: list[str], shape: tuple[int, ...], expected: tuple[int, ...]) -> str:
    if path.rpartition(".")[0] not in embeddings or len(shape) != len(expected) or shape[0] == expected[0]:
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
    """Compare the copies of base weights that PEFT saves with LoRA on an output layer, except rows of new tokens."""
    copies = [key for key in folder.others if _is_base_copy(key, folder)]
    if not copies:
        return []
    weights = {base_path(key): tensor for key, tensor in base.state_dict().items()}
    vocabulary = base_vocabulary(base) if isinstance(base, PreTrainedModel) else None
    embeddings = embedding_paths(base)
    problems = []
    with safe_open(folder.path / WEIGHTS, framework="pt") as file:
        for key in copies:
            weight = gathered(weights[base_path(key)])
            rows = vocabulary if _is_embedding(key, embeddings) else None
            if not torch.equal(file.get_tensor(key).to(weight)[:rows], weight[:rows]):
                problems.append(unknown_tensor(key))
    return problems


def _other_settings(config: peft.LoraConfig, held: peft.LoraConfig) -> list[str]:
    """Return the settings in which a folder differs from the adapter that the model has, except its scales."""
    in_folder, in_model = ({**settings_beyond(c.to_dict()), "use_dora": c.use_dora} for c in (config, held))
    names = in_folder.keys() | in_model.keys()
    differing = {name for name in names if in_folder.get(name) != in_model.get(name)}
    return [
        f"{name}: the folder has {in_folder.get(name)!r}, the model's adapter {in_model.get(name)!r}"
        for name in sorted(differing - {"modules_to_save"})  # the tensors' names show these
    ]


def _without_experts(folder: AdapterFolder, config: peft.LoraConfig, shapes: Mapping[str, Shape]) -> AdapterFolder:
    """Return a folder without the factors of experts that are one parameter, which are compared once PEFT made them."""
    stacks = [path for path in shapes if matches(path, tuple(config.target_parameters or ()))]
    modules = {path.rpartition(".")[0] for path in stacks}
    a, b = (
        {layer: shape for layer, shape in side.items() if layer.replace(".base_layer", "") not in modules}
        for side in (folder.lora_A, folder.lora_B)
    )
    return replace(folder, lora_A=a, lora_B=b)


def _linear_layers(base: nn.Module) -> dict[str, tuple[int, int]]:
    """Return name in the base model -> (out, in), of the layers that may have LoRA."""
    shapes = {}
    for name, module in base.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding, *CONVOLUTIONS, LoraLayer)):
            shapes[name] = features_of(module)
        elif isinstance(module, Conv1D):
            in_features, out_features = shape_of(module.weight)
            shapes[name] = out_features, in_features
    return shapes


def _forms(base: nn.Module) -> dict[str, Form]:
    """Return name -> kind, of the layers that are not linear."""
    forms = {}
    for name, module in base.named_modules():
        inner = module.get_base_layer() if isinstance(module, LoraLayer) else module
        if isinstance(inner, nn.Embedding):
            forms[name] = Form(is_embedding=True)
        elif isinstance(inner, CONVOLUTIONS):
            forms[name] = Form(kernel=tuple(inner.kernel_size))
    return forms
