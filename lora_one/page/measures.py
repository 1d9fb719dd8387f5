"""The numbers that the pages show of each layer, and of an adapter as a whole."""

import statistics
from collections.abc import Callable, Iterable
from typing import NamedTuple

from lora_one.checkpoint.inspection import Inspection, LayerInspection
from lora_one.finetune.metrics import Losses
from lora_one.report import LayerReport


class Measure(NamedTuple):
    """A number of each layer.

    Attributes:
        title: what it is.
        number: reads it; None where a layer does not have it.
        top: the least upper end of its axis.
        log: whether the axis is logarithmic.
    """

    title: str
    number: Callable[[LayerInspection], float | None]
    top: float = 0.0
    log: bool = False

    def limits(self, numbers: list[float]) -> tuple[float, float] | None:
        """Return the ends of the axis for these numbers; None lets the chart choose them."""
        return None if self.log or not any(numbers) else (0.0, 1.05 * max(self.top, *numbers))


def of_start(layer: LayerInspection, name: str) -> float | None:
    """Return a number of the report of a layer's start; None without one, or if the layer had no gradient."""
    start = layer.start
    return float(getattr(start, name)) if isinstance(start, LayerReport) and start.start == "spectral" else None


SIZE = Measure("Size of the update, ‖s B A‖", lambda layer: layer.norm)
STABLE_RANK = Measure("Stable rank of the update", lambda layer: layer.stable_rank)
RANK = Measure("Rank", lambda layer: float(layer.rank))
ENERGY = Measure("Energy: share of ‖G‖² in the factors", lambda layer: of_start(layer, "energy"), top=1.0)
GRADIENT = Measure("Gradient norm, ‖G‖", lambda layer: of_start(layer, "gradient_norm"), log=True)


def measures_of_updates(inspections: Iterable[Inspection]) -> list[Measure]:
    """Return what is shown of the layers' updates: ranks only where layers of an adapter have different ones."""
    differ = any(len({layer.rank for layer in inspection.layers}) > 1 for inspection in inspections)
    return [SIZE, STABLE_RANK, *([RANK] if differ else [])]


def summary(inspection: Inspection, losses: Losses) -> dict[str, str]:
    """Return name -> text of what describes an adapter as a whole; what is not known is left out."""
    layers = inspection.layers
    ranks = [layer.rank for layer in layers]
    energies = [energy for layer in layers if (energy := ENERGY.number(layer)) is not None]
    rows = {
        "layers": f"{len(layers)}",
        "rank": f"{min(ranks)}" if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}",
        "parameters": f"{sum(layer.rank * (layer.out_features + layer.in_features) for layer in layers):,}",
        "size of the update, all layers": f"{sum(layer.norm**2 for layer in layers) ** 0.5:.4g}",
        "stable rank of the update, median": f"{statistics.median(layer.stable_rank for layer in layers):.2f}",
    }
    if energies:
        rows["energy at the start, median"] = f"{statistics.median(energies):.3f}"
    if losses.training:
        rows["training loss, first to last"] = f"{losses.training[0][1]:.4f} to {losses.training[-1][1]:.4f}"
    if losses.held_out:
        step, least = min(losses.held_out, key=lambda pair: pair[1])
        rows["loss on held-out data, first to last"] = f"{losses.held_out[0][1]:.4f} to {losses.held_out[-1][1]:.4f}"
        rows["least loss on held-out data"] = f"{least:.4f} at step {step}"
    return rows
