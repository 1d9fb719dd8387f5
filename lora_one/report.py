"""What an initialisation did: plain data that prints as a table, saves as JSON, and plots."""

import dataclasses
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from .checks import shown
from .config import Config
from .core.spectrum import Spectrum
from .errors import CheckpointError
from .plots import Panel, draw

_Plain = TypeVar("_Plain")


@dataclass(frozen=True)
class LayerReport:
    """One layer's start.

    Attributes:
        name: path of the module.
        out_features, in_features, rank: shape of the weight, r of the pair.
        singular_values: the r leading ones of the gradient, descending.
        gradient_norm: ||G||_F, exact or estimated.
        gradient_norm_error: standard error of that estimate; 0 where it is exact.
        energy: share of ||G||_F^2 that the r directions hold, by that estimate.
        share_of_best: that energy over the energy of the best r directions: 1 where G was in hand, otherwise an
            estimate from how fast the passes converge: most often far too low before the fourth.
            Of a gradient that float16 did not hold no more than what it may have held.
        share_at_least: a lower bound on it from the energy that no pass has seen; it holds up to the error of
            `gradient_norm`, and is far too low where the unseen energy is spread over many directions.
        start: "spectral", or "plain" where the gradient was zero and the layer got plain LoRA's start.
        rounded_away: the share of the gradient's norm that float16 may not have held, at the best scale of the loss; 0
            with any other dtype, and not known where a fused kernel reads the layer.
        called: whether any forward pass on the init batches called the layer; only PyTorch's backend ever says no.
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
    share_at_least: float
    start: str = "spectral"
    called: bool = True
    rounded_away: float = 0.0


@dataclass(frozen=True)
class GammaTrial:
    """One value that gamma="auto" tried, and the loss of the initialised model on the init batches."""

    gamma: float
    loss: float


@dataclass(frozen=True)
class Report:
    """What `lora_one.init` did.

    Attributes:
        backend: "torch", ...
        config: what was asked for.
        passes: backward passes over the batches.
        batches: batches in a pass.
        base_loss: mean loss of the base model on the init batches.
        gamma: the one used; None with scale="gradient".
        gamma_trials: what gamma="auto" tried, in order; the last is the one used.
        seconds: wall time of the whole call.
        peak_memory: bytes: the device allocator's peak during the call, or on a CPU the process's so far.
        layers: one entry a layer, in the model's order.
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
        """Layers whose gradient was zero."""
        return [layer.name for layer in self.layers if layer.start == "plain"]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Report":
        """The inverse of `to_dict`."""
        try:
            layers = [_typed(LayerReport, layer) for layer in values["layers"]]
            trials = [_typed(GammaTrial, trial) for trial in values["gamma_trials"]]
            config = Config.from_dict(values["config"])
            report = _typed(cls, {**values, "config": config, "layers": layers, "gamma_trials": trials})
        except (KeyError, TypeError, ValueError) as error:  # ConfigError is one
            raise CheckpointError(f"not a report of lora-one: {error}") from error
        for layer in report.layers:
            if layer.rank < 1 or len(layer.singular_values) != layer.rank:
                raise CheckpointError(
                    f"not a report of lora-one: {shown(layer.name)} has not as many values as its rank"
                )
        return report

    def plot(self, path: str | Path) -> None:
        """Draw the layers' spectra and energies as an image; needs matplotlib."""
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
        """Two lines: what was done, and how much of the gradient it holds."""
        gamma = "" if self.gamma is None else f", gamma {self.gamma:g}"
        memory = "" if self.peak_memory is None else f", peak memory {self.peak_memory / 2**20:.0f} MiB"
        head = (
            f"LoRA-One ({self.backend}, {self.config.gradient}): {len(self.layers)} layers, {self.passes} passes over "
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
        for layer in self.layers:
            shape = f"{layer.out_features} x {layer.in_features}"
            row = f"{layer.name:<{width}}  {shape:>13}  {layer.rank:>3}  "
            if layer.start == "plain":
                lines.append(row + f"{'zero gradient' if layer.called else 'never called'}: plain LoRA start")
                continue
            first, last = layer.singular_values[0], layer.singular_values[-1]
            lines.append(
                f"{row}{layer.gradient_norm:>9.2e}  {first:>9.2e}  {last / first:>7.3f}  {layer.energy:>6.3f}  "
                f"{layer.share_of_best:>7.3f}"
            )
        return "\n".join(lines)


def _typed(cls: type[_Plain], values: Any) -> _Plain:
    """An instance of a dataclass, its fields of the types that it says.

    Raises:
        TypeError: they are not.
    """
    made = cls(**values)
    for name, hint in typing.get_type_hints(cls).items():
        if not _fits(getattr(made, name), hint):
            raise TypeError(f"{name} cannot be {shown(getattr(made, name))}")
    return made


def _fits(value: Any, hint: Any) -> bool:
    inner = typing.get_args(hint)
    if typing.get_origin(hint) is list:
        return isinstance(value, list) and all(_fits(item, inner[0]) for item in value)
    if inner:
        return any(_fits(value, kind) for kind in inner)
    if hint in (int, float) and isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < 2**63
    return isinstance(value, hint)


def layer_report(
    name: str,
    shape: tuple[int, int],
    rank: int,
    spectrum: Spectrum | None,
    called: bool = True,
    rounded_away: float = 0.0,
) -> LayerReport:
    """The entry of a layer, from its spectrum as NumPy arrays; None where the gradient was zero."""
    if spectrum is None:
        return LayerReport(name, *shape, rank, [0.0] * rank, 0.0, 0.0, 0.0, 0.0, 0.0, start="plain", called=called)
    s = np.asarray(spectrum.s, dtype=np.float64)
    norm, error, unseen = float(spectrum.norm), float(spectrum.norm_error), float(spectrum.unseen)
    captured = np.sum((s / s[0]) ** 2)
    held = 1.0 / (1.0 + rounded_away**2)  # of the energy of what came and what did not
    return LayerReport(
        name=name,
        out_features=shape[0],
        in_features=shape[1],
        rank=rank,
        singular_values=s.tolist(),
        gradient_norm=norm,
        gradient_norm_error=error,
        energy=float(min(1.0, captured / (norm / s[0]) ** 2)),
        share_of_best=held * share_of_best(spectrum),
        # Whatever r directions are best, they hold at most what ours hold and all that no pass has seen.
        share_at_least=held * float(captured / (captured + (unseen / s[0]) ** 2)),
        rounded_away=rounded_away,
    )


def share_of_best(spectrum: Spectrum) -> float:
    """`LayerReport.share_of_best`, from a spectrum as NumPy arrays that is not zero."""
    if spectrum.unseen == spectrum.norm_error == 0:
        return 1.0  # all of G was seen: the quotient of two roundings need not be 1
    s = np.asarray(spectrum.s, dtype=np.float64)
    return float(min(1.0, np.sum((s / s[0]) ** 2) / (float(spectrum.best_norm) / s[0]) ** 2))
