"""Identities that hold for any input: of the mathematics (orthogonal maps, scale), and of a mean over batches (order of
batches and layers, batches split)."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_one
from lora_one.backends.numpy import ops
from lora_one.core.exact import exact_spectrum
from lora_one.core.factors import Factors, normalized_factors
from lora_one.core.fold import FoldState, finish_fold, fold, of_mean, read_both_sides, start_fold
from lora_one.core.gradient import Gradient, RowProduct
from lora_one.core.omega import draw_omega
from lora_one.core.precondition import precondition
from lora_one.core.sides import Products
from lora_one.core.step import gradient_descent

SEEDS = st.integers(0, 2**32 - 1)
SIDES = st.integers(6, 24)
NUMBERS = settings(max_examples=40, deadline=None, derandomize=True)
MODELS = settings(max_examples=8, deadline=None, derandomize=True)


def gradient(seed: int, out: int, in_: int) -> np.ndarray:
    """Singular values with gaps, so that the best rank-r part is well-conditioned: 1, 0.7, 0.49, ..."""
    rng = np.random.default_rng(seed)
    p = min(out, in_)
    return (orthogonal(rng, out)[:, :p] * 0.7 ** np.arange(p)) @ orthogonal(rng, in_)[:, :p].T


def orthogonal(rng: np.random.Generator, n: int) -> np.ndarray:
    q, _ = np.linalg.qr(rng.standard_normal((n, n)))
    return q


def start_of(g: np.ndarray, rank: int = 3) -> np.ndarray:
    """B0 A0."""
    pair = normalized_factors(ops, exact_spectrum(ops, g, rank), 128.0)
    return pair.lora_B @ pair.lora_A


def folded(gradients: list[Gradient], k: int, right: np.ndarray | float = 1.0) -> FoldState:
    """The state after all batches, from Gaussians that `right` rotates."""
    out, in_ = gradients[0].shape
    omega, test = (draw_omega(0, name, in_, width) for name, width in (("layer", k), ("layer, test", 8)))
    rotated = [right @ x if isinstance(right, np.ndarray) else x for x in (omega, test)]
    state = start_fold(ops, rotated[0], out, rotated[1])
    for gradient in gradients:
        state = fold(ops, state, gradient)
    return state


def start_of_fold(state: FoldState, rank: int = 3) -> np.ndarray:
    """B0 A0 by the fold."""
    pair = normalized_factors(ops, finish_fold(ops, state, rank), 128.0)
    return pair.lora_B @ pair.lora_A


def share_of_best(g: np.ndarray, state: FoldState, rank: int = 3) -> float:
    """The energy that U^T G V holds over that of the best rank-r part."""
    inside = state.u[:, :rank].T @ g @ state.v[:, :rank]
    return float(np.sum(inside**2) / np.sum(np.linalg.svd(g, compute_uv=False)[:rank] ** 2))


def unequal_batches(seed: int, g: np.ndarray, count: int = 4, noise: float = 0.03) -> list[np.ndarray]:
    """Matrices whose sum is G, each with noise of its own, which the others take back."""
    noises = np.random.default_rng(seed).standard_normal((count, *g.shape)) * noise / np.sqrt(max(g.shape))
    return [g / count + x for x in noises - np.mean(noises, axis=0)]


@NUMBERS
@given(SEEDS, SIDES, SIDES)
def test_rotating_inputs_and_outputs_rotates_the_start(seed, out, in_):
    rng = np.random.default_rng(seed)
    g, left, right = gradient(seed, out, in_), orthogonal(rng, out), orthogonal(rng, in_)
    np.testing.assert_allclose(start_of(left @ g @ right.T), left @ start_of(g) @ right.T, atol=1e-13)
    batches = unequal_batches(seed, g)
    turned = folded([left @ x @ right.T for x in batches], 5, right)
    np.testing.assert_allclose(start_of_fold(turned), left @ start_of_fold(folded(batches, 5)) @ right.T, atol=1e-12)


@NUMBERS
@given(SEEDS, SIDES, SIDES, st.floats(-60, 60))
def test_the_normalized_start_does_not_feel_the_scale_of_the_loss(seed, out, in_, exponent):
    g = gradient(seed, out, in_)
    np.testing.assert_allclose(start_of(g * 10.0**exponent), start_of(g), atol=1e-14)
    one, other = (folded([x * c for x in unequal_batches(seed, g)], 5) for c in (1.0, 10.0**exponent))
    np.testing.assert_allclose(start_of_fold(other), start_of_fold(one), atol=1e-12)
    np.testing.assert_allclose(start_of_fold(of_mean(ops, one, 7)), start_of_fold(one), atol=1e-14)


@NUMBERS
@given(SEEDS, SIDES, SIDES, st.lists(st.integers(0, 3), min_size=1, max_size=5).filter(lambda n: 0 < sum(n) <= 5))
def test_tokens_that_fit_in_the_state_are_held_whole_however_they_are_split_and_ordered(seed, out, in_, tokens):
    """Batches of so many tokens, 5 at most together, with k = 5: the fold is an SVD of their sum."""
    rng = np.random.default_rng(seed)
    scales = 0.7 ** np.arange(sum(tokens))[:, None]
    whole = RowProduct(rng.standard_normal((sum(tokens), out)) * scales, rng.standard_normal((sum(tokens), in_)))
    cuts = np.cumsum(tokens)[:-1]
    batches = [RowProduct(dy, x) for dy, x in zip(*(np.split(y, cuts) for y in whole), strict=True)]
    for order in (batches, batches[::-1], [whole]):
        state = folded(order, 5)
        np.testing.assert_allclose((state.u * state.s) @ state.v.T, whole.dy.T @ whole.x, atol=1e-12 * out * in_)


@NUMBERS
@given(SEEDS, SIDES, SIDES, st.permutations(range(4)))
def test_where_not_all_fits_order_and_split_cost_little(seed, out, in_, order):
    """Noise in each batch of 3 % of the largest singular value: 0.5 % of the best energy (measured: 0.1 %)."""
    g = gradient(seed, out, in_)
    batches = unequal_batches(seed, g)
    shares = [share_of_best(g, folded(x, 5)) for x in (batches, [batches[i] for i in order], [g])]
    assert min(shares) > 0.995 and max(shares) < 1 + 1e-12


@NUMBERS
@given(SEEDS, SIDES, SIDES)
def test_reading_both_sides_never_lowers_the_energy_that_is_held(seed, out, in_):
    g = gradient(seed, out, in_)
    state = folded(unequal_batches(seed, g, noise=0.3), 5)
    shares = [share_of_best(g, state)]
    for _ in range(2):
        state = read_both_sides(ops, state, Products(g @ state.v, g.T @ state.u))
        shares.append(share_of_best(g, state))
    assert shares[0] <= shares[1] + 1e-9 and shares[1] <= shares[2] + 1e-9
    assert shares[2] > 0.99


@NUMBERS
@given(SEEDS, SIDES, SIDES)
def test_transposing_the_layer_swaps_the_factors(seed, out, in_):
    g = gradient(seed, out, in_)
    np.testing.assert_allclose(start_of(g.T), start_of(g).T, atol=1e-14)


@NUMBERS
@given(SEEDS, SIDES, SIDES, st.integers(1, 5))
def test_rotating_the_rank_axis_rotates_the_preconditioned_step(seed, out, in_, r):
    """(Q A, B Q^T) is the same adapter for orthogonal Q, and the reg I of the preconditioner does not break that."""
    rng = np.random.default_rng(seed)
    pair = Factors(rng.standard_normal((r, in_)), rng.standard_normal((out, r)))
    slope = Factors(rng.standard_normal((r, in_)), rng.standard_normal((out, r)))
    q = orthogonal(rng, r)
    turned, turned_slope = (Factors(q @ f.lora_A, f.lora_B @ q.T) for f in (pair, slope))
    plain = precondition(ops, pair, slope, 1e-2)
    rotated = precondition(ops, turned, turned_slope, 1e-2)
    scale = np.max(np.abs(plain.lora_A))
    np.testing.assert_allclose(rotated.lora_A, q @ plain.lora_A, atol=1e-10 * scale)
    stepped = gradient_descent(ops, pair, slope, 0.1, 1e-2)
    turned = gradient_descent(ops, turned, turned_slope, 0.1, 1e-2)
    product = stepped.lora_B @ stepped.lora_A
    np.testing.assert_allclose(turned.lora_B @ turned.lora_A, product, atol=1e-9 * np.max(np.abs(product)))


# --- models: float64 on torch -----------------------------------------------------------------------------------------


class Net(torch.nn.Module):
    """Two layers, registered in the given order."""

    def __init__(self, seed: int, order: tuple[str, ...] = ("first", "second")):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        sizes = {"first": (9, 7), "second": (7, 6)}
        weights = {
            n: torch.randn(o, i, generator=generator, dtype=torch.float64) / i**0.5 for n, (i, o) in sizes.items()
        }
        for name in order:
            layer = torch.nn.Linear(*sizes[name], bias=False, dtype=torch.float64)
            layer.weight.data = weights[name]
            setattr(self, name, layer)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def loss(model, batch):
    x, y = batch
    return ((model(x) - y) ** 2).mean()


def data(seed: int, batches: int, size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed + 1)
    draw = lambda n: torch.randn(size, n, generator=generator, dtype=torch.float64)  # noqa: E731
    return [(draw(9), draw(6)) for _ in range(batches)]


def products(model, batches, gradient: str) -> dict[str, np.ndarray]:
    # As wide as the layers: a fold holds all of a sum, and so is as indifferent to its order as the sum is.
    config = lora_one.Config(rank=2, oversample=5, gradient=gradient, targets=["first", "second"])
    model, _ = lora_one.init(model, batches, loss, config)
    layers = {n.rsplit(".", 1)[-1]: m for n, m in model.named_modules() if hasattr(m, "lora_A") and len(m.lora_A)}
    return {
        name: (m.lora_B["default"].weight @ m.lora_A["default"].weight).detach().double().numpy()
        for name, m in layers.items()
    }


def assert_same(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert got.keys() == expected.keys() == {"first", "second"}
    for name in got:
        np.testing.assert_allclose(got[name], expected[name], atol=1e-6 * np.max(np.abs(got[name])))


@MODELS
@given(SEEDS, st.sampled_from(["sketch", "exact"]))
def test_the_order_of_layers_does_not_matter(seed, kind):
    batches = data(seed, 2, 8)
    assert_same(products(Net(seed), batches, kind), products(Net(seed, ("second", "first")), batches, kind))


@MODELS
@given(SEEDS, st.sampled_from(["sketch", "exact"]), st.permutations(range(4)))
def test_the_order_of_batches_does_not_matter(seed, kind, order):
    batches = data(seed, 4, 4)
    assert_same(products(Net(seed), batches, kind), products(Net(seed), [batches[i] for i in order], kind))


@MODELS
@given(SEEDS, st.sampled_from(["sketch", "exact"]), st.sampled_from([1, 2, 4]))
def test_splitting_a_batch_evenly_does_not_matter(seed, kind, parts):
    ((x, y),) = data(seed, 1, 8)
    split = list(zip(x.chunk(parts), y.chunk(parts), strict=True))
    assert_same(products(Net(seed), [(x, y)], kind), products(Net(seed), split, kind))
