"""LoRA's own gradients, of code that reads a layer's factors and never calls the layer, so that no tap sees its input.

Fused kernels do so (Liger, Unsloth, axolotl), and PEFT itself in nn.MultiheadAttention. A probe goes into the factors
beside a zero: the model computes what it did, and the zero's gradient is the product that a tap would form. Where
nobody reads the factors that costs nothing: a zero is one number, seen many times.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from lora_one.backends.torch.attachment.attach import Site
from lora_one.backends.torch.linalg.precision import widened
from lora_one.core.sketch import Probe

from .tap import Sink


@contextmanager
def own_gradients(site: Site, probe: Probe | None, sink: Sink) -> Iterator[None]:
    """Replace a layer's factors temporarily by a probe and a zero.

    Args:
        probe: None for two zeros, whose gradients are zero too, but arrive where anybody reads the factors.
        sink: gets the zero's gradient, at scale 1 and as it is, once in each backward pass that reaches it.
    """
    lora_A, lora_B = site.lora_A, site.lora_B
    found = lora_A.weight, lora_B.weight

    def take(zero: Tensor) -> None:
        assert zero.grad is not None
        gradient, zero.grad = zero.grad, None
        sink(widened(gradient) / site.module.scaling[site.adapter], gradient)

    def factor(given: Tensor | None, shape: tuple[int, int], like: Tensor) -> nn.Parameter:
        if given is not None:
            return nn.Parameter(given.to(like.dtype), requires_grad=False)
        zero = nn.Parameter(like.new_zeros(()).expand(shape))
        zero.register_post_accumulate_grad_hook(take)
        return zero

    side, given = probe or (None, None)
    k = site.layer.rank if given is None else given.shape[0 if side == "A" else 1]
    lora_A.weight = factor(given if side == "A" else None, (k, site.layer.in_features), found[0])
    lora_B.weight = factor(given if side == "B" else None, (site.layer.out_features, k), found[1])
    try:
        yield
    finally:
        lora_A.weight, lora_B.weight = found
