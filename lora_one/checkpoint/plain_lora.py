"""What a PEFT adapter can hold besides LoRA and DoRA on linear layers, and why other libraries cannot open it."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from lora_one.checks import shown

MLX_SETTINGS = {"fine_tune_type", "lora_parameters", "num_layers"}  # mlx-lm's, in a folder with both layouts
# Settings that state where LoRA is and how it was trained: the names and shapes in the file state it too.
_HARMLESS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "eva_config", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout",
    "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
    "target_modules", "task_type", "use_dora", "use_rslora",
} | MLX_SETTINGS  # fmt: skip
_REASONS = {
    "bias": "biases of the base model were trained",
    "lora_bias": "LoRA with a bias: no other library's LoRA has one",
    "modules_to_save": "layers that were trained whole have no place beside the factors",
    "trainable_token_indices": "embeddings of single tokens were trained",
    "target_parameters": "LoRA on parameters, such as stacks of experts, in place of linear layers",
    "layer_replication": "the base model has layers that were made by replication",
    "alora_invocation_tokens": "activated LoRA acts on a part of the tokens only",
}
_STARTS_THAT_KEEP_THE_BASE = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
_TENSORS = (
    (r"\.lora_[AB]\.bias$", "a bias of LoRA's own"),
    (
        r"\.base_layer\.weight$",
        "PEFT's copy of the base weight, which may have changed; save_embedding_layers=False where it has not",
    ),
    (r"\.lora_[AB]\.", "not lora_A or lora_B of a linear layer"),
)


def setting_problems(config: Mapping[str, Any], allowed: Collection[str] = ()) -> list[str]:
    """Return one sentence per setting of adapter_config.json that is not plain LoRA's; unknown settings count.

    Args:
        allowed: settings that are not plain LoRA's, and no problem for the caller.
    """
    unknown = "not known here, and it may change what is computed"
    problems = [
        f"{name}={shown(value)}: {_REASONS.get(name, unknown)}"
        for name, value in settings_beyond(config).items()
        if name not in allowed
    ]
    start = config.get("init_lora_weights")
    if not keeps_base(start):
        problems.append(
            f"init_lora_weights={shown(start)}: it changed the base weights, which other libraries do not know of; "
            "PEFT can save the difference as plain LoRA: path_initial_model_for_weight_conversion"
        )
    return problems


def keeps_base(init_lora_weights: object) -> bool:
    """Return whether an init_lora_weights of PEFT leaves the base weights as they are; an unknown one does not."""
    start = init_lora_weights
    return (start.lower() if isinstance(start, str) else start) in _STARTS_THAT_KEEP_THE_BASE


def settings_beyond(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that are not plain LoRA's, except init_lora_weights; unknown settings count."""
    return {
        name: value
        for name, value in sorted(config.items())
        if name not in _HARMLESS and value not in (None, False, {}, [], ()) and (name, value) != ("bias", "none")
    }


def tensor_reason(name: str) -> str:
    """Return why a tensor in PEFT's file is not one of plain LoRA's."""
    for pattern, reason in _TENSORS:
        if re.search(pattern, name):
            return reason
    return "a weight that was trained whole"


def remedy(name: str) -> str:
    """Return what to do, on opening an adapter, about a tensor that is not one of plain LoRA's."""
    if any(re.search(pattern, name) for pattern, _ in _TENSORS):
        return ": the adapter is not plain LoRA; peft.PeftModel.from_pretrained opens it"
    return ", and is not in modules_to_save"
