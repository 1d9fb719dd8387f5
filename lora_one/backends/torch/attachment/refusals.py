"""Reasons why a layer or an adapter of PEFT is not LoRA as LoRA-One starts it, and what to do about it."""

from typing import Any

import peft
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from .dora import is_whole
from .experts import refusal_of_experts
from .kinds import CONVOLUTIONS, factors_of, refusal_of_kind

# Beginning of the name of PEFT's class -> what it is, and what to do.
_VARIANTS = {
    "Dora": "DoRA on an embedding or a convolution; name linear layers as targets, or attach LoRA without use_dora",
    "ALora": "activated LoRA, on a part of the tokens; attach LoRA without alora_invocation_tokens",
    "Arrow": "a router over several adapters; activate one of them, without arrow_config",
    "BdLora": "LoRA of block-diagonal factors; attach LoRA without use_bdlora",
    "Kasa": "KaSA, which changed the base weight; open the base model anew and attach LoRA without kasa_config",
    "MiCA": "MiCA, whose lora_B is frozen; attach LoRA without init_lora_weights='mica'",
    "Montec": "MonteCLoRA, whose factors are drawn at each step; attach LoRA without monteclora_config",
    "QALora": "QA-LoRA, on groups of inputs; attach LoRA without use_qalora",
    "Velora": "VeLoRA, with a backward pass of its own; attach LoRA without velora_config",
}
WHOLE_WEIGHTS = (
    "whole weights, since its magnitudes are norms of rows: start it, or load it, on the whole model, and let "
    "fully_shard, DeepSpeed or tensor parallelism spread that"
)
_KINDS = {"ADALORA": "AdaLoRA, which has singular values beside the factors and changes ranks as it goes"}


def kind_of(model: peft.PeftModel) -> str | None:
    """Return what kind an adapter is; None for LoRA. (The classes of PEFT's AdaLoRA derive from its LoRA.)"""
    config: Any = next(iter(model.peft_config.values()))
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    return None if kind == "LORA" else _KINDS.get(kind, kind)


def refusal(module: LoraLayer, adapter: str) -> str | None:
    """Return why LoRA-One cannot start the adapter of a layer, and the remedy; None if it can."""
    base = module.get_base_layer()
    if isinstance(module, ParamWrapper):
        return refusal_of_experts(module, adapter) or _refusal_of_state(module, adapter)
    if adapter in module.lora_A and not isinstance(module.lora_A[adapter], (nn.Linear, *CONVOLUTIONS)):
        return f"LoRA on a {type(base).__name__}; name linear layers, embeddings or convolutions as targets"
    if reason := refusal_of_kind(base):
        return reason
    variant = type(module.lora_variant.get(adapter)).__name__
    if variant == "DoraLinearVariant":
        if not is_whole(module):
            return f"DoRA needs {WHOLE_WEIGHTS}"
    elif adapter in module.lora_variant:
        texts = (text for name, text in _VARIANTS.items() if variant.startswith(name))
        return next(texts, f"a variant of LoRA, {variant}; attach plain LoRA")
    return _refusal_of_state(module, adapter)


def _refusal_of_state(module: LoraLayer, adapter: str) -> str | None:
    base = module.get_base_layer()
    if factors_of(module, adapter).lora_A.is_meta:
        if next(base.parameters()).is_meta:
            return "offloaded, with LoRA weights that hold no numbers; load the model where it fits"
        return (
            "LoRA weights that hold no numbers, as low_cpu_mem_usage=True makes them; attach the adapter without that, "
            "or load its weights first"
        )
    if module.lora_bias.get(adapter):
        return "a bias in lora_B; attach LoRA without lora_bias"
    if module.disable_adapters:
        return "disabled; call model.enable_adapter_layers() first"
    if module.merged:
        return "merged into the base weight; call model.unmerge_adapter() first"
    return None
