"""QR, SVD and solving on a GPU, whose own libraries are slow at many small matrices and partly inexact.

On an H100 (torch 2.11, float32) cuSOLVER factors 32 matrices of 4096 x 24 one after the other in 5.9 ms; the QR here
takes 0.3 ms. Its SVD of a 96 x 96 matrix takes 1.8 ms, and the vectors are several times less orthonormal than
LAPACK's; LAPACK on the host takes 0.8 ms. MAGMA's Cholesky solver cannot be captured in a CUDA graph.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial

import torch
from torch import Tensor

THREADS = os.cpu_count() or 1
MAX_ON_HOST = 1024  # the most rows or columns of a matrix that LAPACK decomposes on the host
ROWS_PER_COLUMN = 4  # from this ratio on the QR uses the Gram matrix
MAX_GRAM_ERROR = 0.1  # the largest |Q^T Q - I| that one more Cholesky factor removes


def qr(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the reduced QR of (..., rows, k) on a GPU."""
    rows, k = x.shape[-2:]
    is_stack = x.ndim > 2 and x.dtype == torch.float32 and not torch.compiler.is_compiling()
    if is_stack and rows >= ROWS_PER_COLUMN * k:
        return cholesky_qr(x)
    q, r = on_host(torch.linalg.qr, x) if is_stack and rows <= MAX_ON_HOST else torch.linalg.qr(x)
    return q, r


def svd(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the thin SVD of (..., m, n) on a GPU."""
    if torch.compiler.is_compiling() or max(x.shape[-2:]) > MAX_ON_HOST:
        u, s, vt = torch.linalg.svd(x, full_matrices=False, driver="gesvd")  # the default, Jacobi's, is less exact
    else:
        u, s, vt = on_host(partial(torch.linalg.svd, full_matrices=False), x)
    return u, s, vt


def svdvals(x: Tensor) -> Tensor:
    """Return the singular values of (..., m, n) on a GPU."""
    if torch.compiler.is_compiling() or max(x.shape[-2:]) > MAX_ON_HOST:
        return torch.linalg.svdvals(x, driver="gesvd")
    [s] = on_host(lambda part: [torch.linalg.svdvals(part)], x)
    return s


def solve_by_triangles(rhs: Tensor, lower: Tensor) -> Tensor:
    """Return X with L L^T X = rhs, as torch.cholesky_solve does, but by cuBLAS."""
    y = torch.linalg.solve_triangular(lower, rhs, upper=False)
    return torch.linalg.solve_triangular(lower.mT, y, upper=True)


def cholesky_qr(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the QR of a float32 stack (..., rows, k), by Cholesky factors of its Gram matrices, in float64, twice.

    A Gram matrix squares the condition number, and float64 has enough digits for that up to 10^7. Matrices beyond that,
    such as rank-deficient ones, go through Householder's QR one by one.
    """
    identity = torch.eye(x.shape[-1], dtype=torch.float64, device=x.device)
    q = x.double()
    r, info = _cholesky(q.mT @ q)
    q = q @ _inverse(r, identity)
    gram = q.mT @ q
    correction, info_of_correction = _cholesky(gram)
    q, r = (q @ _inverse(correction, identity)).to(x.dtype), (correction @ r).to(x.dtype)
    exact = (gram - identity).abs().amax(dim=(-2, -1)) < MAX_GRAM_ERROR
    exact &= (info == 0) & (info_of_correction == 0)
    if not bool(exact.all()):  # the only wait for the device
        inexact = ~exact
        q[inexact], r[inexact] = torch.linalg.qr(x[inexact])
    return q, r


def _cholesky(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return the upper triangular R with R^T R = gram, and a code that is not 0 where that failed."""
    lower, info = torch.linalg.cholesky_ex(gram)
    return lower.mT, info


def _inverse(upper: Tensor, identity: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(upper, identity.expand_as(upper), upper=True)


def on_host(decompose: Callable[[Tensor], Sequence[Tensor]], x: Tensor) -> list[Tensor]:
    """Decompose matrices (..., m, n) on the host, in several threads: LAPACK uses one thread for a small matrix."""
    on_cpu = x.cpu()
    if on_cpu.ndim == 2:
        return [part.to(x.device) for part in decompose(on_cpu)]
    stack = on_cpu.flatten(0, -3)
    threads_before = torch.get_num_threads()
    try:
        parts = list(_pool().map(decompose, stack.tensor_split(min(THREADS, stack.shape[0]))))
    finally:
        torch.set_num_threads(threads_before)
    return [torch.cat(factors).unflatten(0, x.shape[:-2]).to(x.device) for factors in zip(*parts, strict=True)]


@cache
def _pool() -> ThreadPoolExecutor:
    """Return threads that use one BLAS thread each: more would wait for each other."""
    return ThreadPoolExecutor(THREADS, initializer=torch.set_num_threads, initargs=(1,))
