"""Temporary settings of a model and of PyTorch during passes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lora_one.backends.torch.attachment.zero import gathering
from lora_one.backends.torch.linalg.precision import no_reduced_matmul

from .frozen_linear import frozen_linears


@contextmanager
def settings_for_passes(model: nn.Module) -> Iterator[None]:
    """Prepare a model for passes: all weights frozen, no dropout, nothing that would hide a layer from its tap."""
    with (
        _frozen(model),
        _evaluation_mode(model),
        _no_cache(model),
        _no_fast_path(),
        no_reduced_matmul(),
        torch.enable_grad(),
        # Passes over a few batches are not worth compiling for, and taps do not work in compiled graphs.
        torch.compiler.set_stance("force_eager"),
        frozen_linears(model),
        gathering(model),
    ):
        yield


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout off.

    Layers that checkpoint their activations do so only in training mode, so they stay in it. bitsandbytes' 4-bit layers
    have no dropout and are put into training mode: without it, on a CPU with bfloat16 instructions, they repack their
    weights for good.
    """
    before = [(module, module.training) for module in model.modules()]
    for module, training in before:
        checkpoints = training and getattr(module, "gradient_checkpointing", False) is True
        module.training = checkpoints or hasattr(module, "support_avx512bf16_for_cpu")
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


@contextmanager
def _no_cache(model: nn.Module) -> Iterator[None]:
    """Switch the key-value cache off: it takes memory, and recomputing a block would write it twice."""
    # A decoder inside an encoder-decoder has its own configuration.
    all_configs: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(config): config for config in all_configs if hasattr(config, "use_cache")}.values()
    before = [(config, config.use_cache) for config in configs]
    for config, _ in before:
        config.use_cache = False
    try:
        yield
    finally:
        for config, use_cache in before:
            config.use_cache = use_cache


@contextmanager
def _no_fast_path() -> Iterator[None]:
    """Let nn.TransformerEncoderLayer and nn.MultiheadAttention call their layers.

    In evaluation mode, where nothing requires a gradient, one fused kernel would read the weights and leave LoRA out.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
