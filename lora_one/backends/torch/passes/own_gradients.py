"""LoRA's own gradients, for code that reads a layer's factors without calling the layer: no tap sees its input.

Fused kernels do that (Liger, Unsloth, axolotl), and so does PEFT in nn.MultiheadAttention. The pair is replaced by one
whose product is zero, see `lora_one.core.sides`. The model computes what it did before, and the gradients of the pair
are the products that a tap would form.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn

from lora_one.backends.torch.attachment.attach import Site
from lora_one.backends.torch.attachment.kinds import as_kept, set_factors
from lora_one.backends.torch.linalg.precision import widened
from lora_one.backends.torch.ops import TorchOps
from lora_one.backends.torch.pairs import LoraPair, as_matrix
from lora_one.core.factors import Factors
from lora_one.core.sides import Sides, products_of, sides_as_factors

from .tap import Sink, flat

_OPS = TorchOps()


@contextmanager
def own_gradients(site: Site, sides: Sides | None, sink: Sink) -> Iterator[None]:
    """Temporarily replace a layer's factors by those that read G in some directions.

    Args:
        sides: None for zeros in both factors, a single number in memory. Their gradients are zero, but still tell that
            the factors were read.
        sink: gets the products at scale 1, flat, and the gradient as it is. Each factor delivers its own part, and
            zeros for the other's, once in each backward pass that reaches it.
    """
    before = site.parameters
    pair = _without_memory(Factors(*before)) if sides is None else sides_as_factors(_OPS, sides)
    columns = 0 if sides is None else sides.right.shape[1]

    def take(factor: Tensor, field: str) -> None:
        assert factor.grad is not None
        gradient, factor.grad = factor.grad, None
        at_scale_1 = widened(gradient) / site.module.scaling[site.adapter]
        gradients = _without_memory(pair)._replace(**{field: as_matrix(at_scale_1)})
        sink(flat(products_of(_OPS, gradients, columns)), gradient)

    installed = LoraPair(*(nn.Parameter(as_kept(x.to(y.dtype), y)) for x, y in zip(pair, before, strict=True)))
    for parameter, field in zip(installed, Factors._fields, strict=True):
        parameter.register_post_accumulate_grad_hook(partial(take, field=field))
    set_factors(site.module, site.adapter, installed)
    try:
        yield
    finally:
        set_factors(site.module, site.adapter, before)


def _without_memory(pair: Factors) -> Factors:
    """Return zeros in the shapes of a pair, as matrices, float32 or wider."""
    return Factors(*(widened(x.detach().new_zeros(())).expand(as_matrix(x).shape) for x in pair))
