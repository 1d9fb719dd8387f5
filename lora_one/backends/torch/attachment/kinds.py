"""Kinds of layers that PEFT has LoRA for: linear layers, embeddings and convolutions, each as one matrix W, (out, in).

    linear         y = W x
    embedding      y = W e_i, the column of token i:   W is the transposed table, (dim, tokens)
    convolution    y = W p for each patch p of x:      W is the kernel with its last axes as one, (out, in * size)

PEFT keeps the factors of an embedding in parameters of its own, and those of a convolution in two convolutions: lora_A
with the base layer's kernel, lora_B with one of size 1. As matrices, lora_A (r, in) and lora_B (out, r), they mean the
same on all three.
"""

import math
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lora_one.backends.torch.pairs import LoraPair

from .sharding import is_dtensor, shape_of

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def has_factors(module: LoraLayer, adapter: str) -> bool:
    """Return whether a layer has LoRA of an adapter."""
    return adapter in module.lora_A or adapter in module.lora_embedding_A


def factors_of(module: LoraLayer, adapter: str) -> LoraPair:
    """Return the parameters of a LoRA layer, in the shapes that PEFT keeps them in."""
    if adapter in module.lora_embedding_A:
        return LoraPair(module.lora_embedding_A[adapter], module.lora_embedding_B[adapter])
    return LoraPair(module.lora_A[adapter].weight, module.lora_B[adapter].weight)


def set_factors(module: LoraLayer, adapter: str, pair: LoraPair) -> None:
    """Give a LoRA layer other parameters."""
    if adapter in module.lora_embedding_A:
        module.lora_embedding_A[adapter], module.lora_embedding_B[adapter] = pair
    else:
        module.lora_A[adapter].weight, module.lora_B[adapter].weight = pair


def set_rank(module: LoraLayer, adapter: str, rank: int) -> None:
    """Give a LoRA layer other factors: trainable zeros of a rank."""
    a, b = factors_of(module, adapter)
    ranks = rank * len(a) // module.r[adapter]  # of all experts in a parameter together
    zeros = a.new_zeros(ranks, *a.shape[1:]), b.new_zeros(len(b), ranks, *b.shape[2:])
    set_factors(module, adapter, LoraPair(*map(nn.Parameter, zeros)))
    module.r[adapter] = rank
    if adapter in module.lora_A:
        axis = "channels" if isinstance(module.lora_A[adapter], CONVOLUTIONS) else "features"
        setattr(module.lora_A[adapter], f"out_{axis}", ranks)
        setattr(module.lora_B[adapter], f"in_{axis}", ranks)


def lend_settings(model: nn.Module) -> None:
    """Let LoRA layers around convolutions have these settings, which models read: Whisper reads strides."""
    for module in model.modules():
        if isinstance(module, LoraLayer) and isinstance(base := module.get_base_layer(), CONVOLUTIONS):
            settings: Any = module
            settings.kernel_size, settings.stride, settings.padding = base.kernel_size, base.stride, base.padding


def as_kept(matrix: Tensor, parameter: Tensor) -> Tensor:
    """Return the entries of a factor, (m, n), with the axes that a parameter has beyond the second one."""
    sizes = shape_of(parameter)[2:]
    return matrix.reshape(len(matrix), -1, *sizes) if sizes and matrix.ndim == 2 else matrix


def without_padding(module: LoraLayer, lora_A: Tensor) -> Tensor:
    """Return lora_A, (r, tokens), of an embedding with zeros for a token that pads, which PyTorch does not train."""
    padding = getattr(module.get_base_layer(), "padding_idx", None)
    if padding is None:
        return lora_A
    is_text = torch.arange(lora_A.shape[1], device=lora_A.device) != padding
    return lora_A * is_text


def features_of(module: Any) -> tuple[int, int]:
    """Return (out, in) of a layer as one matrix, with LoRA or without."""
    base = module.get_base_layer() if isinstance(module, LoraLayer) else module
    if isinstance(base, nn.Embedding):
        return int(base.embedding_dim), int(base.num_embeddings)
    if isinstance(base, CONVOLUTIONS):
        return int(base.out_channels), int(base.in_channels) * math.prod(base.kernel_size)
    weight = getattr(base, "weight", None)
    if weight is not None and is_dtensor(weight):  # PEFT's numbers may be those of this process's part
        out_features, in_features = weight.shape
        return out_features, in_features
    return int(module.out_features), int(module.in_features)


def refusal_of_kind(base: nn.Module) -> str | None:
    """Return why the LoRA that PEFT gives a layer is not W + s B A, and the remedy; None if it is."""
    remedy = "leave it out of the targets"
    weight = getattr(base, "weight", None)
    if isinstance(base, (nn.Embedding, *CONVOLUTIONS)) and getattr(base, "_hf_tp_plan", None) and is_dtensor(weight):
        return f"a {type(base).__name__} that tensor parallelism splits; {remedy}, or start the model whole"
    if isinstance(base, nn.Embedding) and base.max_norm is not None:
        return f"an embedding with max_norm, which changes the factors at each call; {remedy}"
    if not isinstance(base, CONVOLUTIONS):
        return None
    if base.groups > 1:
        return f"a convolution with groups={base.groups}, where PEFT's factors mix the groups; {remedy}"
    if any(d != 1 and k != 1 for d, k in zip(base.dilation, base.kernel_size, strict=True)):
        return f"a convolution with dilation={base.dilation}, which PEFT's lora_A leaves out; {remedy}"
    if base.padding_mode != "zeros":
        return f"a convolution with padding_mode={base.padding_mode!r}, where PEFT's lora_A pads with zeros; {remedy}"
    return None
