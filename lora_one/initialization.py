"""`init` once a model has LoRA attached: passes -> spectra -> factors -> report. The same for every framework."""

import time
import warnings

from .backends.interface import Layer, Session
from .config import Config
from .core.factors import Factors, gradient_factors, normalized_factors, plain_factors
from .core.omega import draw_omega
from .core.ops import as_one_program
from .core.spectrum import Spectrum
from .errors import BatchError, GammaWarning, ModelError, UnderflowWarning, ZeroGradientWarning
from .passes import exact, sketched
from .report import GammaTrial, LayerReport, Report, layer_report

ROUNDED_AWAY = 0.03  # of a gradient's norm: 0.001 of its energy
GAMMA_GROWTH = 4.0
GAMMA_TRIALS = 8


def initialize(session: Session, config: Config, backend: str, began: float) -> Report:
    """Start all LoRA layers of the session by LoRA-One.

    Args:
        began: `time.perf_counter()` of when the call began, for the report.

    Raises:
        ModelError: a rank above a layer's size.
        BatchError: no layer has a gradient.
        GradientError: a gradient that is not finite.
    """
    for layer in session.layers:
        _check_rank(layer, backend)
    spectra = exact(session) if config.gradient == "exact" else sketched(session, config)

    entries: list[LayerReport] = []
    spectral: dict[str, Spectrum] = {}
    for layer in session.layers:
        found = spectra.layers.get(layer.name)
        values = None
        if found is not None and found.values.s[0] > 0:
            spectral[layer.name], values = found
        shape, called = (layer.out_features, layer.in_features), layer.name not in spectra.result.never_called
        rounded_away = spectra.result.rounded_away.get(layer.name, 0.0)
        entries.append(layer_report(layer.name, shape, layer.rank, values, called, rounded_away))
    never_called = [entry.name for entry in entries if not entry.called]
    if not spectral:
        raise BatchError(
            "no target layer has a gradient: got zero in all of them, expected a loss that depends on their outputs; "
            f"check the loss, the labels (are all of them masked?) and the targets{_on_never_called(never_called)}"
        )

    for layer in session.layers:
        if layer.name not in spectral:
            session.assign(layer.name, _plain(session, layer, config.seed))
    gamma, trials = _assign_spectral(session, config, spectral, spectra.result.loss)
    report = Report(
        backend=backend,
        config=config,
        passes=spectra.passes,
        batches=spectra.result.batches,
        base_loss=spectra.result.loss,
        gamma=gamma,
        gamma_trials=trials,
        seconds=time.perf_counter() - began,
        peak_memory=session.peak_memory(),
        layers=entries,
    )
    if report.plain_layers:
        warnings.warn(
            f"{len(report.plain_layers)} of {len(entries)} layers have no gradient on the init batches and keep plain "
            f"LoRA's start: {', '.join(report.plain_layers)}{_on_never_called(never_called)}",
            ZeroGradientWarning,
            stacklevel=3,
        )
    lost = {layer.name: layer.rounded_away for layer in entries if layer.rounded_away > ROUNDED_AWAY}
    if lost and backend == "torch":  # the other backends have warned during the pass
        warnings.warn(
            f"float16 is too short of range for the gradients of {len(lost)} of {len(entries)} layers, at any scale of "
            f"the loss that the others allow: it may have lost up to {max(lost.values()):.2g} of their norm in "
            f"{', '.join(lost)}; load the model in bfloat16 or float32",
            UnderflowWarning,
            stacklevel=3,
        )
    return report


def _check_rank(layer: Layer, backend: str) -> None:
    limit = min(layer.out_features, layer.in_features)
    if layer.rank > limit:
        head = layer.name.rpartition(".")[2]
        # Only PyTorch's backend has it.
        whole = f", or, where it is a new head, train it whole: Config(modules_to_save=[{head!r}])"
        raise ModelError(
            f"layer {layer.name!r}: rank must be <= min(out, in) = {limit}, got {layer.rank}; lower the rank, "
            f"leave the layer out of the targets{whole if backend == 'torch' else ''}"
        )


def _on_never_called(layers: list[str]) -> str:
    if not layers:
        return ""
    return (
        f". Of these no forward pass called {', '.join(layers)}: no token reached them (experts), or other code reads "
        "their weights, where LoRA has no effect: leave such layers out of the targets, or switch the fused kernel off"
    )


def _plain(session: Session, layer: Layer, seed: int) -> Factors:
    omega = draw_omega(seed, layer.name, layer.in_features, layer.rank)
    like = session.like(layer.name)
    return plain_factors(session.ops, session.ops.asarray(omega, like=like), layer.rank, layer.out_features)


def _assign_spectral(
    session: Session, config: Config, spectra: dict[str, Spectrum], base_loss: float
) -> tuple[float | None, list[GammaTrial]]:
    """Set the factors; with gamma="auto" raise gamma while they make the loss on the init batches worse.

    A safeguard and not an optimiser: the gamma of least loss on the init batches trains badly, the paper's 128 well.
    """
    if config.scale == "gradient":
        for name, spectrum in spectra.items():
            session.assign(name, gradient_factors(session.ops, spectrum, config.eta))
        return None, []

    gamma = config.first_gamma
    spectral_factors = as_one_program(session.ops, normalized_factors, ("gamma",))
    trials: list[GammaTrial] = []
    while True:
        for name, spectrum in spectra.items():
            session.assign(name, spectral_factors(spectrum, gamma=gamma))
        if config.gamma != "auto":
            return gamma, []
        trials.append(GammaTrial(gamma, session.mean_loss().loss))
        if trials[-1].loss <= base_loss:
            return gamma, trials
        if len(trials) == GAMMA_TRIALS:
            warnings.warn(
                f'gamma="auto": the loss on the init batches stays above the base model\'s {base_loss:.6g}, at '
                f"{trials[-1].loss:.6g} for gamma {gamma:g}, the largest tried; is it the same at each call?",
                GammaWarning,
                stacklevel=4,
            )
            return gamma, trials
        gamma *= GAMMA_GROWTH
