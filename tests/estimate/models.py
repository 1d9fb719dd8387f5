"""Small decoders of each kind, the bytes that autograd keeps for them, and the operations that torch counts."""

import json
from typing import Any, NamedTuple

import peft
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from lora_one.estimate.architecture import Architecture
from lora_one.estimate.reader import architecture_of

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
}
SMALL = {
    "llama": {},
    "llama, biases, tied": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 24},
    "phi": {},
    "phi3": {"pad_token_id": 0},
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 80},
}


class Counts(NamedTuple):
    kept: int  # bytes
    forward: int  # operations
    backward: int


def small(kind: str) -> Any:
    """Return the transformers config of a small model."""
    return transformers.AutoConfig.for_model(kind.split(",")[0], **{**SIZES, **SMALL[kind]})


def shape_of(config: Any) -> Architecture:
    """Return the architecture that the config's own JSON describes."""
    return architecture_of(json.loads(config.to_json_string(use_diff=False)))


def linear_names(model: torch.nn.Module) -> list[str]:
    """Return the last names of the linear modules of the blocks, except gates of one output."""
    modules = model.model.named_modules()
    return sorted({n.split(".")[-1] for n, m in modules if isinstance(m, torch.nn.Linear) and m.out_features > 1})


def count(config: Any, rank: int, batch: tuple[int, int], dtype: str, attention: str) -> Counts:
    """Count one forward and backward pass of the model with PEFT's LoRA on all linear modules.

    `kept` is the size of all that autograd saves, each storage once, except the base weights, the tensors that exist
    once for the whole model (the rotations, the labels, a norm's 1 + weight), and the log-softmax of the loss.
    """
    # One expert after the other: torch's counter does not know the grouped product.
    experts = {"experts_implementation": "eager"} if "num_experts_per_tok" in config.to_dict() else {}
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=getattr(torch, dtype), attn_implementation=attention, **experts
    )
    model = peft.get_peft_model(model, peft.LoraConfig(r=rank, target_modules=linear_names(model)))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    ids = torch.randint(3, 300, batch, generator=torch.Generator().manual_seed(0))
    saved: dict[int, torch.Tensor] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        once = (x.ndim == 4 and x.shape[:2] == (1, 1)) or x.dtype == torch.int64 or x.ndim < 2
        if x.untyped_storage().data_ptr() not in weights and not once and x.shape[-1] != config.vocab_size:
            saved[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), FlopCounterMode(display=False) as forward:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    kept = sum(x.untyped_storage().nbytes() for x in saved.values())
    return Counts(kept, forward.get_total_flops(), backward.get_total_flops())
