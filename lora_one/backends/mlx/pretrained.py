"""Load a model folder through mlx-lm, with the rotary embedding that its configuration asks for.

transformers 5 writes `rope_parameters: {"rope_theta": ...}`, and earlier versions wrote `rope_theta`. Most of mlx-lm's
models read only the latter: they silently use a default theta, and compute other logits.
"""

import dataclasses
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm.utils import _get_classes, load_config, load_model, load_tokenizer

from lora_one.errors import ModelError

from .tree import places


def load_pretrained(path: str | Path) -> tuple[nn.Module, Any]:
    """Load the model and the tokenizer of a folder that transformers or mlx-lm wrote.

    Use it instead of `mlx_lm.load` for checkpoints of transformers 5: many models of mlx-lm do not read the base of
    their rotary embedding, and compute wrong logits without an error. For other folders the result is that of
    `mlx_lm.load`. Nothing is downloaded.

    Args:
        path: a folder with config.json and safetensors files.

    Returns:
        The model, an `mlx.nn.Module` in eval mode, and the tokenizer of mlx-lm; None if the folder has no tokenizer.

    Raises:
        ModelError: the folder has no config.json, or mlx-lm's model cannot use its rotary embedding.

    >>> from lora_one import demo
    >>> model, tokenizer = load_pretrained(demo.MODEL)
    >>> len(model.layers)
    4
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} must be a model folder with a config.json, got none")
    config = load_config(folder)
    _, arguments = _get_classes(config)
    model, _ = load_model(folder, model_config=rope_settings(config, arguments))
    check_rope(model, config)
    has_tokenizer = any((folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json"))
    if not has_tokenizer:
        return model, None
    own_code = {"trust_remote_code": False}  # unless it is set, transformers asks in the terminal whether to run it
    return model, load_tokenizer(folder, own_code, eos_token_ids=config.get("eos_token_id"))


def rope_settings(config: dict[str, Any], arguments: type) -> dict[str, Any]:
    """Return what to add to a configuration of transformers 5 so that mlx-lm's model computes the same.

    Args:
        config: the configuration of the model folder.
        arguments: mlx-lm's ModelArgs class of the model.

    Raises:
        ModelError: the rotary parameters differ between layers, and this model of mlx-lm has one set.
    """
    rope = config.get("rope_parameters")
    fields = {field.name for field in dataclasses.fields(arguments)}
    if not rope or "rope_parameters" in fields or not {"rope_theta", "rope_scaling"} & fields:
        return {}
    kind = config.get("model_type")
    if any(isinstance(value, dict) for value in rope.values()):
        raise ModelError(
            f"rope_parameters of {kind!r} differ between kinds of layers ({', '.join(rope)}), and mlx-lm's model takes "
            "one set: convert the checkpoint with mlx_lm.convert of a version that knows it"
        )
    settings: dict[str, Any] = {
        name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope and name in fields
    }
    if rope.get("rope_type", "default") != "default":
        if "rope_scaling" not in fields:
            raise ModelError(f"{kind!r} of mlx-lm has no rope_scaling, but the checkpoint asks for {rope}")
        settings["rope_scaling"] = rope
    return {name: value for name, value in settings.items() if config.get(name) is None or name == "rope_scaling"}


def check_rope(model: nn.Module, config: dict[str, Any]) -> None:
    """Check that a loaded model rotates by the base in the configuration, if that has one base for all layers.

    Raises:
        ModelError: a layer rotates by another base.
    """
    rope = config.get("rope_parameters") or {}
    theta = rope.get("rope_theta", config.get("rope_theta"))
    if theta is None:
        return
    for place in places(model):
        if isinstance(place.module, nn.RoPE) and place.module.base != theta:
            raise ModelError(
                f"{place.path}: the rotary base must be {theta}, got {place.module.base}: this checkpoint's "
                f"configuration is one that mlx-lm does not read; load it with lora_one.backends.mlx.load_pretrained, "
                f'or with mlx_lm.load(path, model_config={{"rope_theta": {theta}}})'
            )
