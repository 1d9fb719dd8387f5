"""What of a PeftModel belongs to its active adapter: LoRA factors, and all that PEFT trains beside them."""

from collections.abc import Iterator

import peft
import torch
from peft.tuners.lora import LoraLayer
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn

from lora_one.checkpoint.peft import PEFT_KEY
from lora_one.errors import ModelError

PREFIX = "base_model.model."  # of PEFT's keys, before a path in the base model


def active_adapter(model: peft.PeftModel, verb: str) -> str:
    """The name of the one active adapter.

    Raises:
        ModelError: several are active.
    """
    adapters = model.active_adapters
    if len(adapters) != 1:
        raise ModelError(f"{verb} takes one active adapter, got {adapters}: choose with model.set_adapter(name)")
    return str(adapters[0])


def adapter_state(model: peft.PeftModel, adapter: str) -> dict[str, Tensor]:
    """PEFT's key on disk -> the model's own parameter or buffer.

    Raises:
        ModelError: PEFT does not find the adapter's factors, since another adapter has a module's name.
    """
    tensors, none = model.state_dict(keep_vars=True), torch.empty(0)
    missing = {f"{key}.{adapter}": none for key in tokens_of_others(model, adapter)}
    state: dict[str, Tensor] = peft.get_peft_model_state_dict(
        model, state_dict={**tensors, **missing}, adapter_name=adapter, save_embedding_layers=False
    )
    state = {key: tensor for key, tensor in state.items() if tensor is not none}
    bias = getattr(model.peft_config[adapter], "bias", "none")
    for path, module in lora_layers(model, adapter):
        if bias == "lora_only" and (key := f"{PREFIX}{path}.base_layer.bias") in tensors:
            state[key] = tensors[key]  # PEFT before 0.21 looks for it where it was before LoRA came, and leaves it out
        if adapter in module.lora_A and PEFT_KEY.format(path=path, side="A") not in state:
            others = sorted(model.peft_config.keys() - {adapter})
            raise ModelError(f"{path}: PEFT takes its LoRA for another adapter's; no adapter may be named as a module "
                             f"of the model is, got {others}")  # fmt: skip
    return state


def tokens_of_others(model: peft.PeftModel, adapter: str) -> list[str]:
    """PEFT's keys of tokens that other adapters train: it asks for them in this one's state too, and fails without."""
    return [
        f"{path}.token_adapter.trainable_tokens_delta"
        for path, module in model.named_modules()
        if isinstance(module, TrainableTokensWrapper) and adapter not in module.token_adapter.trainable_tokens_delta
    ]


def train_adapter(model: peft.PeftModel, adapter: str, trainable: bool) -> None:
    """Let all of an adapter's parameters train, or freeze them."""
    for tensor in adapter_state(model, adapter).values():
        if isinstance(tensor, nn.Parameter):
            tensor.requires_grad_(trainable)


def is_frozen(model: peft.PeftModel, adapter: str) -> bool:
    """Whether none of an adapter's parameters trains."""
    return not any(tensor.requires_grad for tensor in adapter_state(model, adapter).values())


def lora_layers(model: peft.PeftModel, adapter: str) -> Iterator[tuple[str, LoraLayer]]:
    """The layers that have LoRA of an adapter, by their paths in the base model."""
    for path, module in model.base_model.model.named_modules():
        if isinstance(module, LoraLayer) and adapter in module.scaling:
            yield path, module
