"""A decoder's shape from its config.json: every linear layer, and how many parameters there are. Loads no weights."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_one.errors import ConfigError

from .families import FAMILIES, KV_HEADS_FOLLOW, Family


@dataclass(frozen=True)
class Linear:
    """A linear layer of a block, or an expert's slice of a stacked one.

    Attributes:
        name: as in the module's path: "self_attn.q_proj".
        reads: the activation that it multiplies; layers with the same word share it.
        copies: how many there are in the block: 1, or the number of experts.
        rows: how many of the copies a token passes: 1, or the experts per token.
        module: a module of its own, which "all-linear" finds. Routers and stacked experts are not.
    """

    name: str
    out_features: int
    in_features: int
    reads: str
    bias: bool = False
    copies: int = 1
    rows: int = 1
    module: bool = True

    @property
    def weights(self) -> int:
        """Entries of all copies' matrices."""
        return self.copies * self.out_features * self.in_features

    @property
    def parameters(self) -> int:
        """Weights and biases of all copies."""
        return self.weights + self.copies * self.out_features * self.bias

    @property
    def used_weights(self) -> int:
        """Entries that one token is multiplied with."""
        return self.rows * self.out_features * self.in_features


@dataclass(frozen=True)
class Block:
    """A decoder block."""

    linears: tuple[Linear, ...]
    norm_inputs: tuple[int, ...]  # width of what each norm reads, in entries a token
    norm_parameters: int
    mlp_width: int  # of the activations between the MLP's layers, in entries a token (experts per token times theirs)
    shared_width: int  # of the same in the shared expert; 0 without one
    window: int | None  # tokens that attention looks back; None: all

    def named(self, name: str) -> Linear:
        """The linear layer of that name."""
        return next(linear for linear in self.linears if linear.name == name)

    @property
    def parameters(self) -> int:
        """Of the whole block."""
        return self.norm_parameters + sum(linear.parameters for linear in self.linears)


@dataclass(frozen=True)
class Architecture:
    """A decoder with a language-model head."""

    name: str  # of the folder
    model_type: str
    family: Family
    hidden: int
    vocabulary: int
    heads: int
    kv_heads: int
    head_dim: int
    activation: str
    tied: bool
    softcapped: bool  # the logits pass a tanh
    blocks: tuple[Block, ...]

    @property
    def embedding_parameters(self) -> int:
        """Of the embedding and the output layer; one matrix where they are tied."""
        matrices = (1 if self.tied else 2) * self.vocabulary * self.hidden
        return matrices + self.vocabulary * self.family.head_bias

    @property
    def parameters(self) -> int:
        """All of them, as transformers counts them."""
        final_norm = self.hidden * (2 if self.family.norm == "layer" else 1)
        return self.embedding_parameters + final_norm + sum(block.parameters for block in self.blocks)


def read_architecture(folder: str | Path) -> Architecture:
    """The architecture of a model folder, from its config.json (or of that file itself).

    Raises:
        ConfigError: no such file, a model type that is not known here, or keys that are missing.
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
    return architecture(config, name)


def architecture(config: dict[str, Any], name: str = "model") -> Architecture:
    """The architecture that a config.json describes.

    Raises:
        ConfigError: a model type that is not known here, or keys that are missing.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ConfigError(
            f"model_type must be one of {', '.join(FAMILIES)}, got {model_type!r}{_language_model(config)}; for "
            "another decoder add a row to lora_one/estimate/families.py"
        )
    return _Reader(config, model_type).read(name)


def _language_model(config: dict[str, Any]) -> str:
    """What can be done about a model that has a language model as a part, pictures' for instance."""
    for key in ("text_config", "llm_config", "language_config"):
        inner = config.get(key)
        if isinstance(inner, dict):
            try:
                architecture(inner)
            except ConfigError as error:
                return f"; nor can its {key} be estimated alone: {error}"
            kind = inner["model_type"]
            return f"; its {key} ({kind}) can be estimated alone: write it to a file and give that, --model {key}.json"
    return ""


class _Reader:
    """config.json with the family's defaults under it."""

    def __init__(self, config: dict[str, Any], model_type: str):
        self.family = FAMILIES[model_type]
        self.model_type = model_type
        given = {key: value for key, value in config.items() if value is not None}
        if "hidden_activation" in given:  # Gemma's name of it, which holds where both are there
            given["hidden_act"] = given["hidden_activation"]
        self.values = {**dict(self.family.defaults), **given}
        self._require()

    def _require(self) -> None:
        if self.model_type in KV_HEADS_FOLLOW:
            self.values.setdefault("num_key_value_heads", self.values.get("num_attention_heads"))
        if "num_local_experts" in self.values:  # some versions of transformers write either name
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
        self.hidden, self.heads, self.kv_heads = (
            values[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads")
        )
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
        sparse = family.expert_keys is not None and self._is_sparse(index)
        linears = [*self._attention(), *(self._experts() if sparse else self._mlp("mlp", values["intermediate_size"]))]
        width, shared = values["intermediate_size"], 0
        if sparse and family.expert_keys:
            width = values[family.expert_keys[1]] * values["num_experts_per_tok"]
            shared = values["shared_expert_intermediate_size"] if family.shared_expert else 0
        norms = [self.hidden] * family.norms
        heads = [self.heads * self.head_dim, self.kv_heads * self.head_dim] if self._flag(family.head_norms) else []
        per_norm = 2 if family.norm == "layer" else 1
        return Block(
            linears=tuple(linears),
            norm_inputs=(*norms, *heads),
            norm_parameters=per_norm * (sum(norms) + self.head_dim * len(heads)),
            mlp_width=width,
            shared_width=shared,
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
        # Phi runs attention and MLP side by side, on one norm.
        reads = "attention input" if self.family.norms == 1 else "mlp input"
        if self.family.mlp == "plain":
            into, out = {"fc1": width}, "fc2"
        elif self.family.mlp == "fused":
            into, out = {"gate_up_proj": 2 * width}, "down_proj"
        else:
            into, out = {"gate_proj": width, "up_proj": width}, "down_proj"
        return [
            *(Linear(f"{path}.{name}", size, self.hidden, reads, bias) for name, size in into.items()),
            Linear(f"{path}.{out}", self.hidden, width, f"{path} hidden", bias),
        ]

    def _experts(self) -> list[Linear]:
        assert self.family.expert_keys is not None
        count, width = (self.values[key] for key in self.family.expert_keys)
        hidden, top = self.hidden, self.values["num_experts_per_tok"]
        shared: list[Linear] = []
        if self.family.shared_expert:
            shared = [
                *self._mlp("mlp.shared_expert", self.values["shared_expert_intermediate_size"]),
                Linear("mlp.shared_expert_gate", 1, hidden, "mlp input"),
            ]
        return [
            Linear("mlp.gate", count, hidden, "mlp input", module=False),
            Linear("mlp.experts.gate_up_proj", 2 * width, hidden, "expert input", False, count, top, False),
            Linear("mlp.experts.down_proj", hidden, width, "expert hidden", False, count, top, False),
            *shared,
        ]

    def _is_sparse(self, index: int) -> bool:
        listed = index in self.values.get("mlp_only_layers", ())
        return not listed and (index + 1) % self.values.get("decoder_sparse_step", 1) == 0

    def _window(self, index: int) -> int | None:
        window = self.values.get("sliding_window")
        kinds = self.values.get("layer_types")
        if kinds:
            return window if kinds[index] == "sliding_attention" else None
        if self.model_type.startswith("qwen") and not self.values.get("use_sliding_window", False):
            return None
        return window

    def _flag(self, value: bool | str) -> bool:
        return bool(self.values.get(value, False)) if isinstance(value, str) else value


def target_linears(model: Architecture, targets: str | tuple[str, ...] = "all-linear") -> list[list[Linear]]:
    """The target layers of each block.

    Args:
        targets: "all-linear" (every linear module of the blocks but gates of one output), or last names, "experts" for
            the stacked experts.

    Raises:
        ConfigError: a name that no layer has.
    """
    if targets == "all-linear":
        return [
            [linear for linear in block.linears if linear.module and linear.out_features > 1] for block in model.blocks
        ]
    if isinstance(targets, str):
        raise ConfigError(f'targets must be "all-linear" or names of layers, got {targets!r}')

    def names(linear: Linear) -> set[str]:
        return {linear.name.split(".")[-1]} if ".experts." not in linear.name else {"experts"}

    known = {name for block in model.blocks for linear in block.linears for name in names(linear)}
    if unknown := sorted(set(targets) - known):
        raise ConfigError(f"targets must be among {', '.join(sorted(known))}, got {', '.join(unknown)}")
    return [[linear for linear in block.linears if names(linear) & set(targets)] for block in model.blocks]


def lora_parameters(targets: list[list[Linear]], rank: int) -> int:
    """Entries of all pairs at a rank."""
    return sum(x.copies * rank * (x.out_features + x.in_features) for block in targets for x in block)
