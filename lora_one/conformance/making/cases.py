"""The inputs of the suite.

Every number is exact in float32, and those for bfloat16 in bfloat16, so that all dtypes start from the same numbers.
Properties that rounding would destroy are made from integers and powers of two.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from lora_one.core.omega import draw_omega

SCALES = {"scale 1e-20": 2.0**-66, "scale 1e20": 2.0**66}


class Case(NamedTuple):
    """One input of one computation.

    Attributes:
        narrow: whether it also runs on bfloat16 inputs.
        compiled: whether it is one of the few that also run compiled.
    """

    computation: str
    name: str
    inputs: list[np.ndarray]
    params: dict[str, Any]
    narrow: bool = False
    compiled: bool = False


def all_cases() -> Iterator[Case]:
    """Yield every case of every computation."""
    yield from _primitives()
    yield from _spectra()
    yield from _folds()
    yield from _deferred()
    yield from _pairs()
    yield from _alignment()


def _float32(x: np.ndarray) -> np.ndarray:
    """Round to float32. All of its 24 bits are in use then, so that TF32 or bfloat16 products show."""
    return x.astype(np.float32).astype(np.float64)


def _normal(seed: int, *shape: int) -> np.ndarray:
    return _float32(np.random.Generator(np.random.Philox(key=seed)).standard_normal(shape))


def _few_bits(x: np.ndarray) -> np.ndarray:
    """Round to multiples of 2^-6, below 4 in magnitude: exact in bfloat16."""
    return np.round(np.clip(x, -3.9, 3.9) * 64.0) / 64.0


def _decaying(seed: int, rows: int, columns: int) -> np.ndarray:
    """A random matrix whose singular values fall by a third each, similar to those of gradients."""
    p = min(rows, columns)
    u, _ = np.linalg.qr(_normal(seed, rows, p))
    v, _ = np.linalg.qr(_normal(seed + 1, columns, p))
    return _float32((u * (8.0 * 0.67 ** np.arange(p))) @ v.T)


def _hadamard(n: int) -> np.ndarray:
    h = np.ones((1, 1))
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return h


def _with_singular_values(s: np.ndarray) -> np.ndarray:
    """H diag(s) P H' / n with Hadamard H. If s are powers of two, its singular values are s to the last bit."""
    n = len(s)
    h = _hadamard(n)
    return (h * s) @ np.roll(h, 3, axis=0).T / n


def _gradients() -> Iterator[tuple[str, np.ndarray, dict[str, Any]]]:
    """Yield (name, G, params): the rank to keep, and whether the best rank-r part is unique (`gap`).

    There are few shapes and many matrices, because compiling for a shape takes longer than computing.
    """
    square, tall, wide = (32, 32), (40, 24), (24, 40)
    # 1 ... 1e-6; plateaus, with the cut between two of them; a plateau with the cut inside. Each has so many different
    # values that no Krylov space is exhausted: directions after that would be rounding noise.
    kappa = 2.0 ** -np.round(np.linspace(0, 20, 32))
    plateaus = np.repeat([2.0, 1.0, 0.25, 0.125], (4, 8, 12, 8))
    equals = np.repeat([2.0, *2.0 ** -np.arange(6)], (8, *[4] * 6))
    integers = np.round(2.0 * _normal(90, 40, 3)) @ np.round(2.0 * _normal(91, 3, 24))
    yield "square", _decaying(10, *square), {"rank": 4}
    yield "tall", _decaying(20, *tall), {"rank": 4}
    yield "wide", _decaying(30, *wide), {"rank": 4}
    yield "r = 1", _decaying(40, *tall), {"rank": 1}
    yield "r = min(m, n)", _decaying(50, 12, 20), {"rank": 12}
    yield "rank-deficient", integers, {"rank": 4, "signs": False}
    yield "kappa 1e6", _with_singular_values(kappa), {"rank": 4, "signs": False}
    yield "equal singular values", _with_singular_values(plateaus), {"rank": 4, "signs": False}
    yield "cut among equals", _with_singular_values(equals), {"rank": 4, "gap": False, "signs": False}
    yield "zero", np.zeros(tall), {"rank": 4, "gap": False, "signs": False}
    for name, scale in SCALES.items():
        yield name, _decaying(10, *square) * scale, {"rank": 4}


def _spectra() -> Iterator[Case]:
    yield Case("omega", "Philox, keyed", [np.zeros(())], {"seed": 3, "layer": "model.layers.0.q_proj", "shape": [7, 3]})
    for name, g, params in _gradients():
        params = {"gap": True, "signs": True, **params}
        compiled = name == "tall"
        yield Case("exact spectrum", name, [g], params, compiled=compiled)
        if not g.any():
            omega = _float32(draw_omega(0, "conformance", g.shape[1], params["rank"] + 4))
            yield Case("factors, plain", name, [omega], {"rank": params["rank"], "out": g.shape[0]})
        elif params["gap"]:
            for label, balance in _balances(name):
                shared = {**params, "balance": balance}
                yield Case("factors, normalized", label, [g], {**shared, "gamma": 128.0}, compiled=compiled)
                yield Case("factors, gradient", label, [g], {**shared, "eta": 0.25})


def _balances(name: str) -> list[tuple[str, float]]:
    """The paper's balance for every case; the others, which differ by powers of S alone, for one."""
    others = [(f"{name}, balance {balance:g}", balance) for balance in (0.25, 0.0)] if name == "tall" else []
    return [(name, 0.5), *others]


def _folds() -> Iterator[Case]:
    """G as the gradient of the first batch, and the rows of a second one.

    The singular values fall fast enough that cutting at r and at k is well-posed, and the sides are long enough that
    products with 2 k directions do not see all.
    """
    rank = 2
    for name, (rows, columns) in _FOLDED.items():
        scale = 0.0 if name == "zero" else SCALES.get(name, 1.0)
        k = min(rank + 2, rows, columns)
        omega, test, left = (
            _float32(draw_omega(0, f"conformance{part}", length, width))
            for part, length, width in (("", columns, k), (", test", columns, 4), (", left", rows, k))
        )
        g = _decaying(110, rows, columns) * scale
        tokens = 5  # more than k: the directions of a renewal do not hold all of the sum
        dy, x = _normal(122, tokens, rows) * 2.0 ** -np.arange(tokens)[:, None], _normal(123, tokens, columns) * scale
        arrays = [omega, test, left, g, dy, x]
        params = {"rank": rank, "gap": name != "zero", "signs": name != "zero"}
        yield Case("fold, after each batch", name, arrays, {**params, "stages": _FOLD_STAGES})
        if name == "tall":  # all stages together take a compiler a minute
            two = ["1 batch", "2 passes from random sides"]
            yield Case("fold, after each batch", "two stages", arrays, {**params, "stages": two}, compiled=True)


_FOLD_STAGES = [
    "1 batch",
    "2 batches",
    "2 batches, both sides",
    "2 batches, merged",
    "2 passes from random sides",
    "3 passes from random sides",
]
_FOLDED = {"tall": (20, 12), "wide": (12, 20), "k = min(m, n)": (4, 9), "zero": (20, 12)}
_FOLDED |= dict.fromkeys(SCALES, (16, 16))


def _pairs() -> Iterator[Case]:
    for name, r, out, in_ in (("tall", 4, 40, 16), ("wide", 4, 16, 40), ("r = 1", 1, 12, 9), ("r = min", 8, 8, 8)):
        a, b, gradient_a, gradient_b = _normal(1, r, in_), _normal(2, out, r), _normal(3, r, in_), _normal(4, out, r)
        for damping, reg in (("absolute", 1e-6), ("absolute", 1e-2), ("relative", 1e-2)):
            params = {"reg": reg, "damping": damping}
            once = name == "tall" and reg == 1e-6
            arrays = [a, b, gradient_a, gradient_b]
            yield Case("precondition", f"{name}, {damping} {reg:g}", arrays, params, compiled=once)
            if once:
                yield Case("precondition", "few bits", [_few_bits(x) for x in arrays], params, narrow=True)
        if name == "tall":
            # Hard cases that must work: B still zero, two equal columns, columns of very different size.
            uneven = 2.0 ** -np.arange(0, 12, 3)  # kappa of the Gram 2^18
            for kind, other in (
                ("B = 0", np.zeros_like(b)),
                ("B deficient", b[:, [0, 1, 2, 0]]),
                ("B uneven", b * uneven),
            ):
                for damping, reg in (("absolute", 1.0), ("relative", 1e-2)):
                    params = {"reg": reg, "damping": damping}
                    yield Case("precondition", f"{kind}, {damping} {reg:g}", [a, other, gradient_a, gradient_b], params)
    yield from _training()


def _training() -> Iterator[Case]:
    problems = []
    for seed, (r, out, in_) in enumerate(((4, 24, 16), (4, 12, 20), (2, 24, 16))):
        a, b = _normal(60 + seed, r, in_) / 8.0, _normal(70 + seed, out, r) / 8.0
        gradient_a, gradient_b = _normal(64 + seed, r, in_), _normal(74 + seed, out, r)
        problems.append([a, b, gradient_a, gradient_b, _decaying(80 + 2 * seed, out, in_)])
    # Rates and decay are exact in float32 too, since frameworks store them in it.
    for reg, damping in ((None, "absolute"), (1e-6, "absolute"), (1e-2, "relative")):
        name = "plain" if reg is None else f"{damping} {reg:g}"
        settings = {"reg": reg, "damping": damping, "weight_decay": 0.125}
        for computation, rate in (("gradient descent", 2.0**-6 if reg is None else 0.25), ("AdamW", 2.0**-7)):
            arrays = problems[0] if computation == "gradient descent" else [x for p in problems for x in p]
            params = {**settings, "rate": rate, "steps": 20, "loss": "matching"}
            yield Case(computation, f"{name}, 20 steps", arrays, params)
            params = {**settings, "rate": rate, "steps": 1, "loss": "linear"}
            yield Case(computation, f"{name}, 1 step", arrays, params, compiled=reg == 1e-6)
            few = [_few_bits(x * 8.0) / 8.0 for x in arrays]
            yield Case(computation, f"{name}, 1 step, few bits", few, params, narrow=True)


def _deferred() -> Iterator[Case]:
    """A, and gradients that agree more or less, of which one is zero and one is not finite."""
    rank = 3
    # Two shapes: an eager framework compiles each operation for each of them.
    for name in ("tall", "stack of wide ones", *SCALES):
        stack = name.startswith("stack")
        rows, columns = (16, 24) if stack else (24, 16)
        scale = SCALES.get(name, 1.0)
        pairs = []
        for pair in range(2 if stack else 1):
            common = _decaying(110 + 2 * pair, rows, columns)
            gradients = [common + _decaying(120 + 10 * pair + 2 * i, rows, columns) / 8.0 for i in range(3)]
            pairs.append([_normal(114 + pair, rank, columns) / 8.0, *(_float32(g * scale) for g in gradients)])
        a, first, second, third = (np.stack(x) if stack else x[0] for x in zip(*pairs, strict=True))
        broken = third.copy()
        broken[..., 0, 0] = np.nan
        arrays = [a, first, np.zeros_like(first), second, broken, third]
        for label, balance in _balances(name):
            params = {"gamma": 128.0, "balance": balance, "unit": scale}
            yield Case("start without data", label, arrays, params, compiled=label == "tall")
    nothing = [_normal(114, rank, 16) / 8.0, np.zeros((24, 16))]
    yield Case("start without data", "zero", nothing, {"gamma": 128.0, "balance": 0.5, "unit": 1.0})


def _alignment() -> Iterator[Case]:
    g = _decaying(10, 24, 24)
    x, y = _normal(100, 24, 3), _normal(101, 24, 5)
    close = _float32(x + _normal(102, 24, 3) * 2.0**-10)  # angles whose cosines are 1 in float32
    a, b = _normal(103, 3, 24), g @ _normal(104, 24, 3)
    yield Case("alignment", "apart", [x, y, g, a, _float32(b)], {})
    yield Case("alignment", "close", [x, close, g, a, _float32(b)], {})


def _primitives() -> Iterator[Case]:
    tall, wide, square = _normal(5, 12, 4), _normal(6, 4, 9), _normal(7, 6, 6)
    batch = _normal(8, 3, 4, 4)
    gram = _float32(batch @ batch.swapaxes(-1, -2) + np.eye(4) / 8.0)
    broken = gram.copy()
    broken[1] = np.diag([1.0, -1.0, 2.0, 3.0])  # indefinite
    kinds = {"tall": tall, "wide": wide, "scalar": np.array(1.5), "transposed": wide.T, "batch": batch}
    for name, x in kinds.items():
        yield Case("asarray, to_numpy", name, [x], {})
        yield Case("asarray, to_numpy", f"{name}, few bits", [_few_bits(x)], {}, narrow=True)
    yield Case("astype, at_least_float32", "tall", [tall], {})
    yield Case("astype, at_least_float32", "few bits", [_few_bits(tall)], {}, narrow=True)
    yield Case("matmul", "tall wide", [tall, wide], {})
    yield Case("matmul", "long sum", [_normal(9, 3, 512), _normal(11, 512, 5)], {})
    yield Case("matmul", "batch", [batch, _normal(12, 3, 4, 7)], {})
    yield Case("matmul", "batch, broadcast", [batch, _normal(13, 4, 7)], {})
    yield Case("matrix_transpose", "tall", [tall], {})
    yield Case("matrix_transpose", "batch", [batch], {})
    for name, x, full in (
        ("tall", tall, True),
        ("square", square, True),
        ("rank-deficient", tall[:, [0, 1, 0, 1]], False),
        ("zero", np.zeros((8, 3)), False),
    ):
        yield Case("qr", name, [x], {"full_rank": full})
    for name, x in (("tall", tall), ("wide", wide), ("square", square), ("batch", batch), ("zero", np.zeros((5, 3)))):
        yield Case("svd", name, [x], {})
        yield Case("svdvals", name, [x], {})
    rhs = _normal(14, 3, 4, 5)
    yield Case("cholesky_solve", "one", [gram[0], rhs[0]], {})
    yield Case("cholesky_solve", "batch", [gram, rhs], {})
    yield Case("cholesky_solve", "batch, one right side", [gram, rhs[0]], {})
    yield Case("cholesky_solve, not definite", "one of three", [broken, rhs], {})
    for name in ("eye", "zeros", "eps"):
        yield Case(name, "like a scalar", [np.array(1.0)], {})
    yield Case("sqrt", "tall", [np.abs(tall)], {})
    yield Case("sum", "tall", [tall], {})
    yield Case("max", "tall", [tall], {})
    yield Case("max", "negative", [-np.abs(tall)], {})
    yield Case("isfinite, comparisons", "all kinds", [np.array([0.0, 1.0, -2.0, np.inf, -np.inf, np.nan])], {})
    yield Case("concat", "two", [square, -square], {})
    yield Case("stack", "two", [square, -square], {})
    yield Case("where", "of what is not finite", [np.where(square > 1, np.nan, square), square], {})
