"""Passes over the model -> the spectrum of each layer's gradient, from a sketch or from the exact gradient.

Layers of equal shape and dtype go through the algorithm together, as one stack, if the session asks for it.
"""

from collections import defaultdict
from collections.abc import Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from .backends.interface import Layer, PassResult, Session
from .config import Config
from .core.exact import exact_spectra
from .core.gradient import Gradient, arrays_of
from .core.omega import draw_omega
from .core.ops import Array, Ops
from .core.sketch import Probe, SketchState, advance, finish, probe, start
from .core.spectrum import Spectrum
from .core.stacking import one_of, stack_of, stacked, unstacked
from .errors import ChangingBatchesWarning, GradientError, warn_user
from .report import share_of_best

ENOUGH = 0.99  # share of the energy of the best rank-r gradient at which passes="auto" stops
SAME_LOSS = 1e-3  # well above what rounding, or a shuffle that regroups the same data into batches, changes
STACK_BYTES = 2**31  # most gradients that may wait for others of their stack, to be decomposed together

Stack = tuple[Layer, ...]  # layers that go through the algorithm together
_States = dict[Stack, SketchState]


class LayerSpectrum(NamedTuple):
    """The spectrum of one layer's gradient, for the factors and for the report."""

    spectrum: Spectrum  # arrays of the framework, on the layer's device
    values: Spectrum  # the same, but with the singular values and norms as NumPy arrays


class Spectra(NamedTuple):
    """The spectra of all layers' gradients, and the passes that gave them."""

    result: PassResult  # of the first pass
    passes: int
    layers: dict[str, LayerSpectrum]  # a layer that no gradient reached may be missing


def sketch_gradients(session: Session, config: Config) -> Spectra:
    """Make passes until every layer's factors hold 99 % of the best rank-r energy, or the last allowed pass is made.

    Raises:
        GradientError: a gradient is not finite.
    """
    ops, states = session.ops, _start(session, config)
    *may_end_after, last = config.pass_counts
    results: list[PassResult] = []
    lacking: Layer | None = None  # the layer whose factors held too little after the previous pass
    for number in range(1, last + 1):
        probes = _probes(ops, states)
        result, gradients = session.sketch_pass(probes)
        _advance_all(ops, states, probes, gradients, number)
        results.append(result)
        _warn_if_batches_changed(results, number)
        if number in may_end_after:
            layers, lacking = _enough(ops, states, lacking)
            if session.all_agree(layers is not None) and layers is not None:
                return Spectra(results[0], number, layers)
    return Spectra(results[0], last, _finish_all(ops, states))


def _start(session: Session, config: Config) -> _States:
    """Return the state of each stack before the first pass."""
    ops = session.ops

    def draw(layer: Layer) -> np.ndarray:
        width = min(layer.rank + config.oversample, layer.out_features, layer.in_features)
        return draw_omega(config.seed, layer.name, layer.in_features, width)

    states = {}
    with ThreadPoolExecutor() as pool:  # NumPy draws without Python's lock; a GPU would wait for one thread
        for layers in _stacks(session):
            like = session.like(layers[0].name)
            omega = stacked(ops, [ops.asarray(x, like=like) for x in pool.map(draw, layers)])
            states[layers] = start(ops, omega, layers[0].out_features)
    return states


def _probes(ops: Ops, states: _States) -> dict[str, Probe]:
    """Return what each layer is to probe in the next pass."""
    return {
        layer.name: Probe(side, factor if len(layers) == 1 else factor[index])
        for layers, state in states.items()
        for side, factor in [probe(ops, state)]
        for index, layer in enumerate(layers)
    }


def _advance_all(
    ops: Ops, states: _States, probes: dict[str, Probe], gradients: dict[str, Array | None], number: int
) -> None:
    """Advance all states in place by the gradients of a pass. Both dicts are emptied on the way, to free memory.

    Raises:
        GradientError: a gradient is not finite.
    """
    for layers, state in states.items():
        in_stack = [_or_zeros(ops, gradients.pop(layer.name), probes.pop(layer.name), layer) for layer in layers]
        gradient = stacked(ops, in_stack)
        _check_finite(ops, layers, gradient, f"in pass {number}")
        states[layers] = advance(ops, state, gradient)
        # A lazy framework computes the state here, and frees the gradient.
        ops.to_numpy(ops.sum(states[layers].bases.coordinates[-1]))


def _or_zeros(ops: Ops, gradient: Array | None, probe: Probe, layer: Layer) -> Array:
    """Return the gradient, or zeros if there is none: such a layer keeps plain LoRA's start."""
    if gradient is not None:
        return gradient
    if probe.side == "A":
        return ops.zeros((layer.out_features, probe.factor.shape[0]), like=probe.factor)  # (out, k)
    return ops.zeros((probe.factor.shape[1], layer.in_features), like=probe.factor)  # (k, in)


def _warn_if_batches_changed(results: list[PassResult], number: int) -> None:
    first, last = results[0].loss, results[-1].loss
    if abs(last - first) > SAME_LOSS * (1.0 + abs(first)):
        warn_user(
            f"the loss on the init batches was {first:.6g} in pass 1 and {last:.6g} in pass {number}, "
            "expected the same: do the batches change from one reading to the next, is loss_fn random?",
            ChangingBatchesWarning,
        )


def _enough(
    ops: Ops, states: _States, lacking: Layer | None
) -> tuple[dict[str, LayerSpectrum] | None, None] | tuple[None, Layer]:
    """Return the spectra if the factors of all layers hold enough, otherwise a layer whose factors do not.

    Args:
        lacking: the layer that held too little after the previous pass; it is checked first, since it most likely still
            does, and a single layer is much cheaper than all of them.
    """
    if lacking is not None and _share_in_factors(ops, states, lacking) < ENOUGH:
        return None, lacking
    spectra: dict[str, LayerSpectrum] = {}
    for layers, state in states.items():
        in_stack = _finish(ops, layers, state)
        shares = {layer: _share(in_stack[layer.name]) for layer in layers}
        worst = min(shares, key=shares.__getitem__)
        if shares[worst] < ENOUGH:
            return None, worst
        spectra |= in_stack
    return spectra, None


def _share_in_factors(ops: Ops, states: _States, layer: Layer) -> float:
    [(layers, state)] = [(layers, state) for layers, state in states.items() if layer in layers]
    alone = one_of(state, layers.index(layer), len(layers))
    return _share(_finish(ops, (layer,), alone)[layer.name])


def _share(layer: LayerSpectrum) -> float:
    """Return the share of the best rank-r energy that the factors hold; 1 for a layer without a gradient."""
    return share_of_best(layer.values) if layer.values.s[0] > 0 else 1.0


def _finish_all(ops: Ops, states: _States) -> dict[str, LayerSpectrum]:
    spectra: dict[str, LayerSpectrum] = {}
    for layers, state in states.items():
        spectra |= _finish(ops, layers, state)
    return spectra


def _finish(ops: Ops, layers: Stack, state: SketchState) -> dict[str, LayerSpectrum]:
    return _by_layer(ops, layers, finish(ops, state, layers[0].rank))


def exact_gradients(session: Session) -> Spectra:
    """Make one pass that forms each layer's gradient, and decompose the gradients as they come.

    Raises:
        GradientError: a gradient is not finite.
    """
    decomposer = _Decomposer(session)
    result = session.exact_pass(decomposer.add)
    decomposer.decompose_all()
    return Spectra(result, 1, decomposer.spectra)


class _Decomposer:
    """Gradients that wait for others of their stack, up to `STACK_BYTES`, and the spectra of those decomposed."""

    def __init__(self, session: Session):
        self.spectra: dict[str, LayerSpectrum] = {}
        self._session = session
        self._layers = {layer.name: layer for layer in session.layers}
        self._waiting: dict[Hashable, dict[Layer, Gradient]] = defaultdict(dict)

    def add(self, name: str, gradient: Gradient) -> None:
        layer = self._layers[name]
        for array in arrays_of(gradient):
            _check_finite(self._session.ops, (layer,), array, "of the weight")
        key = _stack_key(self._session, layer)
        self._waiting[key][layer] = gradient
        if not self._session.stacks_layers:  # no other gradient will have this key
            self._decompose(key)
        while sum(map(self._bytes, self._waiting)) > STACK_BYTES:
            self._decompose(max(self._waiting, key=self._bytes))

    def decompose_all(self) -> None:
        for key in list(self._waiting):
            self._decompose(key)

    def _bytes(self, key: Hashable) -> int:
        return sum(array.nbytes for gradient in self._waiting[key].values() for array in arrays_of(gradient))

    def _decompose(self, key: Hashable) -> None:
        ops, gradients = self._session.ops, self._waiting.pop(key)
        layers = tuple(gradients)
        spectra = exact_spectra(ops, list(gradients.values()), layers[0].rank)
        self.spectra |= _by_layer(ops, layers, stack_of(ops, spectra))


def _check_finite(ops: Ops, layers: Stack, gradient: Array, where: str) -> None:
    """Raise GradientError if a stack of gradients, or the gradient of a single layer, is not finite."""
    if np.isfinite(ops.to_numpy(ops.sum(gradient))):
        return
    finite = ops.to_numpy(ops.isfinite(gradient))
    for layer, in_layer in zip(layers, finite if len(layers) > 1 else [finite], strict=True):
        if not in_layer.all():  # otherwise only the sum overflowed
            raise GradientError(
                f"layer {layer.name!r}: its gradient {where} has {int((~in_layer).sum())} of {in_layer.size} entries "
                "that are not finite, expected none; a float16 model overflows easily: use bfloat16 or float32, or "
                "look at the batches"
            )


def _by_layer(ops: Ops, layers: Stack, spectrum: Spectrum) -> dict[str, LayerSpectrum]:
    """Return the spectrum of each layer of a stack. A lazy framework computes it here.

    The vectors stay on their device and are only checked; the singular values and norms are copied.

    Raises:
        GradientError: the spectrum is not finite.
    """
    # The vectors are orthonormal, so their sum cannot overflow.
    sums = sum(ops.sum(ops.sum(x, axis=-1), axis=-1) for x in (spectrum.u, spectrum.vt))
    on_host = [ops.to_numpy(x) for x in (sums, spectrum.s, *spectrum[3:])]
    spectra = {}
    for index, (layer, own) in enumerate(zip(layers, unstacked(spectrum, len(layers)), strict=True)):
        _, s, *norms = values = [x[index] if len(layers) > 1 else x for x in on_host]
        if not all(np.isfinite(x).all() for x in values):
            raise GradientError(
                f"layer {layer.name!r}: its gradient is finite but its SVD is not; "
                "is the loss scaled to the edge of the dtype's range?"
            )
        spectra[layer.name] = LayerSpectrum(own, Spectrum(own.u, s, own.vt, *norms))
    return spectra


def _stacks(session: Session) -> list[Stack]:
    stacks: dict[Hashable, list[Layer]] = defaultdict(list)
    for layer in session.layers:
        stacks[_stack_key(session, layer)].append(layer)
    return [tuple(layers) for layers in stacks.values()]


def _stack_key(session: Session, layer: Layer) -> Hashable:
    """Return what the layers of a stack have in common; it differs for all layers if the session stacks none."""
    if not session.stacks_layers:
        return layer.name
    like = session.like(layer.name)
    return layer.out_features, layer.in_features, layer.rank, like.dtype, str(like.device)
