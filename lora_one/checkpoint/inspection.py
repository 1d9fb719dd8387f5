"""The spectrum of s B A in each layer of an adapter on disk: how much it changes its model."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_one.core.factors import Factors
from lora_one.errors import CheckpointError
from lora_one.plots import Panel, draw
from lora_one.report import LayerReport, Report
from lora_one.report.deferred import DeferredReport, LayerStart

from .folder import METADATA
from .metadata import read_report
from .peft import read_adapter, read_folder


@dataclass(frozen=True)
class LayerInspection:
    """The update s B A of one layer.

    Attributes:
        name: path of the module.
        out_features, in_features, rank: shapes of the pair.
        singular_values: of s B A, (r,), descending.
        norm: ||s B A||_F.
        stable_rank: ||s B A||_F^2 / ||s B A||_2^2, the number of directions that matter.
        start: the layer's entry in the report of the start, if there is one.
        growth: norm over the norm at the start, if known.
    """

    name: str
    out_features: int
    in_features: int
    rank: int
    singular_values: list[float]
    norm: float
    stable_rank: float
    start: LayerReport | LayerStart | None
    growth: float | None


@dataclass(frozen=True)
class Inspection:
    """What an adapter folder holds.

    Attributes:
        path: the folder.
        layers: the updates of its layers.
        report: of the start, if lora-one made the adapter.
        settings: name -> value of what is set in adapter_config.json ("adapter.r") and in the report ("start.rank").
    """

    path: Path
    layers: list[LayerInspection]
    report: Report | DeferredReport | None
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return the inspection as plain data for JSON. The layers of the report are those of `layers`."""
        report = None if self.report is None else self.report.to_dict()
        return {
            "adapter": str(self.path),
            "layers": [asdict(layer) for layer in self.layers],
            "report": report and {name: value for name, value in report.items() if name != "layers"},
            "settings": self.settings,
        }

    def plot(self, path: str | Path) -> None:
        """Draw the spectra and the norms of the layers' s B A as an image, with matplotlib."""
        draw(
            path,
            [layer.name for layer in self.layers],
            [layer.singular_values for layer in self.layers],
            [layer.norm for layer in self.layers],
            (
                Panel("singular values of $s B A$", "$S_i / S_1$"),
                Panel("size of the update", r"$\|s B A\|_F$"),
            ),
        )


def inspect_adapter(path: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> Inspection:
    """Read an adapter folder that lora-one or PEFT wrote.

    Args:
        path: the folder.
        progress: told after each layer how many are done, and how many there are.

    Raises:
        CheckpointError: the folder cannot be read, or a factor is not finite.
    """
    folder = read_folder(path)
    try:
        report = read_report(path) if (path / METADATA).is_file() else None
    except CheckpointError:
        report = None  # the adapter was saved without one
    starts: dict[str, LayerReport | LayerStart] = {}
    for entry in report.layers if report else ():
        starts[entry.name] = entry
    adapter = read_adapter(folder)
    layers: list[LayerInspection] = []
    for name, layer in adapter.layers.items():
        pair = layer.pairs[0]
        if not all(np.isfinite(factor).all() for factor in pair):
            raise CheckpointError(f"{path}: {name}: lora_A or lora_B has entries that are not finite")
        s = product_spectrum(Factors(*(factor.astype(np.float64) for factor in pair)), layer.scaling)
        start = starts.get(name)
        norm = float(np.linalg.norm(s))
        layers.append(
            LayerInspection(
                name=name,
                out_features=pair.lora_B.shape[0],
                in_features=pair.lora_A.shape[1],
                rank=pair.lora_A.shape[0],
                singular_values=s.tolist(),
                norm=norm,
                stable_rank=float((norm / s[0]) ** 2) if s[0] > 0 else 0.0,
                start=start,
                growth=_growth(norm, start, report, layer.scaling),
            )
        )
        progress(len(layers), len(adapter.layers))
    return Inspection(path, layers, report, _settings(folder.config, report))


def _settings(config: dict[str, Any], report: Report | DeferredReport | None) -> dict[str, Any]:
    """Return what is set in an adapter's configuration and in the report of its start."""
    settings = {f"adapter.{name}": value for name, value in config.items() if value not in (None, [], {}, ())}
    if report is not None:
        start = report.to_dict()
        asked, made = start.pop("config"), {name: start.get(name) for name in ("backend", "gamma", "passes", "batches")}
        settings |= {f"start.{name}": value for name, value in {**asked, **made}.items() if value is not None}
    return settings


def product_spectrum(pair: Factors, scaling: float) -> np.ndarray:
    """Return the singular values of s B A, (r,), from r x r matrices, without forming the product."""
    _, core, _ = in_bases(pair)
    return abs(scaling) * np.linalg.svd(core, compute_uv=False)


def in_bases(pair: Factors) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return orthonormal qb (out, r) and qa (in, r), and core (r, r), so that B A = qb core qa^T."""
    qb, rb = np.linalg.qr(pair.lora_B)  # (out, r), (r, r)
    qa, ra = np.linalg.qr(pair.lora_A.T)  # (in, r), (r, r)
    return qb, rb @ ra.T, qa


def _growth(
    norm: float, start: LayerReport | LayerStart | None, report: Report | DeferredReport | None, scaling: float
) -> float | None:
    """Return the norm over that of the normalized start, ||diag(S / S_1)||_F * scaling / gamma; None if unknown."""
    if start is None or report is None or not report.gamma or start.start != "spectral":
        return None
    s = np.array(start.singular_values)
    norm_at_start = float(np.linalg.norm(s / s[0]) * scaling / report.gamma) if s[0] > 0 else 0.0
    return norm / norm_at_start if norm_at_start > 0 else None
