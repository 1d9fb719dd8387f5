"""`lora_one.core.ops.Ops` on PyTorch tensors, on any device."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lora_one.core.ops import Ops

from .linalg import decompositions
from .linalg.narrow import narrow_matmul
from .linalg.precision import full_precision, widened
from .linalg.wide import times_few_columns


class TorchOps(Ops):
    """The array operations of `lora_one.core` on PyTorch tensors: see `lora_one.core.ops.Ops` for each method.

    Use it to call a function of `lora_one.core` on your own tensors. It has no state, and results stay on the device of
    their inputs. Products, QR, SVD and Cholesky have full float32 precision, whatever TF32 and autocast are set to. On
    a GPU, stacks of small matrices are decomposed together or on the host, which is faster there.

    >>> import torch
    >>> from lora_one.backends.torch import TorchOps
    >>> u, s, vt = TorchOps().svd(torch.diag(torch.tensor([3.0, 4.0])))
    >>> s
    tensor([4., 3.])
    """

    name = "torch"

    def asarray(self, x: np.ndarray, like: Tensor) -> Tensor:
        return torch.as_tensor(x).to(like.dtype).to(like.device)  # narrow before it moves

    def to_numpy(self, x: Tensor) -> np.ndarray:
        x = x.detach().cpu()
        return (x.float() if x.dtype in (torch.bfloat16, torch.float16) else x).numpy().copy()

    def astype(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype)

    def at_least_float32(self, x: Tensor) -> Tensor:
        return widened(x)

    def eps(self, x: Tensor) -> float:
        return torch.finfo(x.dtype).eps

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        with full_precision(a.device):
            if a.is_sparse:  # the rows of an embedding
                return torch.sparse.mm(a, b)
            if a.dtype != b.dtype:  # rows in the model's dtype times directions in float32
                return times_few_columns(a, b)
            return narrow_matmul(a, b)

    def matrix_transpose(self, x: Tensor) -> Tensor:
        return x.mT

    def qr(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with full_precision(x.device):
            q, r = decompositions.qr(x) if x.is_cuda else torch.linalg.qr(x)
            return q, r

    def svd(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with full_precision(x.device):
            u, s, vt = decompositions.svd(x) if x.is_cuda else torch.linalg.svd(x, full_matrices=False)
            return u, s, vt

    def svdvals(self, x: Tensor) -> Tensor:
        with full_precision(x.device):
            return decompositions.svdvals(x) if x.is_cuda else torch.linalg.svdvals(x)

    def cholesky_solve(self, gram: Tensor, rhs: Tensor) -> Tensor:
        with full_precision(gram.device):
            lower, info = torch.linalg.cholesky_ex(gram)
            rhs = rhs.expand(*gram.shape[:-2], *rhs.shape[-2:]) if rhs.ndim < gram.ndim else rhs
            solve = decompositions.solve_by_triangles if gram.is_cuda else torch.cholesky_solve
            solution = solve(rhs, lower)
        # cholesky_ex does not raise, which would cost a synchronisation. Where it fails it leaves a partial factor.
        return torch.where((info == 0)[..., None, None], solution, torch.nan)

    def eye(self, n: int, like: Tensor) -> Tensor:
        return torch.eye(n, device=like.device, dtype=like.dtype)

    def zeros(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        return torch.zeros(shape, device=like.device, dtype=like.dtype)

    def sqrt(self, x: Tensor) -> Tensor:
        return x.sqrt()

    def sum(self, x: Tensor, axis: int | None = None) -> Tensor:
        return x.sum() if axis is None else x.sum(dim=axis)

    def max(self, x: Tensor, axis: int | None = None) -> Tensor:
        return x.max() if axis is None else x.amax(dim=axis)

    def isfinite(self, x: Tensor) -> Tensor:
        return x.isfinite()

    def where(self, condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return torch.where(condition, x, y)

    def concat(self, xs: Sequence[Tensor], axis: int = 0) -> Tensor:
        return torch.cat(list(xs), dim=axis)

    def stack(self, xs: Sequence[Tensor], axis: int = 0) -> Tensor:
        return torch.stack(list(xs), dim=axis)
