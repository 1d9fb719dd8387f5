"""The random directions that a running SVD starts from."""

import hashlib

import numpy as np


def draw_omega(seed: int, layer: str, in_features: int, columns: int) -> np.ndarray:
    """Draw the Gaussian test matrix of a layer, (in, k), float64: the same on every framework and machine.

    The generator is NumPy's Philox, keyed by a hash of (seed, layer). So a layer's matrix does not depend on which
    other layers there are, or in which order they are drawn.
    """
    key = hashlib.blake2b(f"{seed}/{layer}".encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.Philox(key=np.frombuffer(key, dtype=np.uint64)))
    return generator.standard_normal((in_features, columns))
