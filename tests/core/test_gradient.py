"""A gradient left as the product of its rows is the gradient: in products, in its norm, in its spectrum."""

import numpy as np
import pytest

from lora_one.core.exact import exact_spectrum
from lora_one.core.gradient import (
    RowProduct,
    arrays_of,
    as_matrix,
    frobenius_norm,
    norm_of_rows,
    times,
    transposed_times,
)
from tests.arrays import best_rank


def rows(tokens: int, out: int, inputs: int, decay: float = 0.8) -> tuple[np.ndarray, np.ndarray]:
    """dy (T, out) and x (T, in), of tokens that weigh less and less."""
    rng = np.random.default_rng(0)
    weights = decay ** np.arange(tokens)[:, None]
    return rng.standard_normal((tokens, out)) * weights, rng.standard_normal((tokens, inputs))


def test_products_and_norm_are_those_of_the_matrix(arrays):
    dy, x = rows(7, 30, 20, decay=1.0)
    g, rng = dy.T @ x, np.random.default_rng(1)
    v, q = rng.standard_normal((20, 3)), rng.standard_normal((30, 3))
    product = RowProduct(arrays.of(dy), arrays.of(x))
    assert product.shape == (30, 20) and [a.shape for a in arrays_of(product)] == [(7, 30), (7, 20)]
    arrays.assert_close(as_matrix(arrays.ops, product), g)
    for gradient in (product, arrays.of(g)):
        arrays.assert_close(times(arrays.ops, gradient, arrays.of(v)), g @ v)
        arrays.assert_close(transposed_times(arrays.ops, gradient, arrays.of(q)), g.T @ q)
    arrays.assert_close(frobenius_norm(arrays.ops, arrays.of(g), arrays.of(2.0)), np.asarray(np.linalg.norm(g)))
    norm, share = norm_of_rows(arrays.ops, product)
    arrays.assert_close(norm, np.asarray(np.linalg.norm(g)))
    terms = (dy @ dy.T) * (x @ x.T)
    arrays.assert_close(share, np.sum(terms) / np.sum(np.abs(terms)))


@pytest.mark.parametrize("scales", [(1e-25, 1e-6), (1e25, 1e6), (1e-25, 1e25)])
def test_the_norm_neither_overflows_nor_vanishes(arrays, scales):
    dy, x = rows(7, 30, 20)
    product = RowProduct(arrays.of(dy * scales[0]), arrays.of(x * scales[1]))
    expected = np.linalg.norm(dy.T @ x) * scales[0] * scales[1]
    arrays.assert_close(norm_of_rows(arrays.ops, product)[0], np.asarray(expected))


def test_both_factors_together_are_to_have_fewer_entries_than_g():
    assert RowProduct(np.ones((11, 30)), np.ones((11, 20))).is_smaller  # 550 of 600
    assert not RowProduct(np.ones((12, 30)), np.ones((12, 20))).is_smaller


def test_the_spectrum_is_that_of_the_matrix_and_nothing_is_multiplied_out(arrays, monkeypatch):
    dy, x = rows(60, 330, 320)
    g = dy.T @ x
    product = RowProduct(arrays.of(dy), arrays.of(x))
    monkeypatch.setattr("lora_one.core.exact.as_matrix", lambda *_: pytest.fail("multiplied out"))
    spectrum = exact_spectrum(arrays.ops, product, 4)
    u, s, vt = (arrays.numpy(part) for part in spectrum[:3])
    arrays.assert_close((u * s) @ vt, -best_rank(g, 4))
    arrays.assert_close(spectrum.s, np.linalg.svd(g, compute_uv=False)[:4])
    arrays.assert_close(spectrum.norm, np.asarray(np.linalg.norm(g)))
    assert arrays.numpy(spectrum.norm_error) == arrays.numpy(spectrum.unseen) == 0


def test_rows_that_all_but_cancel_are_multiplied_out_first(arrays, monkeypatch):
    """A large mean of x, which dy's sum of zero takes out of G: by way of the rows float32 gets a norm 0.8 % off."""
    dy, x = rows(60, 330, 320)
    dy, x = arrays.of(dy - dy.mean(axis=0)), arrays.of(x + 300.0)
    g = arrays.numpy(dy).T @ arrays.numpy(x)
    monkeypatch.setattr("lora_one.core.exact.thin_svd", lambda *_: pytest.fail("a dense SVD"))
    spectrum = exact_spectrum(arrays.ops, RowProduct(dy, x), 4)
    arrays.assert_close(spectrum.s, np.linalg.svd(g, compute_uv=False)[:4])
    arrays.assert_close(spectrum.norm, np.asarray(np.linalg.norm(g)))


@pytest.mark.parametrize("shape", [(30, 20), (330, 320)])
def test_where_products_do_not_do_and_where_all_is_zero(arrays, shape):
    """Flat: the dense SVD of the matrix. Zero: the spectrum of zero."""
    dy, x = np.linalg.qr(np.random.default_rng(0).standard_normal((shape[0], 9)))[0].T, np.eye(9, shape[1])
    flat = exact_spectrum(arrays.ops, RowProduct(arrays.of(dy), arrays.of(x)), 4)
    arrays.assert_close(flat.s, np.ones(4))
    zero = exact_spectrum(arrays.ops, RowProduct(arrays.of(0.0 * dy), arrays.of(x)), 4)
    assert not arrays.numpy(zero.s).any() and arrays.numpy(zero.norm) == 0.0
