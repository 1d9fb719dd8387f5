"""The part of a Llama-family model's `config.json` that a decoder needs."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_one.errors import ModelError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a decoder. Names are those of transformers; settings that differ by family say what they do.

    Attributes:
        qkv_bias: whether the projections of queries, keys and values have a bias.
        output_bias: whether the attention's output projection has a bias.
        mlp_bias: whether the projections of the MLP have a bias.
        qk_norm: whether queries and keys are normalised per head (Qwen3).
        windows: the number of tokens that each layer looks back; None for all.
        rope: `rope_parameters`: rope_theta, rope_type, and the settings that the type needs.
        max_position_embeddings: the longest sequence that the model was trained on.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]
    rope: tuple[tuple[str, Any], ...]
    max_position_embeddings: int | None = None

    def frequencies(self) -> list[float]:
        """Return the frequencies of the rotary embedding, (head_dim / 2,), for the types default, linear and llama3."""
        rope = dict(self.rope)
        base = [rope["rope_theta"] ** (-2.0 * i / self.head_dim) for i in range(self.head_dim // 2)]
        if rope["rope_type"] == "default":
            return base
        factor = rope["factor"]
        if rope["rope_type"] == "linear":
            return [frequency / factor for frequency in base]
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        old = rope["original_max_position_embeddings"]
        scaled = []
        for frequency in base:
            turns = old * frequency / (2 * math.pi)  # within the context of pretraining
            keep = min(1.0, max(0.0, (turns - low) / (high - low)))
            scaled.append((1 - keep) * frequency / factor + keep * frequency)
        return scaled


def read_llama_config(folder: Path) -> LlamaConfig:
    """Read `config.json`.

    Raises:
        ModelError: no such file, another family, or a setting that the decoder does not have.
    """
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder} must hold a model's config.json: {error}") from error
    family = values.get("model_type")
    if family not in FAMILIES:
        raise ModelError(f"{folder}: model_type must be one of {', '.join(FAMILIES)}, got {family!r}")
    if values.get("hidden_act", "silu") != "silu":
        raise ModelError(f"{folder}: hidden_act must be 'silu', got {values['hidden_act']!r}")
    heads, layers = values["num_attention_heads"], values["num_hidden_layers"]
    bias = bool(values.get("attention_bias", False))
    return LlamaConfig(
        vocab_size=values["vocab_size"],
        hidden_size=values["hidden_size"],
        intermediate_size=values["intermediate_size"],
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=values.get("num_key_value_heads") or heads,
        head_dim=values.get("head_dim") or values["hidden_size"] // heads,
        rms_norm_eps=values.get("rms_norm_eps", 1e-6),
        tie_word_embeddings=bool(values.get("tie_word_embeddings", False)),
        qkv_bias=True if family == "qwen2" else bias,
        output_bias=False if family == "qwen2" else bias,
        mlp_bias=bool(values.get("mlp_bias", False)),
        qk_norm=family == "qwen3",
        windows=_windows(family, values, layers),
        rope=_rope(folder, values),
        max_position_embeddings=values.get("max_position_embeddings"),
    )


def _windows(family: str, values: dict[str, Any], layers: int) -> tuple[int | None, ...]:
    window = values.get("sliding_window")
    if values.get("layer_types"):
        return tuple(window if kind == "sliding_attention" else None for kind in values["layer_types"])
    if window is None or (family != "mistral" and not values.get("use_sliding_window", False)):
        return (None,) * layers
    first = values.get("max_window_layers", 0) if family != "mistral" else 0
    return tuple(window if index >= first else None for index in range(layers))


def _rope(folder: Path, values: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Read `rope_parameters`, which transformers 5 writes, or `rope_theta` and `rope_scaling` of earlier versions."""
    rope = {**(values.get("rope_scaling") or {}), **(values.get("rope_parameters") or {})}
    rope.setdefault("rope_theta", values.get("rope_theta", 10000.0))
    rope.setdefault("rope_type", rope.pop("type", "default"))
    if rope["rope_type"] not in ("default", "linear", "llama3"):
        raise ModelError(f"{folder}: rope_type must be default, linear or llama3, got {rope['rope_type']!r}")
    return tuple(sorted((name, value) for name, value in rope.items() if not isinstance(value, (dict, list))))
