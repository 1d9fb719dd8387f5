import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_one.backends.jax import ops
from lora_one.core import step
from lora_one.core.alignment import captured_energy, principal_sines
from lora_one.core.exact import exact_spectrum
from lora_one.core.factors import Factors, normalized_factors
from lora_one.core.fold import finish_fold, fold, read_both_sides, start_fold
from lora_one.core.omega import draw_omega
from lora_one.core.precondition import precondition
from lora_one.core.sides import Products
from tests.arrays import best_rank, spectrum_matrix
from tests.backends.jax.models import counted_compilations

G = spectrum_matrix(12, 9, 0.6 ** np.arange(9))


def whole_start(g, omega, test):
    """A batch, a pass that reads both sides, and the factors, with a matrix in the place of a model."""
    state = fold(ops, start_fold(ops, omega, g.shape[0], test), g)
    state = read_both_sides(ops, state, Products(ops.matmul(g, state.v), ops.matmul(g.T, state.u)))
    return normalized_factors(ops, finish_fold(ops, state, 3), 128.0)


def test_the_whole_initialisation_traces_and_equals_the_definition():
    arrays = (
        jnp.asarray(x, jnp.float32) for x in (G, draw_omega(0, "layer", 9, 6), draw_omega(0, "layer, test", 9, 8))
    )
    factors = jax.jit(whole_start)(*arrays)
    expected = -best_rank(G, 3) / np.linalg.norm(G, 2) / 128
    np.testing.assert_allclose(ops.matmul(factors.lora_B, factors.lora_A), expected, atol=1e-5 * np.abs(expected).max())


def test_exact_spectrum_alignment_and_step_trace():
    rng = np.random.default_rng(0)
    pair = Factors(rng.standard_normal((3, 9)), rng.standard_normal((12, 3)))
    gradient = Factors(rng.standard_normal((3, 9)), rng.standard_normal((12, 3)))

    @jax.jit
    def run(g, pair, gradient):
        factors = normalized_factors(ops, exact_spectrum(ops, g, 3), 128.0)
        angle = principal_sines(ops, factors.lora_B, pair.lora_B)[0]
        new, _ = step.adamw(ops, pair, gradient, step.start_pair(ops, pair), 1e-2, reg=1e-3)
        return captured_energy(ops, g, factors), angle, new, precondition(ops, pair, gradient, 1e-3)

    narrow = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (G, pair, gradient))
    energy, _, new, direction = run(*narrow)
    s = np.linalg.svd(G, compute_uv=False)
    assert float(energy) == pytest.approx(np.sum(s[:3] ** 2) / np.sum(s**2), abs=1e-5)
    inverse = np.linalg.inv(pair.lora_B.T @ pair.lora_B + 1e-3 * np.eye(3))
    np.testing.assert_allclose(direction.lora_A, inverse @ gradient.lora_A, atol=1e-4)
    np.testing.assert_allclose(new.lora_A, pair.lora_A - 1e-2 * np.sign(direction.lora_A), atol=1e-5)


def test_products_ask_for_the_highest_precision_and_leave_the_users_flags():
    before = jax.config.jax_default_matmul_precision
    x = jnp.ones((4, 9))
    [dot] = [eqn for eqn in jax.make_jaxpr(ops.matmul)(x, x.T).eqns if eqn.primitive.name == "dot_general"]
    assert dot.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2
    assert jax.config.jax_default_matmul_precision == before


@pytest.mark.parametrize("terms", [0, 1, 8, 9])
def test_products_of_few_terms_are_the_same_products(terms):
    """Spelt out to 8 terms, with stacks on either side, and never for dtypes whose sums must be wider."""
    rng = np.random.default_rng(0)
    for left, right in (((5, terms), (terms, 7)), ((2, 5, terms), (terms, 7)), ((2, 5, terms), (2, terms, 7))):
        a, b = rng.standard_normal(left), rng.standard_normal(right)
        got = ops.matmul(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))
        np.testing.assert_allclose(got, a @ b, rtol=1e-5, atol=1e-6)
        assert "dot_general" in str(
            jax.make_jaxpr(ops.matmul)(jnp.asarray(a, jnp.bfloat16), jnp.asarray(b, jnp.bfloat16))
        )


def test_another_layer_of_a_shape_compiles_nothing():
    rng = np.random.default_rng(0)
    with counted_compilations() as found:
        for number in range(2):
            before = len(found)
            whole_start(*(jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((13, 10), (10, 5), (10, 8))))
            assert (len(found) > before) == (number == 0)


def test_asarray_takes_the_dtype_of_like_and_never_promotes():
    for dtype in (jnp.float32, jnp.bfloat16):
        assert ops.asarray(np.ones(2, np.float64), like=jnp.zeros((), dtype)).dtype == dtype
    with jax.enable_x64(True):
        like = jnp.zeros((), jnp.float32)
        assert ops.asarray(np.ones(2, np.float64), like=like).dtype == jnp.float32
        assert ops.matmul(ops.eye(2, like), ops.asarray(np.ones((2, 2)), like)).dtype == jnp.float32


def test_to_numpy_widens_what_numpy_lacks_and_copies():
    x = jnp.asarray([1.0, 2.5], jnp.bfloat16)
    host = ops.to_numpy(x)
    assert host.dtype == np.float32
    host[0] = 9
    assert x[0] == 1
    assert ops.to_numpy(jnp.zeros((), bool)).dtype == bool


@pytest.mark.parametrize("r", [4, 40])  # from 17 on a CPU solves one after the other
@pytest.mark.parametrize("batch", [(2,), (5,), (2, 3)])
def test_batches_are_solved_as_their_matrices_are(batch, r):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((*batch, 2 * r, r))
    gram, rhs = np.swapaxes(x, -1, -2) @ x, rng.standard_normal((r, 3))
    gram[..., -1, :, :] *= 1.0 if batch == (2,) else -1.0  # not positive definite: NaN, and the others as they are
    for solve in (ops.cholesky_solve, jax.jit(ops.cholesky_solve)):
        got = np.asarray(solve(jnp.asarray(gram, jnp.float32), jnp.asarray(rhs, jnp.float32)))
        expected = np.linalg.solve(gram, np.broadcast_to(rhs, (*batch, r, 3)))
        if batch != (2,):
            assert np.isnan(got[..., -1, :, :]).all()
            got, expected = got[..., :-1, :, :], expected[..., :-1, :, :]
        np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max())


def test_a_cholesky_that_fails_is_nan_under_jit_and_leaves_its_neighbours():
    gram = jnp.stack([jnp.diag(jnp.array([1.0, -1.0])), 2 * jnp.eye(2)])
    got = jax.jit(ops.cholesky_solve)(gram, jnp.eye(2))
    assert np.isnan(got[0]).all()
    np.testing.assert_allclose(got[1], np.eye(2) / 2)
