"""Two adapter folders side by side: the angles between their updates, and the settings in which they differ."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_one.core.factors import Factors

from .inspection import Inspection, in_bases
from .peft import read_adapter, read_folder

NOISE = 1e-6  # directions of an update whose singular value, over the largest, is below this are rounding


@dataclass(frozen=True)
class LayerComparison:
    """The angles between the updates s B A of one layer in two adapters.

    Attributes:
        name: path of the module.
        angles_in: principal angles between the inputs that the updates read, in degrees, ascending; as many as the
            update of the smaller rank has directions.
        angles_out: the same for the outputs that they write.
        shared_in: mean squared cosine of `angles_in`: 1 if the one space holds the other, 0 if they are orthogonal.
        shared_out: that of `angles_out`.
        by_chance_in: what two random spaces of these ranks share on average.
        by_chance_out: the same for the outputs.
    """

    name: str
    angles_in: list[float]
    angles_out: list[float]
    shared_in: float
    shared_out: float
    by_chance_in: float
    by_chance_out: float


@dataclass(frozen=True)
class Comparison:
    """Two adapters, and how their updates lie to each other in the layers that both have.

    Attributes:
        first, second: the two inspections.
        layers: the layers that both have in the same shape, and whose updates are not zero.
        differences: setting -> its value in the first and in the second; None where one does not have it.
    """

    first: Inspection
    second: Inspection
    layers: list[LayerComparison]
    differences: dict[str, tuple[Any, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as plain data for JSON."""
        return {
            "first": self.first.to_dict(),
            "second": self.second.to_dict(),
            "layers": [asdict(layer) for layer in self.layers],
            "differences": {name: list(values) for name, values in self.differences.items()},
        }


def compare(
    first: Inspection, second: Inspection, progress: Callable[[int, int], None] = lambda done, total: None
) -> Comparison:
    """Compare two adapters that were inspected.

    Args:
        progress: told after each layer how many are done, and how many there are.
    """
    one, other = (_pairs(inspection.path) for inspection in (first, second))
    names = [name for name in one if name in other]
    layers = []
    for done, name in enumerate(names, start=1):
        (a, b), (c, d) = one[name], other[name]
        if a.shape[1] == c.shape[1] and b.shape[0] == d.shape[0]:
            layer = _compared(name, directions(one[name]), directions(other[name]))
            layers += [layer] if layer else []
        progress(done, len(names))
    settings = dict.fromkeys([*first.settings, *second.settings])
    pairs = {name: (first.settings.get(name), second.settings.get(name)) for name in settings}
    return Comparison(first, second, layers, {name: pair for name, pair in pairs.items() if pair[0] != pair[1]})


def directions(pair: Factors) -> tuple[np.ndarray, np.ndarray]:
    """Return orthonormal bases of what B A reads, (in, k), and writes, (out, k), where k is its rank."""
    qb, core, qa = in_bases(pair)
    u, s, vt = np.linalg.svd(core)
    k = int(np.sum(s > NOISE * s[0])) if s[0] > 0 else 0
    return qa @ vt[:k].T, qb @ u[:, :k]


def _compared(
    name: str, one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]
) -> LayerComparison | None:
    angles, shared, by_chance = [], [], []
    for a, b in zip(one, other, strict=True):  # of the inputs, of the outputs
        if not a.shape[1] or not b.shape[1]:
            return None
        cosines = np.minimum(np.linalg.svd(a.T @ b, compute_uv=False), 1.0)
        angles.append(np.degrees(np.arccos(cosines)).tolist())
        shared.append(float(np.mean(cosines**2)))
        by_chance.append(max(a.shape[1], b.shape[1]) / a.shape[0])
    return LayerComparison(name, *angles, *shared, *by_chance)


def _pairs(path: Path) -> dict[str, Factors]:
    """Return layer -> its factors in float64."""
    layers = read_adapter(read_folder(path)).layers
    return {name: Factors(*(x.astype(np.float64) for x in layer.pairs[0])) for name, layer in layers.items()}
