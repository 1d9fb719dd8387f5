"""Read the architecture of a model from its config.json. No weights are read."""

import json
from pathlib import Path
from typing import Any

from lora_one.errors import ConfigError

from .architecture import Architecture, Block, Linear
from .families import FAMILIES, KV_HEADS_FOLLOW


def read_architecture(folder: str | Path) -> Architecture:
    """Read the architecture of a model from its config.json.

    Args:
        folder: the model's folder, or the JSON file itself.

    Raises:
        ConfigError: the file cannot be read, its model type is unknown here, or keys are missing.
    """
    folder = Path(folder)
    file = folder if folder.suffix == ".json" else folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file} must be a model's config.json: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{file} must be a model's config.json, an object, got {type(config).__name__}")
    name = file.resolve().parent.name if file.name == "config.json" else file.stem
    return architecture_of(config, name)


def architecture_of(config: dict[str, Any], name: str = "model") -> Architecture:
    """Return the architecture that the content of a config.json describes.

    Raises:
        ConfigError: the model type is unknown here, or keys are missing.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ConfigError(
            f"model_type must be one of {', '.join(FAMILIES)}, got {model_type!r}{_inner_model_hint(config)}; for "
            "another decoder add a row to lora_one/estimate/families.py"
        )
    return _Reader(config, model_type).read(name)


def _inner_model_hint(config: dict[str, Any]) -> str:
    """Return what to do about a model that contains a language model, such as an image-text model."""
    for key in ("text_config", "llm_config", "language_config"):
        inner = config.get(key)
        if isinstance(inner, dict):
            try:
                architecture_of(inner)
            except ConfigError as error:
                return f"; nor can its {key} be estimated alone: {error}"
            return (
                f"; its {key} ({inner['model_type']}) can be estimated alone: write it to a file and give that, "
                f"--model {key}.json"
            )
    return ""


class _Reader:
    """The content of a config.json, completed by the defaults of its family."""

    def __init__(self, config: dict[str, Any], model_type: str):
        self.family = FAMILIES[model_type]
        self.model_type = model_type
        given = {key: value for key, value in config.items() if value is not None}
        if "hidden_activation" in given:  # Gemma's name for it, which wins where both are given
            given["hidden_act"] = given["hidden_activation"]
        self.values = {**dict(self.family.defaults), **given}
        self._require()

    def _require(self) -> None:
        if self.model_type in KV_HEADS_FOLLOW:
            self.values.setdefault("num_key_value_heads", self.values.get("num_attention_heads"))
        if "num_local_experts" in self.values:  # the key depends on the version of transformers
            self.values.setdefault("num_experts", self.values["num_local_experts"])
        needed = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"]
        needed.append("num_key_value_heads")
        if self.family.expert_keys:
            needed += [*self.family.expert_keys, "num_experts_per_tok"]
        if self.family.shared_expert:
            needed.append("shared_expert_intermediate_size")
        wrong = [key for key in needed if type(self.values.get(key)) is not int or self.values[key] < 1]
        if wrong:
            got = ", ".join(f"{key} {self.values.get(key, 'missing')}" for key in wrong)
            raise ConfigError(f"config.json of a {self.model_type} must give {', '.join(wrong)} as integers; got {got}")

    def read(self, name: str) -> Architecture:
        values = self.values
        self.hidden = values["hidden_size"]
        self.heads, self.kv_heads = values["num_attention_heads"], values["num_key_value_heads"]
        self.head_dim = values.get("head_dim", self.hidden // self.heads)
        return Architecture(
            name=name,
            model_type=self.model_type,
            family=self.family,
            hidden=self.hidden,
            vocabulary=values["vocab_size"],
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            activation=values.get("hidden_act", "silu"),
            tied=values.get("tie_word_embeddings", False),
            softcapped="final_logit_softcapping" in values or self.model_type == "gemma2",
            blocks=tuple(self._block(index) for index in range(values["num_hidden_layers"])),
        )

    def _block(self, index: int) -> Block:
        values, family = self.values, self.family
        width, shared_width = values["intermediate_size"], 0
        if family.expert_keys and self._is_sparse(index):
            mlp = self._experts(*(values[key] for key in family.expert_keys))
            width = values[family.expert_keys[1]] * values["num_experts_per_tok"]
            shared_width = values["shared_expert_intermediate_size"] if family.shared_expert else 0
        else:
            mlp = self._mlp("mlp", width)
        norms = [self.hidden] * family.norms
        head_norms = [self.heads * self.head_dim, self.kv_heads * self.head_dim]
        if not self._flag(family.head_norms):
            head_norms = []
        per_norm = 2 if family.norm == "layer" else 1
        return Block(
            linears=(*self._attention(), *mlp),
            norm_inputs=(*norms, *head_norms),
            norm_parameters=per_norm * (sum(norms) + self.head_dim * len(head_norms)),
            mlp_width=width,
            shared_width=shared_width,
            window=self._window(index),
        )

    def _attention(self) -> list[Linear]:
        family, hidden = self.family, self.hidden
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        bias = self._flag(family.qkv_bias)
        output = "dense" if family.mlp == "plain" else "o_proj"
        sizes = {"qkv_proj": q + 2 * kv} if family.fused_qkv else {"q_proj": q, "k_proj": kv, "v_proj": kv}
        return [
            *(Linear(f"self_attn.{name}", size, hidden, "attention input", bias) for name, size in sizes.items()),
            Linear(f"self_attn.{output}", hidden, q, "attention output", self._flag(family.output_bias)),
        ]

    def _mlp(self, path: str, width: int) -> list[Linear]:
        bias = self._flag(self.family.mlp_bias)
        # Phi runs attention and MLP in parallel, both on the output of one norm.
        reads = "attention input" if self.family.norms == 1 else "mlp input"
        if self.family.mlp == "plain":
            inner, output = {"fc1": width}, "fc2"
        elif self.family.mlp == "fused":
            inner, output = {"gate_up_proj": 2 * width}, "down_proj"
        else:
            inner, output = {"gate_proj": width, "up_proj": width}, "down_proj"
        return [
            *(Linear(f"{path}.{name}", size, self.hidden, reads, bias) for name, size in inner.items()),
            Linear(f"{path}.{output}", self.hidden, width, f"{path} hidden", bias),
        ]

    def _experts(self, count: int, width: int) -> list[Linear]:
        hidden, per_token = self.hidden, self.values["num_experts_per_tok"]
        shared: list[Linear] = []
        if self.family.shared_expert:
            shared = [
                *self._mlp("mlp.shared_expert", self.values["shared_expert_intermediate_size"]),
                Linear("mlp.shared_expert_gate", 1, hidden, "mlp input"),
            ]
        return [
            Linear("mlp.gate", count, hidden, "mlp input", module=False),
            Linear("mlp.experts.gate_up_proj", 2 * width, hidden, "expert input", False, count, per_token, False),
            Linear("mlp.experts.down_proj", hidden, width, "expert hidden", False, count, per_token, False),
            *shared,
        ]

    def _is_sparse(self, index: int) -> bool:
        dense = index in self.values.get("mlp_only_layers", ())
        return not dense and (index + 1) % self.values.get("decoder_sparse_step", 1) == 0

    def _window(self, index: int) -> int | None:
        window = self.values.get("sliding_window")
        layer_types = self.values.get("layer_types")
        if layer_types:
            return window if layer_types[index] == "sliding_attention" else None
        if self.model_type.startswith("qwen") and not self.values.get("use_sliding_window", False):
            return None
        return window

    def _flag(self, value: bool | str) -> bool:
        return bool(self.values.get(value, False)) if isinstance(value, str) else value
