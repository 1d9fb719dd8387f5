"""QR, SVD and solving on a GPU, whose libraries are slow at many small matrices, and in parts inexact.

On an H100 (torch 2.11, float32) cuSOLVER's QR of 32 matrices of 4096 x 24 takes 5.9 ms, one after the other, and what
is here 0.3; its SVD of 96 x 96 takes 1.8 ms, with vectors that are orthonormal to several times what LAPACK's are, and
LAPACK's on the host 0.8. MAGMA's Cholesky solver cannot be captured in a CUDA graph.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

WORKERS = os.cpu_count() or 1
SMALL = 1024  # rows and columns that LAPACK decomposes on the host
TALL = 4  # rows a column from where on a QR is by its Gram matrix
ORTHONORMAL = 0.1  # how far Q^T Q may be from the identity for one more Cholesky factor to make it exact


def qr(x: Tensor) -> tuple[Tensor, Tensor]:
    """Reduced QR of (..., rows, k) on a GPU."""
    rows, k = x.shape[-2:]
    many = x.ndim > 2 and x.dtype == torch.float32 and not torch.compiler.is_compiling()
    if many and rows >= TALL * k:
        return cholesky_qr(x)
    q, r = on_host(torch.linalg.qr, x) if many and rows <= SMALL else torch.linalg.qr(x)
    return q, r


def svd(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD of (..., m, n) on a GPU."""
    if torch.compiler.is_compiling() or max(x.shape[-2:]) > SMALL:
        u, s, vt = torch.linalg.svd(x, full_matrices=False, driver="gesvd")  # not Jacobi's, which is less exact
    else:
        u, s, vt = on_host(partial(torch.linalg.svd, full_matrices=False), x)
    return u, s, vt


def svdvals(x: Tensor) -> Tensor:
    """Of (..., m, n) on a GPU."""
    if torch.compiler.is_compiling() or max(x.shape[-2:]) > SMALL:
        return torch.linalg.svdvals(x, driver="gesvd")
    [s] = on_host(lambda part: [torch.linalg.svdvals(part)], x)
    return s


def solve_by_triangles(rhs: Tensor, lower: Tensor) -> Tensor:
    """X with L L^T X = rhs, by cuBLAS; as torch.cholesky_solve."""
    y = torch.linalg.solve_triangular(lower, rhs, upper=False)
    return torch.linalg.solve_triangular(lower.mT, y, upper=True)


def cholesky_qr(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of a stack (..., rows, k), float32: by Cholesky factors of the Gram matrices, in float64, twice.

    A Gram squares the condition number, and float64 has the digits for it up to 10^7; matrices beyond that, as
    rank-deficient ones are, go through Householder's QR one by one.
    """
    identity = torch.eye(x.shape[-1], dtype=torch.float64, device=x.device)
    q = x.double()
    r, info = _cholesky(q.mT @ q)
    q = q @ _inverse(r, identity)
    gram = q.mT @ q
    more, info_of_more = _cholesky(gram)
    q, r = (q @ _inverse(more, identity)).to(x.dtype), (more @ r).to(x.dtype)
    exact = ((gram - identity).abs().amax(dim=(-2, -1)) < ORTHONORMAL) & (info == 0) & (info_of_more == 0)
    if not bool(exact.all()):  # the one wait for the device
        rest = ~exact
        q[rest], r[rest] = torch.linalg.qr(x[rest])
    return q, r


def _cholesky(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Upper triangular R with R^T R = gram, and where that failed."""
    lower, info = torch.linalg.cholesky_ex(gram)
    return lower.mT, info


def _inverse(upper: Tensor, identity: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(upper, identity.expand_as(upper), upper=True)


def on_host(decompose: Callable[[Tensor], Any], x: Tensor) -> list[Tensor]:
    """LAPACK uses one thread for a small matrix: the matrices of a stack take several."""
    here = x.cpu()
    if here.ndim == 2:
        return [part.to(x.device) for part in decompose(here)]
    stack = here.flatten(0, -3)
    before = torch.get_num_threads()
    try:
        parts = list(_workers().map(decompose, stack.tensor_split(min(WORKERS, stack.shape[0]))))
    finally:
        torch.set_num_threads(before)
    return [torch.cat(side).unflatten(0, x.shape[:-2]).to(x.device) for side in zip(*parts, strict=True)]


@cache
def _workers() -> ThreadPoolExecutor:
    """Each with one thread of BLAS: they would wait for each other's."""
    return ThreadPoolExecutor(WORKERS, initializer=torch.set_num_threads, initargs=(1,))
