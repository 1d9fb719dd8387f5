"""Reports of a start, made from batches (`Report`) or by the optimizer (`DeferredReport`): plain data that prints."""

from .deferred import DeferredReport, LayerStart
from .start import GammaTrial, LayerReport, Report, layer_report, rank_bars, share_of_best

__all__ = [
    "DeferredReport",
    "GammaTrial",
    "LayerReport",
    "LayerStart",
    "Report",
    "layer_report",
    "rank_bars",
    "share_of_best",
]
