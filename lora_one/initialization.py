"""`init` once a model has LoRA attached: passes -> spectra -> factors -> report. The same for every framework."""

import time
import warnings
from typing import NamedTuple

import numpy as np

from .backends.interface import Layer, PassResult, Session
from .config import Config
from .core.factors import Factors, gradient_factors, normalized_factors, plain_factors
from .core.gradient import Gradient, arrays_of
from .core.ops import Array, Ops, as_one_program
from .core.spectrum import SketchState, Spectrum, advance, draw_omega, exact_spectrum, finish, probe, start
from .errors import BatchError, GradientError, ModelError
from .report import GammaTrial, LayerReport, Report, layer_report, share_of_best

ENOUGH = 0.99  # of the energy of the best rank-r gradient: where passes="auto" stops
GAMMA_GROWTH = 4.0
GAMMA_TRIALS = 8
SAME_LOSS = 1e-3  # well above what rounding, and batches regrouped by a shuffle, make of the same data


class InitWarning(UserWarning):
    """The base of what `init` warns of."""


class ZeroGradientWarning(InitWarning):
    """Some layers have no gradient on the init batches and keep plain LoRA's start."""


class GammaWarning(InitWarning):
    """gamma="auto" found no gamma at which the initialised model is at least as good as the base model."""


class ChangingBatchesWarning(InitWarning):
    """The passes of a sketch did not see the same batches, so that they do not belong to one gradient."""


class _Spectra(NamedTuple):
    result: PassResult
    passes: int
    layers: dict[str, Spectrum]  # a layer that no gradient reached is missing


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
        _check_rank(layer)
    spectra = _exact(session) if config.gradient == "exact" else _sketch(session, config)

    entries: list[LayerReport] = []
    spectral: dict[str, Spectrum] = {}
    for layer in session.layers:
        spectrum = spectra.layers.get(layer.name)
        values = None if spectrum is None else _values(session.ops, layer.name, spectrum)
        if spectrum is not None and values is not None and values.s[0] > 0:
            spectral[layer.name] = spectrum
        else:
            values = None
        entries.append(layer_report(layer.name, (layer.out_features, layer.in_features), layer.rank, values))
    if not spectral:
        raise BatchError(
            "no target layer has a gradient: got zero in all of them, expected a loss that depends on their outputs; "
            "check the loss, the labels (are all of them masked?) and the targets"
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
            f"LoRA's start: {', '.join(report.plain_layers)}",
            ZeroGradientWarning,
            stacklevel=3,
        )
    return report


def _check_rank(layer: Layer) -> None:
    limit = min(layer.out_features, layer.in_features)
    if layer.rank > limit:
        raise ModelError(
            f"layer {layer.name!r}: rank must be <= min(out, in) = {limit}, got {layer.rank}; lower the rank or leave "
            "the layer out of the targets"
        )


def _sketch(session: Session, config: Config) -> _Spectra:
    ops = session.ops
    states = {}
    for layer in session.layers:
        width = min(layer.rank + config.oversample, layer.out_features, layer.in_features)
        omega = draw_omega(config.seed, layer.name, layer.in_features, width)
        states[layer.name] = start(ops, ops.asarray(omega, like=session.like(layer.name)), layer.out_features)
    ranks = {layer.name: layer.rank for layer in session.layers}
    spectra: dict[str, Spectrum] | None = None
    for number in range(1, config.pass_counts[-1] + 1):
        result, gradients = session.sketch_pass({name: probe(ops, state) for name, state in states.items()})
        for name in list(states):
            gradient = gradients.pop(name)
            if gradient is None:
                del states[name]
                continue
            _check_finite(ops, name, gradient, f"in pass {number}")
            states[name] = advance(ops, states[name], gradient)
            # A lazy framework computes the state here, and lets the gradient go.
            ops.to_numpy(ops.sum(states[name].coordinates[-1]))
        if number == 1:
            first = result
        elif abs(result.loss - first.loss) > SAME_LOSS * (1.0 + abs(first.loss)):
            warnings.warn(
                f"the loss on the init batches was {first.loss:.6g} in pass 1 and {result.loss:.6g} in pass {number}, "
                "expected the same: do the batches change from one reading to the next, is loss_fn random?",
                ChangingBatchesWarning,
                stacklevel=5,
            )
        if number in config.pass_counts:
            spectra = _finished(ops, states, ranks, may_go_on=number < config.pass_counts[-1])
            if session.unanimous(spectra is not None):
                break
    assert spectra is not None
    return _Spectra(first, number, spectra)


def _finished(
    ops: Ops, states: dict[str, SketchState], ranks: dict[str, int], may_go_on: bool
) -> dict[str, Spectrum] | None:
    """The spectra of all layers; None as soon as one holds too little and more passes may be made."""
    spectra: dict[str, Spectrum] = {}
    for name, state in states.items():
        spectra[name] = finish(ops, state, ranks[name])
        if may_go_on and not _holds_enough(_values(ops, name, spectra[name])):
            return None
    return spectra


def _holds_enough(values: Spectrum) -> bool:
    return not values.s[0] > 0 or share_of_best(values) >= ENOUGH


def _exact(session: Session) -> _Spectra:
    ranks = {layer.name: layer.rank for layer in session.layers}
    spectra: dict[str, Spectrum] = {}

    def decompose(name: str, gradient: Gradient) -> None:
        for array in arrays_of(gradient):
            _check_finite(session.ops, name, array, "of the weight")
        spectra[name] = exact_spectrum(session.ops, gradient, ranks[name])
        _values(session.ops, name, spectra[name])  # a lazy framework computes it here, and lets go of the gradient

    result = session.exact_pass(decompose)
    return _Spectra(result, 1, spectra)


def _check_finite(ops: Ops, layer: str, gradient: Array, where: str) -> None:
    if np.isfinite(ops.to_numpy(ops.sum(gradient))):
        return
    finite = ops.to_numpy(ops.isfinite(gradient))
    if not finite.all():  # it may be the sum alone that overflows
        raise GradientError(
            f"layer {layer!r}: its gradient {where} has {int((~finite).sum())} of {finite.size} entries that are not "
            "finite, expected none; a float16 model overflows easily: use bfloat16 or float32, or look at the batches"
        )


def _values(ops: Ops, layer: str, spectrum: Spectrum) -> Spectrum:
    """The singular values and norms as NumPy arrays; the vectors stay where they are, and are only checked.

    Raises:
        GradientError: something is not finite.
    """
    entries = ops.sum(spectrum.u) + ops.sum(spectrum.vt)  # the vectors are orthonormal: their sum cannot overflow
    values = [ops.to_numpy(x) for x in (entries, spectrum.s, *spectrum[3:])]
    if not all(np.isfinite(x).all() for x in values):
        raise GradientError(
            f"layer {layer!r}: its gradient is finite but its SVD is not; "
            "is the loss scaled to the edge of the dtype's range?"
        )
    _, s, *norms = values
    return Spectrum(spectrum.u, s, spectrum.vt, *norms)


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
