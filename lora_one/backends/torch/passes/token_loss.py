"""Transformers' next-token loss, computed for some rows of logits at a time.

Besides the logits it needs memory only for their gradient, in their dtype, which the forward pass forms with the loss.
PyTorch's cross-entropy keeps the log-softmax of a float32 copy, its gradient, and that gradient in float32 and in the
logits' dtype. With 128,256 logits per token that is more than all other activations of a model.

In float16 the gradient is kept times a power of two, which the backward pass divides out. Otherwise, with the weight of
one token out of thousands, it would be below the dtype's range, whatever scale the loss has.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

CHUNK_BYTES = 2**24  # of logits in float32 that are processed at once
CHUNK_BYTES_ON_GPU = 2**26  # more, since each chunk costs launches


@contextmanager
def loss_by_rows(model: nn.Module) -> Iterator[None]:
    """Temporarily compute a model's own next-token loss by rows. Any other loss stays as it is.

    The gradient of the loss by rows cannot be differentiated again.
    """
    with ExitStack() as stack:
        for module in model.modules():
            if (
                isinstance(module, PreTrainedModel)
                and "_loss_function" not in vars(module)  # set by the user
                and LOSS_MAPPING.get(module.loss_type, ForCausalLMLoss) is ForCausalLMLoss
            ):
                module.loss_function = next_token_loss
                stack.callback(delattr, module, "_loss_function")
        yield


@torch.compiler.disable  # it would unroll the loop over rows
def next_token_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Return what `transformers.loss.loss_utils.ForCausalLMLoss` does, computed by rows.

    That is the mean over all labels that are not `ignore_index`, or their sum divided by `num_items_in_batch`.

    Args:
        logits: (batch, tokens, vocabulary).
        labels: (batch, tokens), each compared with the logits of the token before it.
        shift_labels: the same labels, each at the position of its logits.
    """
    if type(logits) is not Tensor or not (torch.is_grad_enabled() and logits.requires_grad):
        return ForCausalLMLoss(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs)
    if shift_labels is None:
        assert labels is not None
        shift_labels = functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    targets = shift_labels.reshape(-1).to(logits.device)
    count: Any = num_items_in_batch if num_items_in_batch is not None else (targets != ignore_index).sum()
    count = torch.as_tensor(count, device=logits.device)
    loss: Tensor = _CrossEntropy.apply(logits.view(-1, vocab_size), targets, ignore_index, count)
    return loss


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, ignore_index: int, count: Tensor) -> Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        counted = (targets != ignore_index)[:, None]  # (rows, 1)
        index, weights = targets.clamp(min=0)[:, None], counted.to(wide) / count
        unit = _unit(count) if logits.dtype == torch.float16 else None
        gradient, log_likelihood = torch.empty_like(logits), torch.empty_like(weights)
        rows = _rows_at_once(logits)
        for i in range(0, len(logits), rows):
            chunk = slice(i, i + rows)
            log_p = torch.log_softmax(logits[chunk], dim=1, dtype=wide)
            log_likelihood[chunk] = log_p.gather(1, index[chunk])
            p = log_p.exp_().mul_(weights[chunk])
            p.scatter_add_(1, index[chunk], -weights[chunk])
            gradient[chunk] = p if unit is None else p.mul_(unit)
        ctx.save_for_backward(gradient, unit)
        return -(log_likelihood.where(counted, 0.0) * weights).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None, None, None]:
        gradient, unit = ctx.saved_tensors
        if unit is None:
            return gradient.mul_(scale), None, None, None
        rows = _rows_at_once(gradient)
        for i in range(0, len(gradient), rows):
            chunk = slice(i, i + rows)
            gradient[chunk] = (
                gradient[chunk].float().mul_(scale / unit)
            )  # by itself this factor may be below float16's range
        return gradient, None, None, None


def _unit(count: Tensor) -> Tensor:
    """Return a power of two: 1 / count times it is at most 2^14, a quarter of float16's largest number."""
    _, exponent = torch.frexp(count.float())
    return torch.ldexp(torch.ones_like(count, dtype=torch.float32), exponent + 13)


def _rows_at_once(logits: Tensor) -> int:
    chunk_bytes = CHUNK_BYTES if logits.device.type == "cpu" else CHUNK_BYTES_ON_GPU
    return max(1, chunk_bytes // (4 * logits.shape[1]))
