"""A product of a linear layer's weight gradient, without asking the weight for it: it may be frozen or quantised.

A tap leaves the layer's output as it is. In the backward pass it sees dL/dy beside x, so that it can form
G = sum over tokens of dL/dy x^T, or, without forming that, a few of its products: G V = dL/dy^T (x V) and
Q^T G = (dL/dy Q)^T x. LoRA's own backward pass forms the same products of factors that multiply to zero, but around
them computes an output and a share of dL/dx that are zero too, and keeps a float32 copy of a narrower x.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_one.backends.torch.linalg.precision import full_precision, widened
from lora_one.backends.torch.linalg.wide import few_rows_times, product_over_rows, times_few_columns
from lora_one.core.gradient import RowProduct
from lora_one.core.sketch import Probe

Sink = Callable[[Any, Tensor], None]


class Product(NamedTuple):
    """A linear function of G = dy^T x, in two halves: what the backward pass needs of x, and what it makes of that.

    The arguments x, (tokens, in), and dy, (tokens, out), are in the model's dtype; results are float32 or wider.
    """

    keep: Callable[[Tensor], Tensor] | None  # x -> what is kept for the backward pass; None: x itself, not copied
    form: Callable[[Tensor, Tensor], Any]  # dy, what was kept -> the product

    def zero(self, out_features: int, in_features: int, like: Tensor) -> Tensor:
        """The product of a layer that no token has reached."""
        dy, x = like.new_zeros(0, out_features), like.new_zeros(0, in_features)
        return self.form(dy, x if self.keep is None else self.keep(x))


WHOLE = Product(None, product_over_rows)  # G, (out, in)
ROWS = Product(None, lambda dy, x: RowProduct(widened(dy), widened(x)))  # G, not multiplied out


def whole(product: RowProduct) -> Tensor:
    """G, (out, in)."""
    g: Tensor = _apply(WHOLE.form, *product)
    return g


def product_of(probe: Probe) -> Product:
    """The gradient of the factor that a probe leaves out."""
    if probe.side == "A":
        v = probe.factor.mT  # (in, k)
        return Product(lambda x: times_few_columns(x, v), lambda dy, xv: times_few_columns(dy.mT, xv))  # G V, (out, k)
    q = probe.factor  # (out, k)
    return Product(None, lambda dy, x: few_rows_times(times_few_columns(dy, q).mT, x))  # Q^T G, (k, in)


class _Keep(torch.autograd.Function):
    """A node of its own that keeps what a product needs of x, from before the layer runs: where that is a block's last,
    recomputing ends right here."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, product: Product) -> Tensor:
        ctx.save_for_backward(x if product.keep is None else _apply(product.keep, x))
        return anchor.view_as(anchor)


def _apply(function: Callable[..., Any], *xs: Tensor) -> Any:
    """A function of x (tokens, n), of tensors (..., n)."""
    with full_precision(xs[0].device):
        return function(*(x.reshape(-1, x.shape[-1]) for x in xs))


@contextmanager
def tap(
    layer: nn.Module, base: nn.Module, product: Product, sink: Sink, on_call: Callable[[bool], None]
) -> Iterator[None]:
    """For a while a LoRA layer is its base alone, and for each of its calls the backward pass hands `sink` a product of
    G.

    Args:
        layer: PEFT's.
        base: its own: computes y (..., out) from its first argument x (..., in); nothing in it needs to require a
            gradient.
        product: `WHOLE`, `ROWS`, or one of `product_of`.
        sink: called once a call of the layer that the loss depends on, with the product and dL/dy, (..., out).
        on_call: called at each forward pass, but not where checkpointing repeats one, with whether it records a graph.
    """
    found = vars(layer).get("forward")

    @torch.compiler.disable  # it would trace neither the node that is asked for what it keeps, nor the sink
    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        records = torch.is_grad_enabled()
        if torch._C._current_graph_task_id() == -1:  # outside of any backward pass
            on_call(records)
        if not records:
            return base(x, *args, **kwargs)
        # Something must require a gradient for the graph to exist, and where nothing below is tapped nothing does.
        anchor = torch.zeros((), device=x.device, requires_grad=True)
        # The node's output, and not the node alone: a node frees what it saved when its last output is gone.
        keepers = [_Keep.apply(x, anchor, product)]
        y = base(x, *args, **kwargs)

        def form(dy: Tensor) -> None:
            (kept,) = keepers[0].grad_fn.saved_tensors
            if not torch.is_grad_enabled():  # or this graph may be asked again
                keepers.clear()
            sink(_apply(product.form, dy, kept), dy)

        y = y if y.requires_grad else y + anchor
        y.register_hook(form)  # no node of ours, whose output would be a view: the model may change y in place
        return y

    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward
        if found is not None:
            layer.forward = found
