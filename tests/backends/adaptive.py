"""A net of three linear layers in NumPy, and what `Config.rank_max` must make of its gradients on every framework."""

import itertools

import numpy as np

import lora_one
from tests.arrays import best_rank

SIZES = {"wide": (16, 12), "narrow": (16, 12), "out": (8, 16)}  # (out, in)
CONFIG = lora_one.Config(rank=3, rank_max=6, targets=tuple(SIZES), gamma=2.0)


def weights() -> dict[str, np.ndarray]:
    """Return W of each layer, (out, in), float32. The net computes out(tanh(wide(x) + narrow(z)))."""
    rng = np.random.default_rng(0)
    return {name: (rng.standard_normal(shape) / shape[1] ** 0.5).astype(np.float32) for name, shape in SIZES.items()}


def batches() -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Return two batches of inputs x and z, (32, 12), and targets, (32, 8). Since z is of rank 1, so is narrow's G."""
    rng = np.random.default_rng(1)
    made = []
    for _ in range(2):
        x, z, target = rng.standard_normal((32, 12)), rng.standard_normal((32, 1)), rng.standard_normal((32, 8))
        made.append(tuple(a.astype(np.float32) for a in (x, z @ np.linspace(0.5, 1.5, 12)[None], target)))
    return made


def gradients() -> dict[str, np.ndarray]:
    """Return the mean over the batches of dL/dW, (out, in), float64, of the mean squared error."""
    wide, narrow, out = (w.astype(float) for w in weights().values())
    total = {name: np.zeros(shape) for name, shape in SIZES.items()}
    for x, z, target in batches():
        hidden = np.tanh(x @ wide.T + z @ narrow.T)
        dy = 2.0 * (hidden @ out.T - target) / target.size
        d_hidden = dy @ out * (1.0 - hidden**2)
        for name, rows, inputs in (("wide", d_hidden, x), ("narrow", d_hidden, z), ("out", dy, hidden)):
            total[name] += rows.T @ inputs / 2
    return total


def ranks() -> dict[str, int]:
    """Return the ranks that hold most of the energy, in units of each layer's S_1^2, for the parameters of CONFIG."""
    energies = [np.linalg.svd(g, compute_uv=False) ** 2 for g in gradients().values()]
    held = [np.cumsum(e) / e[0] for e in energies]
    prices = [sum(shape) for shape in SIZES.values()]
    choices = itertools.product(range(1, CONFIG.rank_max + 1), repeat=len(SIZES))
    affordable = (r for r in choices if np.dot(r, prices) <= CONFIG.rank * sum(prices))
    best = max(affordable, key=lambda r: sum(h[i - 1] for h, i in zip(held, r, strict=True)))
    return dict(zip(SIZES, best, strict=True))


def products() -> dict[str, np.ndarray]:
    """Return B A of each layer at its rank, (out, in)."""
    g = gradients()
    return {name: -best_rank(g[name], r) / np.linalg.norm(g[name], 2) / CONFIG.gamma for name, r in ranks().items()}


def assert_started(pairs: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Check the ranks and products of lora_A, (r, in), and lora_B, (out, r)."""
    assert {name: len(a) for name, (a, _) in pairs.items()} == ranks()
    for name, expected in products().items():
        a, b = pairs[name]
        np.testing.assert_allclose(b @ a, expected, atol=1e-4 * np.abs(expected).max())
