"""A tap on a parameter that holds the weights of all experts of a layer: it reads the gradient of each of them.

PEFT computes with W + s B A in place of such a parameter. During a pass W itself takes this place, in a node of the
graph that gets dL/dW, (experts, ., .), as it is needed in any case.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lora_one.backends.torch.attachment.attach import Site
from lora_one.backends.torch.linalg.precision import full_precision

from .tap import Product, Sink


class Expert(NamedTuple):
    """One expert of a tapped parameter: see `tap` for the fields."""

    site: Site
    product: Product
    sink: Sink
    on_call: Callable[[bool], None]


@contextmanager
def tap_experts(module: Any, experts: Sequence[Expert]) -> Iterator[None]:
    """Temporarily let a layer of PEFT compute with W, and form a product of the gradient of each of its experts.

    An expert that no token has reached gets no product.

    Args:
        module: PEFT's layer around the parameter.
        experts: those whose gradients are read.
    """

    def take(gradient: Tensor) -> None:
        gradient = gradient if module._did_swap_in_out_features else gradient.mT  # (experts, out, in)
        reached = gradient.flatten(1).any(1).tolist()
        for expert in experts:
            assert expert.site.expert is not None
            g = gradient[expert.site.expert]
            if reached[expert.site.expert]:
                with full_precision(g.device):
                    formed = expert.product(*_as_rows(g))
                expert.sink(formed, g)

    @contextmanager
    def activate(_: Any) -> Iterator[None]:
        records = torch.is_grad_enabled()
        if torch._C._current_graph_task_id() == -1:  # outside of any backward pass
            for expert in experts:
                expert.on_call(records)
        if not records:
            yield
            return
        parametrize.register_parametrization(module.get_base_layer(), module.parameter_name, _Watched(take))
        try:
            with parametrize.cached():
                yield
        finally:
            module._remove_parametrizations()

    module._activate_lora = activate
    try:
        yield
    finally:
        del module._activate_lora


def _as_rows(g: Tensor) -> tuple[Tensor, Tensor]:
    """Return dy and x whose product dy^T x is G, (out, in)."""
    identity = torch.eye(min(g.shape), dtype=g.dtype, device=g.device)
    return (identity, g) if g.shape[0] <= g.shape[1] else (g.mT, identity)


class _Watched(nn.Module):
    """The parametrization that returns a weight as it is, and hands its gradient on."""

    def __init__(self, take: Callable[[Tensor], None]):
        super().__init__()
        self._take = take

    def forward(self, weight: Tensor) -> Tensor:
        anchor = torch.zeros((), device=weight.device, requires_grad=True)  # without it there would be no graph
        watched: Tensor = _Watch.apply(weight.detach(), anchor, self._take)
        return watched


class _Watch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, anchor: Tensor, take: Callable[[Tensor], None]) -> Tensor:
        ctx.take = take
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        ctx.take(gradient)
        return None, None, None
