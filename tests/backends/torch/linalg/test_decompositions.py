"""The decompositions and products for a GPU, run on the CPU: the functions do not depend on the device."""

from functools import partial

import numpy as np
import pytest
import torch

from lora_one.backends.torch import ops
from lora_one.backends.torch.linalg.decompositions import cholesky_qr, on_host, solve_by_triangles, svdvals
from lora_one.backends.torch.linalg.wide import in_parts, product_over_rows, times_few_columns

EPS = torch.finfo(torch.float32).eps


def stack() -> dict[str, torch.Tensor]:
    """Matrices of 300 x 12, float32, whose QRs are more and more difficult."""
    x = torch.randn(8, 300, 12, generator=torch.Generator().manual_seed(0))
    graded = x[1] * torch.logspace(0, -6, 12)
    repeated = x[2].clone()
    repeated[:, 7] = repeated[:, 3]
    return {
        "well": x[0],
        "graded": graded,
        "repeated column": repeated,
        "zero column": x[3] * (torch.arange(12) != 5),
        "zero": torch.zeros(300, 12),
        "huge": x[4] * 1e30,
        "tiny": x[5] * 1e-30,
        "nearly of rank one": x[6, :, :1] + 1e-7 * x[7],
    }


def test_qr_of_a_stack_is_one_of_each_matrix_whatever_its_rank():
    names, x = list(stack()), torch.stack(list(stack().values()))
    q, r = cholesky_qr(x)
    for name, *its in zip(names, q.double(), r.double(), x.double(), strict=True):
        basis, triangle, matrix = its
        assert (basis.mT @ basis - torch.eye(12)).abs().max() <= 20 * EPS, name
        assert (basis @ triangle - matrix).abs().max() <= 40 * EPS * matrix.abs().max(), name
        assert not triangle.tril(-1).any(), name


def test_what_is_decomposed_on_the_host_is_as_if_one_by_one_and_leaves_the_threads():
    x = torch.randn(3, 5, 30, 20, dtype=torch.float64)
    threads = torch.get_num_threads()
    thin = partial(torch.linalg.svd, full_matrices=False)
    u, s, vt = on_host(thin, x)
    assert torch.get_num_threads() == threads
    assert u.shape == (3, 5, 30, 20) and s.shape == (3, 5, 20) and vt.shape == (3, 5, 20, 20)
    for i, j in np.ndindex(3, 5):
        torch.testing.assert_close(s[i, j], thin(x[i, j])[1])
        torch.testing.assert_close((u[i, j] * s[i, j]) @ vt[i, j], x[i, j])
    alone = on_host(torch.linalg.qr, x[0, 0])
    torch.testing.assert_close(alone[0] @ alone[1], x[0, 0])


@pytest.mark.parametrize("shape", [(20, 30), (3, 5, 30, 20)])
def test_singular_values_alone_are_those_of_the_svd(shape):
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(svdvals(x), torch.linalg.svd(x).S)


def test_two_triangles_solve_what_cholesky_solve_does():
    factors = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    gram = factors @ factors.mT + torch.eye(6)
    rhs = torch.randn(2, 4, 6, 3, dtype=torch.float64)
    lower = torch.linalg.cholesky(gram)
    torch.testing.assert_close(solve_by_triangles(rhs, lower), torch.cholesky_solve(rhs, lower))


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_three_parts_of_bfloat16_are_a_float32(scale):
    x = torch.randn(50, 8) * scale
    parts = in_parts(x).float().unflatten(1, (3, 8))  # (50, 3, 8)
    assert parts.shape == (50, 3, 8)
    assert torch.equal(parts.sum(1, dtype=torch.float64).float(), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_products_of_narrow_floats_are_those_of_their_wide_copies(dtype):
    wide = torch.promote_types(dtype, torch.float32)
    dy, x = torch.randn(40, 12).to(dtype), torch.randn(40, 20).to(dtype)
    v = torch.randn(20, 3, dtype=wide)
    expected = dy.double(), x.double(), v.double()
    pairs = [
        (product_over_rows(dy, x), expected[0].mT @ expected[1]),
        (times_few_columns(x, v), expected[1] @ expected[2]),
        (times_few_columns(x[None], v[None])[0], expected[1] @ expected[2]),
        (ops.matmul(x, v), expected[1] @ expected[2]),
        (ops.matmul(x[None], v[None])[0], expected[1] @ expected[2]),
    ]
    for got, want in pairs:
        assert got.dtype == wide
        assert (got - want).abs().max() <= 40 * torch.finfo(wide).eps * want.abs().max()
