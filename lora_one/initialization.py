"""`init`, once LoRA is attached: passes -> spectra -> factors -> report. It is the same for every framework."""

import time

from .backends.interface import Layer, Session
from .backends.waiting import new_report
from .config import Config
from .core.factors import gradient_factors, normalized_factors, plain_factors
from .core.omega import draw_omega
from .core.ops import as_one_program
from .core.spectrum import Spectrum
from .errors import BatchError, GammaWarning, ModelError, UnderflowWarning, ZeroGradientWarning, warn_user
from .passes import Spectra, exact_gradients, sketch_gradients
from .ranks import layer_ranks
from .report import DeferredReport, GammaTrial, LayerReport, Report, layer_report

ROUNDED_AWAY = 0.03  # share of a gradient's norm, 0.001 of its energy, from which on `init` warns of float16
GAMMA_GROWTH = 4.0
GAMMA_TRIALS = 8


def initialize(session: Session, config: Config, backend: str, began: float) -> Report:
    """Start all LoRA layers of the session by LoRA-One.

    Args:
        began: `time.perf_counter()` when the call began, for the report.

    Raises:
        ModelError: a rank above a layer's size.
        BatchError: no layer has a gradient.
        GradientError: a gradient that is not finite.
    """
    for layer in session.layers:
        _check_rank(layer)
    spectra = exact_gradients(session, config) if config.gradient == "exact" else sketch_gradients(session, config)
    if config.rank_max is not None:
        spectra = _at_own_ranks(session, config, spectra)
    entries = _layer_reports(session, spectra)
    _check_some_gradient(entries)
    _assign_plain(session, config, entries)
    gamma, trials = _assign_spectral(session, config, _spectral(entries, spectra), spectra.result.loss)
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
    _warn_of_plain_layers(report)
    _warn_of_underflow(report)
    return report


def initialize_without_data(session: Session, config: Config, backend: str) -> DeferredReport:
    """Give all LoRA layers plain LoRA's start, for the optimizer to make LoRA-One's of its first gradients.

    Raises:
        ModelError: a rank above a layer's size.
    """
    for layer in session.layers:
        _check_rank(layer)
        _assign_plain_to(session, config, layer)
    return new_report(backend, config, session.layers)


def _check_rank(layer: Layer) -> None:
    """Raise ModelError for a rank above a layer's size."""
    limit = min(layer.out_features, layer.in_features)
    if layer.rank > limit:
        head = layer.name.rpartition(".")[2]
        raise ModelError(
            f"layer {layer.name!r}: rank must be <= min(out, in) = {limit}, got {layer.rank}; lower the rank, "
            f"leave the layer out of the targets, or, where it is a new head, train it whole: "
            f"Config(modules_to_save=[{head!r}])"
        )


def _at_own_ranks(session: Session, config: Config, spectra: Spectra) -> Spectra:
    """Give the layers the ranks that their spectra suggest. Return the spectra of these ranks."""
    values = {name: spectrum.values for name, spectrum in spectra.layers.items()}
    session.set_ranks(layer_ranks(session.layers, config, values))
    own = {
        layer.name: spectra.layers[layer.name].of_rank(session.ops, layer.rank)
        for layer in session.layers
        if layer.name in spectra.layers
    }
    return spectra._replace(layers=own)


def _layer_reports(session: Session, spectra: Spectra) -> list[LayerReport]:
    entries = []
    for layer in session.layers:
        spectrum = spectra.layers.get(layer.name)
        entries.append(
            layer_report(
                layer.name,
                (layer.out_features, layer.in_features),
                layer.rank,
                spectrum.values if spectrum is not None and spectrum.values.s[0] > 0 else None,
                called=layer.name not in spectra.result.never_called,
                rounded_away=spectra.result.rounded_away.get(layer.name, 0.0),
            )
        )
    return entries


def _check_some_gradient(entries: list[LayerReport]) -> None:
    if all(entry.start == "plain" for entry in entries):
        raise BatchError(
            "no target layer has a gradient: got zero in all of them, expected a loss that depends on their outputs; "
            "check the loss, the labels (are all of them masked?) and the targets" + _on_never_called(entries)
        )


def _on_never_called(entries: list[LayerReport]) -> str:
    never_called = [entry.name for entry in entries if not entry.called]
    if not never_called:
        return ""
    return (
        f". Of these no forward pass called {', '.join(never_called)}: no token reached them (experts), or other code "
        "reads their weights, where LoRA has no effect: leave such layers out of the targets, or switch the fused "
        "kernel off"
    )


def _spectral(entries: list[LayerReport], spectra: Spectra) -> dict[str, Spectrum]:
    """Return the spectra of the layers with a gradient, in the model's order."""
    return {entry.name: spectra.layers[entry.name].spectrum for entry in entries if entry.start == "spectral"}


def _assign_plain(session: Session, config: Config, entries: list[LayerReport]) -> None:
    """Set the factors of the layers without a gradient."""
    for layer, entry in zip(session.layers, entries, strict=True):
        if entry.start == "plain":
            _assign_plain_to(session, config, layer)


def _assign_plain_to(session: Session, config: Config, layer: Layer) -> None:
    """Set the factors of a layer to plain LoRA's start, the same on every framework."""
    ops, like = session.ops, session.like(layer.name)
    omega = ops.asarray(draw_omega(config.seed, layer.name, layer.in_features, layer.rank), like=like)
    session.assign(layer.name, plain_factors(ops, omega, layer.rank, layer.out_features))


def _assign_spectral(
    session: Session, config: Config, spectra: dict[str, Spectrum], base_loss: float
) -> tuple[float | None, list[GammaTrial]]:
    """Set the factors; with gamma="auto" raise gamma while they make the loss on the init batches worse.

    This is a safeguard, not an optimiser: the gamma of least loss on the init batches trains badly, and the paper's 128
    trains well.
    """
    if config.scale == "gradient":
        for name, spectrum in spectra.items():
            session.assign(name, gradient_factors(session.ops, spectrum, config.eta, config.balance))
        return None, []

    gamma = config.first_gamma
    spectral_factors = as_one_program(session.ops, normalized_factors, ("gamma", "balance"))
    trials: list[GammaTrial] = []
    while True:
        for name, spectrum in spectra.items():
            session.assign(name, spectral_factors(spectrum, gamma=gamma, balance=config.balance))
        if config.gamma != "auto":
            return gamma, []
        trials.append(GammaTrial(gamma, session.mean_loss().loss))
        if trials[-1].loss <= base_loss:
            return gamma, trials
        if len(trials) == GAMMA_TRIALS:
            warn_user(
                f'gamma="auto": the loss on the init batches stays above the base model\'s {base_loss:.6g}, at '
                f"{trials[-1].loss:.6g} for gamma {gamma:g}, the largest tried; is it the same at each call?",
                GammaWarning,
            )
            return gamma, trials
        gamma *= GAMMA_GROWTH


def _warn_of_plain_layers(report: Report) -> None:
    if report.plain_layers:
        warn_user(
            f"{len(report.plain_layers)} of {len(report.layers)} layers have no gradient on the init batches and keep "
            f"plain LoRA's start: {', '.join(report.plain_layers)}{_on_never_called(report.layers)}",
            ZeroGradientWarning,
        )


def _warn_of_underflow(report: Report) -> None:
    lost = {layer.name: layer.rounded_away for layer in report.layers if layer.rounded_away > ROUNDED_AWAY}
    if lost and report.backend == "torch":  # the other backends have warned during the pass
        warn_user(
            f"float16 is too short of range for the gradients of {len(lost)} of {len(report.layers)} layers, at any "
            f"scale of the loss that the others allow: it may have lost up to {max(lost.values()):.2g} of their norm "
            f"in {', '.join(lost)}; load the model in bfloat16 or float32",
            UnderflowWarning,
        )
