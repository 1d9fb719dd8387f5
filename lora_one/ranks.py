"""The ranks of layers by their gradients' spectra: `Config.rank_max`."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from .backends.interface import Layer
from .config import Config
from .core.ranks import allotted_ranks
from .core.spectrum import Spectrum


def layer_ranks(layers: Sequence[Layer], config: Config, spectra: Mapping[str, Spectrum]) -> dict[str, int]:
    """Return the rank of each layer: its own, or with `Config.rank_max` one by its gradient's spectrum.

    These ranks hold most of the energy of all layers' first steps that as many parameters can hold. The start's step
    along the i-th direction is in proportion to S_i / S_1, so that the layers count alike, whatever the scales of their
    gradients. Pairs of one module get one rank. Modules without a gradient keep theirs: nothing is known of them.

    Args:
        layers: all layers, with the ranks that are paid for.
        config: the settings.
        spectra: as NumPy arrays, `followed_rank` values each; a layer without a gradient is missing, or zero.
    """
    ranks = {layer.name: layer.rank for layer in layers}
    if config.rank_max is None:
        return ranks
    modules: dict[str, list[Layer]] = defaultdict(list)
    for layer in layers:
        modules[layer.module or layer.name].append(layer)
    values, chosen = [], []
    for of_module in modules.values():
        reached = [spectra[x.name].s for x in of_module if x.name in spectra and spectra[x.name].s[0] > 0]
        if reached:
            chosen.append(of_module)
            values.append(np.sum([step_energies(s) for s in reached], axis=0).tolist())
    prices = [sum(x.out_features + x.in_features for x in of_module) for of_module in chosen]
    budget = sum(price * of_module[0].rank for price, of_module in zip(prices, chosen, strict=True))
    allotted = allotted_ranks(values, prices, budget) if chosen else []
    for rank, of_module in zip(allotted, chosen, strict=True):
        ranks |= dict.fromkeys((layer.name for layer in of_module), rank)
    return ranks


def step_energies(s: np.ndarray) -> np.ndarray:
    """Return (S_i / S_1)^2, (r,): the energy of the start's step along each direction, for singular values S_1 > 0."""
    return (np.asarray(s, np.float64) / float(s[0])) ** 2
