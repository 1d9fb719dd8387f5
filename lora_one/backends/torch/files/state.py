"""The part of a PeftModel that belongs to its active adapter: LoRA factors, and all that PEFT trains beside them."""

from collections.abc import Iterator

import peft
import torch
from peft.tuners.lora import LoraLayer
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn

from lora_one.backends.torch.attachment.kinds import has_factors
from lora_one.checkpoint.adapter import Form
from lora_one.checkpoint.peft import peft_key
from lora_one.errors import ModelError

PREFIX = "base_model.model."  # what PEFT's keys have before a path in the base model


def active_adapter(model: peft.PeftModel, verb: str) -> str:
    """Return the name of the one active adapter.

    Raises:
        ModelError: several are active.
    """
    adapters = model.active_adapters
    if len(adapters) != 1:
        raise ModelError(f"{verb} takes one active adapter, got {adapters}: choose with model.set_adapter(name)")
    return str(adapters[0])


def adapter_state(model: peft.PeftModel, adapter: str) -> dict[str, Tensor]:
    """Return the adapter's parameters and buffers: PEFT's key on disk -> the tensor in the model.

    Raises:
        ModelError: PEFT does not find the adapter's factors, because another adapter has the name of a module.
    """
    tensors, placeholder = model.state_dict(keep_vars=True), torch.empty(0)
    missing = {f"{key}.{adapter}": placeholder for key in tokens_of_others(model, adapter)}
    state: dict[str, Tensor] = peft.get_peft_model_state_dict(
        model, state_dict={**tensors, **missing}, adapter_name=adapter, save_embedding_layers=False
    )
    state = {key: tensor for key, tensor in state.items() if tensor is not placeholder}
    bias = getattr(model.peft_config[adapter], "bias", "none")
    for path, module in lora_layers(model, adapter):
        if bias == "lora_only" and (key := f"{PREFIX}{path}.base_layer.bias") in tensors:
            state[key] = tensors[key]  # PEFT before 0.21 looks where the bias was without LoRA, and misses it
        form = Form(is_embedding=adapter in module.lora_embedding_A)
        if has_factors(module, adapter) and peft_key(path, "A", form) not in state:
            others = sorted(model.peft_config.keys() - {adapter})
            raise ModelError(f"{path}: PEFT takes its LoRA for another adapter's; no adapter may be named as a module "
                             f"of the model is, got {others}")  # fmt: skip
    return state


def tokens_of_others(model: peft.PeftModel, adapter: str) -> list[str]:
    """Return the keys of tokens that other adapters train: PEFT fails if they are not in this adapter's state too."""
    return [
        f"{path}.token_adapter.trainable_tokens_delta"
        for path, module in model.named_modules()
        if isinstance(module, TrainableTokensWrapper) and adapter not in module.token_adapter.trainable_tokens_delta
    ]


def train_adapter(model: peft.PeftModel, adapter: str, trainable: bool) -> None:
    """Make all parameters of an adapter trainable, or freeze them."""
    for tensor in adapter_state(model, adapter).values():
        if isinstance(tensor, nn.Parameter):
            tensor.requires_grad_(trainable)


def is_frozen(model: peft.PeftModel, adapter: str) -> bool:
    """Return whether all parameters of an adapter are frozen."""
    return not any(tensor.requires_grad for tensor in adapter_state(model, adapter).values())


def lora_layers(model: peft.PeftModel, adapter: str) -> Iterator[tuple[str, LoraLayer]]:
    """Yield the layers that have LoRA of an adapter, with their paths in the base model."""
    for path, module in model.base_model.model.named_modules():
        if isinstance(module, LoraLayer) and adapter in module.scaling:
            yield path, module
