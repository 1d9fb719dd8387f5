"""A tap forms a product of a layer's weight gradient G, even where the weight is frozen or quantised.

A tap leaves the layer's output as it is. In the backward pass it sees dL/dy beside x. From these it forms
G = sum over tokens of dL/dy x^T, or only a few products with G: G V = dL/dy^T (x V) and G^T U = x^T (dL/dy U).

LoRA's own backward pass forms the same products if its factors multiply to zero. But it also computes an output and a
share of dL/dx that are zero, and it keeps a float32 copy of a narrower x. Or it hands on dy and x themselves.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora_one.backends.torch.linalg.precision import full_precision, widened
from lora_one.backends.torch.linalg.wide import product_over_rows
from lora_one.backends.torch.ops import TorchOps
from lora_one.core.gradient import RowProduct
from lora_one.core.sides import Products, Sides, products_with

from .layer_rows import rows_of

_OPS = TorchOps()

Sink = Callable[[Any, Tensor], None]


# What to form of dy, (tokens, out), and x, (tokens, in), in the model's dtype: linear in G, in float32 or wider.
Product = Callable[[Tensor, Tensor], Any]

WHOLE: Product = product_over_rows  # G, (out, in)
NARROW_ROWS: Product = RowProduct  # G, not multiplied out, and in the model's own dtype


def rows(dy: Tensor, x: Tensor) -> RowProduct:
    """Return G, not multiplied out; of an embedding as a matrix, since few functions take its sparse x."""
    return WHOLE(dy, x) if x.is_sparse else RowProduct(widened(dy), widened(x))


def of_no_token(product: Product, out_features: int, in_features: int, like: Tensor) -> Tensor:
    """Return the product of a layer that no token has reached."""
    zero: Tensor = product(like.new_zeros(0, out_features), like.new_zeros(0, in_features))
    return zero


def whole(product: RowProduct) -> Tensor:
    """Return G, (out, in)."""
    with full_precision(product.dy.device):
        g: Tensor = WHOLE(*product)
    return g


def product_of(sides: Sides) -> Product:
    """Return the products with G in these directions, as one flat tensor: see `flat` and `from_flat`."""
    return lambda dy, x: flat(products_with(_OPS, RowProduct(dy, x), sides))


def flat(products: Products) -> Tensor:
    """Return both products in one tensor, so that sums need not know what it holds."""
    return torch.cat([x.reshape(-1) for x in products])


def from_flat(x: Tensor, sides: Sides) -> Products:
    """Return the products that `flat` joined."""
    (in_features, p), (out_features, q) = (directions.shape for directions in sides)
    g_right, g_left = x.split([out_features * p, in_features * q])
    return Products(g_right.view(out_features, p), g_left.view(in_features, q))


class _Keep(torch.autograd.Function):
    """A separate node that keeps x, without a copy, before the layer runs.

    If the layer is the last of a block, recomputing the block ends here, without the layer.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return anchor.view_as(anchor)


@contextmanager
def tap(
    layer: nn.Module, base: nn.Module, product: Product, sink: Sink, on_call: Callable[[bool], None]
) -> Iterator[None]:
    """Temporarily reduce a LoRA layer to its base, and form a product of G for each of its calls.

    Args:
        layer: the LoRA layer of PEFT.
        base: its base layer, which computes y from its first argument x, as `rows_of` knows it. Nothing in it has to
            require a gradient.
        product: `WHOLE`, `rows`, `NARROW_ROWS`, or a result of `product_of`.
        sink: gets the product and dL/dy in the backward pass: once per call that the loss depends on.
        on_call: gets whether a graph is recorded, at each forward pass that is not a repetition by checkpointing.
    """
    forward_before, as_rows = vars(layer).get("forward"), rows_of(base)

    @torch.compiler.disable  # it can trace neither the node's saved tensors nor the sink
    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        records = torch.is_grad_enabled()
        if torch._C._current_graph_task_id() == -1:  # outside of any backward pass
            on_call(records)
        if not records:
            return base(x, *args, **kwargs)
        # Without a tensor that requires a gradient there is no graph, and below the first tapped layer none does.
        anchor = torch.zeros((), device=x.device, requires_grad=True)
        # The node's output, not only the node: a node frees what it saved when its last output is gone.
        keepers = [_Keep.apply(x, anchor)]
        y = base(x, *args, **kwargs)

        def form(dy: Tensor) -> None:
            (kept,) = keepers[0].grad_fn.saved_tensors
            if not torch.is_grad_enabled():  # otherwise this graph may run backward again
                keepers.clear()
            with full_precision(dy.device):
                formed = product(*as_rows(dy, kept))
            sink(formed, dy)

        y = y if y.requires_grad else y + anchor
        y.register_hook(form)  # not a node of ours: its output would be a view, and the model may change y in place
        return y

    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward
        if forward_before is not None:
            layer.forward = forward_before
