"""The report of an initialisation: plain data that prints as a table, saves as JSON, and plots."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_one.checks import shown
from lora_one.config import Config
from lora_one.core.spectrum import Spectrum
from lora_one.errors import CheckpointError
from lora_one.plots import Panel, draw

from .typed import typed

BAR = 16  # characters of the longest
ROUNDING = 1e-5  # of float32 sums of squares: a share as close to 1 as this is 1


@dataclass(frozen=True)
class LayerReport:
    """The start of one layer: its gradient's spectrum, and how much of it the LoRA factors hold.

    Use it to see which layers a larger rank or more passes would help: a low `energy` with a high `share_of_best` means
    that the rank is small for this gradient, and a low `share_of_best` that more passes would find more of it.

    Attributes:
        name: path of the module in the base model.
        out_features: rows of the weight.
        in_features: columns of the weight.
        rank: r of the LoRA pair.
        singular_values: the r largest singular values of the gradient G, descending.
        gradient_norm: ||G||_F, exact or estimated.
        gradient_norm_error: standard error of `gradient_norm`; 0 if it is exact.
        energy: share of ||G||_F^2 that the r directions hold, in [0, 1], computed with `gradient_norm`.
        share_of_best: energy of the r directions over the energy of the best r directions, in [0, 1]. It is an
            estimate: after one pass by a rule that was measured on gradients of trained models, after more from how far
            the last one turned the directions. No pass can know what it did not see: on flat spectra the estimate can
            be too high. With gradient="exact" it is rather too low. What float16 may have lost counts as not held.
        start: "spectral"; or "plain" if the gradient was zero, so that the layer got plain LoRA's start.
        called: whether any forward pass on the init batches called the layer. Only PyTorch's backend reports False.
        rounded_away: share of the gradient's norm that float16 may have lost, at the best scale of the loss. It is 0
            for other dtypes, and unknown (0) if a fused kernel reads the layer.

    >>> layer = LayerReport("up", 24, 12, 2, [3.0, 1.0], gradient_norm=4.0, gradient_norm_error=0.0,
    ...     energy=0.625, share_of_best=1.0)
    >>> layer.start
    'spectral'
    """

    name: str
    out_features: int
    in_features: int
    rank: int
    singular_values: list[float]
    gradient_norm: float
    gradient_norm_error: float
    energy: float
    share_of_best: float
    start: str = "spectral"
    called: bool = True
    rounded_away: float = 0.0


@dataclass(frozen=True)
class GammaTrial:
    """One gamma that gamma="auto" tried, and the loss that the initialised model had with it.

    `Report.gamma_trials` lists the trials in order. The loss is the mean on the init batches, to be compared with
    `Report.base_loss`: the first trial whose loss is not above it is the one used.

    Attributes:
        gamma: the value that was tried.
        loss: mean loss of the initialised model on the init batches.

    >>> GammaTrial(gamma=128.0, loss=2.5)
    GammaTrial(gamma=128.0, loss=2.5)
    """

    gamma: float
    loss: float


@dataclass(frozen=True)
class Report:
    """What `lora_one.init` did: the settings, the cost, and the start of each layer.

    Print it for a table with one row per layer, look at `layers` for the numbers, or draw them with `plot`. Hand it to
    `lora_one.save` to keep it beside the adapter, where `lora-one inspect` reads it.

    Attributes:
        backend: name of the framework: "torch", "jax" or "mlx".
        config: the settings of the call.
        passes: backward passes over the batches.
        batches: batches per pass.
        base_loss: mean loss of the base model on the init batches.
        gamma: the gamma in use; None with scale="gradient".
        gamma_trials: what gamma="auto" tried, in order; the last one is in use. Empty for a given gamma.
        seconds: wall time of the whole call.
        peak_memory: peak memory in bytes: of the device's allocator during the call; on a CPU of the process so far.
            None if unknown.
        layers: one `LayerReport` per layer, in the model's order.

    >>> import lora_one, torch
    >>> base = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 4))
    >>> batches = [(torch.randn(8, 6), torch.randn(8, 4))]
    >>> mean_square = lambda model, batch: (model(batch[0]) - batch[1]).square().mean()
    >>> _, report = lora_one.init(base, batches, mean_square, lora_one.Config(rank=2, targets=["0", "2"]))
    >>> [(layer.name, layer.start) for layer in report.layers]
    [('0', 'spectral'), ('2', 'spectral')]
    >>> Report.from_dict(report.to_dict()) == report
    True
    """

    backend: str
    config: Config
    passes: int
    batches: int
    base_loss: float
    gamma: float | None
    gamma_trials: list[GammaTrial]
    seconds: float
    peak_memory: int | None
    layers: list[LayerReport]

    @property
    def plain_layers(self) -> list[str]:
        """The names of the layers whose gradient was zero."""
        return [layer.name for layer in self.layers if layer.start == "plain"]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Report":
        """Return the report that `to_dict` made this data from.

        Raises:
            CheckpointError: the data is not a report.
        """
        try:
            layers = [typed(LayerReport, _without_removed_fields(layer)) for layer in values["layers"]]
            trials = [typed(GammaTrial, trial) for trial in values["gamma_trials"]]
            config = Config.from_dict(values["config"])
            report = typed(cls, {**values, "config": config, "layers": layers, "gamma_trials": trials})
        except (KeyError, TypeError, ValueError) as error:  # ConfigError is a ValueError
            raise CheckpointError(f"not a report of lora-one: {error}") from error
        for layer in report.layers:
            if layer.rank < 1 or len(layer.singular_values) != layer.rank:
                raise CheckpointError(
                    f"not a report of lora-one: {shown(layer.name)} has not as many values as its rank"
                )
        return report

    def plot(self, path: str | Path) -> None:
        """Draw the layers' spectra and energies as an image, with matplotlib.

        Args:
            path: file to write; its suffix chooses the format: .png, .pdf or .svg.

        Raises:
            BackendError: matplotlib is not installed.
            ConfigError: the suffix is not an image format.
            CheckpointError: the picture cannot be written.
        """
        layers = [layer for layer in self.layers if layer.start == "spectral"]
        draw(
            path,
            [layer.name for layer in layers],
            [layer.singular_values for layer in layers],
            [layer.energy for layer in layers],
            (
                Panel("leading singular values of the gradient", "$S_i / S_1$"),
                Panel("energy of the gradient in the factors", r"share of $\|G\|_F^2$"),
            ),
            limit=1.0,
        )

    def summary(self) -> str:
        """Return two lines: what was done, and how much of the gradient the factors hold."""
        gamma = "" if self.gamma is None else f", gamma {self.gamma:g}"
        memory = "" if self.peak_memory is None else f", peak memory {self.peak_memory / 2**20:.0f} MiB"
        passes = "1 pass" if self.passes == 1 else f"{self.passes} passes"
        head = (
            f"LoRA-One ({self.backend}, {self.config.gradient}): {len(self.layers)} layers, {passes} over "
            f"{self.batches} batches in {self.seconds:.1f} s{memory}{gamma}; base loss {self.base_loss:.4f}"
        )
        spectral = [layer for layer in self.layers if layer.start == "spectral"]
        if not spectral:
            return head
        energy = np.array([layer.energy for layer in spectral])
        share = np.array([layer.share_of_best for layer in spectral])
        return (
            f"{head}\nenergy of the gradient in the factors: median {np.median(energy):.3f}, least {energy.min():.3f}; "
            f"of the best possible at this rank: {share.min():.3f} in the worst layer"
        )

    def __str__(self) -> str:
        width = max([5, *(len(layer.name) for layer in self.layers)])
        columns = f"{'shape':>13}  {'r':>3}  {'|G|':>9}  {'s_1':>9}  {'s_r/s_1':>7}  {'energy':>6}  of best"
        header = f"{'layer':<{width}}  {columns}"
        lines = [self.summary(), "", header]
        for layer, bar in zip(self.layers, rank_bars(self), strict=True):
            shape = f"{layer.out_features} x {layer.in_features}"
            row = f"{layer.name:<{width}}  {shape:>13}  {layer.rank:>3}  "
            if layer.start == "plain":
                why = "zero gradient" if layer.called else "never called"
                lines.append(f"{row}{f'{why}: plain LoRA start':<46}  {bar}".rstrip())
                continue
            first, last = layer.singular_values[0], layer.singular_values[-1]
            lines.append(
                f"{row}{layer.gradient_norm:>9.2e}  {first:>9.2e}  {last / first:>7.3f}  {layer.energy:>6.3f}  "
                f"{layer.share_of_best:>7.3f}  {bar}".rstrip()
            )
        return "\n".join(lines)


def rank_bars(report: Report) -> list[str]:
    """Return a bar per layer whose length shows its rank; empty ones where all layers have the rank of the settings."""
    if report.config.rank_max is None:
        return [""] * len(report.layers)
    largest = max(layer.rank for layer in report.layers)
    return ["█" * max(1, round(layer.rank * min(1.0, BAR / largest))) for layer in report.layers]


def _without_removed_fields(layer: object) -> Any:
    """Return the data of a layer without the fields that reports in older adapter folders have."""
    if not isinstance(layer, dict):
        return layer
    return {name: value for name, value in layer.items() if name != "share_at_least"}


def layer_report(
    name: str,
    shape: tuple[int, int],
    rank: int,
    spectrum: Spectrum | None,
    called: bool = True,
    rounded_away: float = 0.0,
) -> LayerReport:
    """Return the report of a layer.

    Args:
        shape: (out, in).
        spectrum: as NumPy arrays; None if the gradient was zero.
    """
    if spectrum is None:
        return LayerReport(name, *shape, rank, [0.0] * rank, 0.0, 0.0, 0.0, 0.0, start="plain", called=called)
    s = np.asarray(spectrum.s, dtype=np.float64)
    norm = float(spectrum.norm)
    held_by_float16 = 1.0 / (1.0 + rounded_away**2)  # share of the true gradient's energy
    return LayerReport(
        name=name,
        out_features=shape[0],
        in_features=shape[1],
        rank=rank,
        singular_values=s.tolist(),
        gradient_norm=norm,
        gradient_norm_error=float(spectrum.norm_error),
        energy=float(min(1.0, np.sum((s / s[0]) ** 2) / (norm / s[0]) ** 2)),
        share_of_best=held_by_float16 * share_of_best(spectrum),
        rounded_away=rounded_away,
    )


def share_of_best(spectrum: Spectrum) -> float:
    """Return `LayerReport.share_of_best` for a spectrum as NumPy arrays that is not zero."""
    s = np.asarray(spectrum.s, dtype=np.float64)
    share = float(np.sum((s / s[0]) ** 2) / (float(spectrum.best_norm) / s[0]) ** 2)
    return share if share < 1.0 - ROUNDING else 1.0
