"""LoRA's own gradients, for code that reads a layer's factors without calling the layer: no tap sees its input.

Fused kernels do that (Liger, Unsloth, axolotl), and so does PEFT in nn.MultiheadAttention. One factor is replaced by a
probe and the other by zeros. The model computes what it did before, and the gradient of the zeros is the product that a
tap would form. Where no code reads the factors this costs nothing: the zeros are a single number in memory.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lora_one.backends.torch.attachment.attach import Site
from lora_one.backends.torch.linalg.precision import widened
from lora_one.core.sketch import Probe

from .tap import Sink


@contextmanager
def own_gradients(site: Site, probe: Probe | None, sink: Sink) -> Iterator[None]:
    """Temporarily replace a layer's factors by a probe and zeros.

    Args:
        probe: None for zeros in both factors. Their gradients are zero, but still tell that the factors were read.
        sink: gets the gradient of the zeros at scale 1, and as it is, once in each backward pass that reaches it.
    """
    lora_A, lora_B = site.lora_A, site.lora_B
    weight_A, weight_B = lora_A.weight, lora_B.weight

    def take(zeros: Tensor) -> None:
        assert zeros.grad is not None
        gradient, zeros.grad = zeros.grad, None
        sink(widened(gradient) / site.module.scaling[site.adapter], gradient)

    def factor(given: Tensor | None, shape: tuple[int, int], like: Tensor) -> nn.Parameter:
        if given is not None:
            return nn.Parameter(given.to(like.dtype), requires_grad=False)
        zeros = nn.Parameter(like.new_zeros(()).expand(shape))
        zeros.register_post_accumulate_grad_hook(take)
        return zeros

    side, given = probe or (None, None)
    k = site.layer.rank if given is None else given.shape[0 if side == "A" else 1]
    lora_A.weight = factor(given if side == "A" else None, (k, site.layer.in_features), weight_A)
    lora_B.weight = factor(given if side == "B" else None, (site.layer.out_features, k), weight_B)
    try:
        yield
    finally:
        lora_A.weight, lora_B.weight = weight_A, weight_B


def identity_probe(site: Site) -> Probe:
    """Return the probe with which the other factor's gradient is G itself."""
    layer, like = site.layer, site.like()
    eye = torch.eye(min(layer.out_features, layer.in_features), device=like.device, dtype=like.dtype)
    return Probe("A" if layer.in_features <= layer.out_features else "B", eye)
