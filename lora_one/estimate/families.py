"""What the model types of Hugging Face's config.json differ in. A new decoder of the same kind is a new row."""

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Family:
    """How a `model_type` builds its blocks, and what its config.json may leave out.

    Attributes:
        qkv_bias, output_bias, mlp_bias, head_norms: True, False, or the key of config.json that says so.
            head_norms: q and k are normalised, with a weight of the head's size each.
        mlp: "gated" (gate, up and down), "fused" (gate and up are one layer), "plain" (fc1, fc2).
        fused_qkv: q, k and v are one layer.
        joined_rotation: q and k are rotated in part and put together again, which changes how they lie in memory.
        norm: "rms" has a weight, "layer" a weight and a bias.
        norms: of a block, each of the hidden size.
        head_bias: the output layer has a bias.
        expert_keys: keys of config.json that hold the number of experts and their width; None for a dense model.
        shared_expert: every token also passes a dense MLP with a gate of its own.
        defaults: of config.json's keys, where transformers' own are not derived from the other keys.
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
    defaults: tuple[tuple[str, Any], ...] = ()


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
# Types that derive num_key_value_heads from num_attention_heads where config.json does not give it; the others have a
# number of their own, which is too easily wrong to be assumed.
KV_HEADS_FOLLOW = {"llama", "phi", "phi3"}
