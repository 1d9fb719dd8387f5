"""The random directions that a sketch begins with."""

import hashlib

import numpy as np


def draw_omega(seed: int, layer: str, in_features: int, columns: int) -> np.ndarray:
    """The Gaussian test matrix of a layer, (in, k), float64: the same on every framework, machine and layer order.

    NumPy's Philox, keyed by a hash of (seed, layer), so that no layer's draw depends on which others there are.
    """
    key = hashlib.blake2b(f"{seed}/{layer}".encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.Philox(key=np.frombuffer(key, dtype=np.uint64)))
    return generator.standard_normal((in_features, columns))
