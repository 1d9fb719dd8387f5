"""The rows dy, (T, out), and x, (T, in), whose product dy^T x is the gradient of a layer's weight, by kind of layer.

Those of a linear layer are its dL/dy and input. An embedding's x is one-hot and stays sparse; so G, (dim, tokens), is
never formed. A convolution's x is its patches. There are as many as output positions, often more than G has rows: then
G itself and an identity take their place, since I^T G = G too.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_one.backends.torch.attachment.kinds import CONVOLUTIONS
from lora_one.backends.torch.linalg.precision import widened
from lora_one.backends.torch.linalg.wide import product_over_rows

Rows = tuple[Tensor, Tensor]


def rows_of(base: Any) -> Callable[[Tensor, Tensor], Rows]:
    """Return a function of dL/dy and of the input of a layer without LoRA, that returns their rows."""
    if isinstance(base, nn.Embedding):
        return partial(_of_lookup, base)
    return partial(_of_convolution, base) if isinstance(base, CONVOLUTIONS) else _of_product


def _of_product(dy: Tensor, x: Tensor) -> Rows:
    return dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])


def _of_lookup(base: Any, dy: Tensor, tokens: Tensor) -> Rows:
    dy, tokens = dy.reshape(-1, dy.shape[-1]), tokens.reshape(-1)
    if base.padding_idx is not None:  # gets no gradient, as in PyTorch
        is_text = tokens != base.padding_idx
        dy, tokens = dy[is_text], tokens[is_text]
    scale = getattr(base, "embed_scale", None)  # Gemma's: the layer multiplies what it looks up, PEFT's LoRA too
    dy = dy if scale is None else dy * scale
    ones = widened(dy.new_ones(len(tokens)))
    places = torch.stack([torch.arange(len(tokens), device=tokens.device), tokens.long()])
    shape = len(tokens), base.num_embeddings
    one_hot = torch.sparse_coo_tensor(places, ones, shape, check_invariants=False, is_coalesced=True)
    return dy, one_hot


def _of_convolution(base: Any, dy: Tensor, x: Tensor) -> Rows:
    axes = len(base.kernel_size)
    if dy.ndim == axes + 1:  # an input without a batch axis
        dy, x = dy[None], x[None]
    if dy[:, 0].numel() <= dy.shape[1]:
        return _patches(base, dy, x)
    # One example after the other: the patches of all may be many times as large as x.
    g = sum(product_over_rows(*_patches(base, dy[i : i + 1], x[i : i + 1])) for i in range(len(dy)))  # (out, in * size)
    assert isinstance(g, Tensor)
    return torch.eye(len(g), dtype=g.dtype, device=g.device), g


def _patches(base: Any, dy: Tensor, x: Tensor) -> Rows:
    """Return dy by position, (positions, out), and the patches, (positions, in * size)."""
    x = functional.pad(x, base._reversed_padding_repeated_twice)  # for "same" too, as the layer itself does
    for axis, (size, stride) in enumerate(zip(base.kernel_size, base.stride, strict=True)):
        x = x.unfold(axis + 2, size, stride)  # (n, in, positions..., size...)
    axes = len(base.kernel_size)
    x = x.permute(0, *range(2, 2 + axes), 1, *range(2 + axes, 2 + 2 * axes))  # (n, positions..., in, size...)
    return dy.movedim(1, -1).flatten(0, axes), x.flatten(axes + 1).flatten(0, axes)
