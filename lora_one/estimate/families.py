"""The differences between the model types of Hugging Face's config.json. A new decoder of the kind is a new row."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Family:
    """The layers in the blocks of a `model_type`, and the defaults of its config.json.

    Attributes:
        qkv_bias, output_bias, mlp_bias, head_norms: True, False, or the key of config.json that gives the value.
            head_norms: q and k are normalized; each has a weight of the head's size.
        mlp: "gated" (gate, up and down), "fused" (gate and up are one layer) or "plain" (fc1, fc2).
        fused_qkv: q, k and v are one layer.
        joined_rotation: a part of q and k is rotated and concatenated with the rest, which changes their memory layout.
        norm: "rms" has a weight, "layer" a weight and a bias.
        norms: number of norms per block, each of the hidden size.
        head_bias: the output layer has a bias.
        expert_keys: keys of config.json for the number of experts and their width; None for a dense model.
        shared_expert: every token also passes a dense MLP with its own gate.
        defaults: values of keys that config.json may leave out, where they do not follow from other keys.
    """

    qkv_bias: bool | str = False
    output_bias: bool | str = False
    mlp_bias: bool | str = False
    mlp: Literal["gated", "fused", "plain"] = "gated"
    fused_qkv: bool = False
    joined_rotation: bool = False
    norm: Literal["rms", "layer"] = "rms"
    norms: int = 2
    head_norms: bool | str = False
    head_bias: bool = False
    expert_keys: tuple[str, str] | None = None
    shared_expert: bool = False
    defaults: tuple[tuple[str, str | int | bool], ...] = ()


_GEMMA = (("head_dim", 256), ("tie_word_embeddings", True), ("hidden_act", "gelu_pytorch_tanh"))

FAMILIES = {
    "llama": Family(qkv_bias="attention_bias", output_bias="attention_bias", mlp_bias="mlp_bias"),
    "mistral": Family(),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(
        qkv_bias="attention_bias", output_bias="attention_bias", head_norms=True, defaults=(("head_dim", 128),)
    ),
    "gemma": Family(qkv_bias="attention_bias", output_bias="attention_bias", defaults=_GEMMA),
    "gemma2": Family(qkv_bias="attention_bias", output_bias="attention_bias", norms=4, defaults=_GEMMA),
    "gemma3_text": Family(
        qkv_bias="attention_bias", output_bias="attention_bias", norms=4, head_norms=True, defaults=_GEMMA
    ),
    "phi": Family(
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        head_norms="qk_layernorm",
        mlp="plain",
        norm="layer",
        norms=1,
        head_bias=True,
        joined_rotation=True,
        defaults=(("hidden_act", "gelu_new"),),
    ),
    "phi3": Family(mlp="fused", fused_qkv=True, joined_rotation=True),
    "mixtral": Family(
        expert_keys=("num_local_experts", "intermediate_size"),
        defaults=(("num_local_experts", 8), ("num_experts_per_tok", 2)),
    ),
    "qwen2_moe": Family(
        qkv_bias="qkv_bias",
        expert_keys=("num_experts", "moe_intermediate_size"),
        shared_expert=True,
        defaults=(("qkv_bias", True),),
    ),
    "qwen3_moe": Family(
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        head_norms=True,
        expert_keys=("num_experts", "moe_intermediate_size"),
    ),
}
# Model types whose num_key_value_heads defaults to num_attention_heads. The other types have a fixed default, which
# often differs from the model at hand, so config.json must give it.
KV_HEADS_FOLLOW = {"llama", "phi", "phi3"}
