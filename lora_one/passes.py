"""Passes over the model -> what is known of each layer's gradient: by a sketch, or exactly.

Layers that are alike go through the algorithm together where the session says so.
"""

import warnings
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
from .errors import ChangingBatchesWarning, GradientError
from .report import share_of_best

ENOUGH = 0.99  # of the energy of the best rank-r gradient: where passes="auto" stops
SAME_LOSS = 1e-3  # well above what rounding, and batches regrouped by a shuffle, make of the same data
STACK_BYTES = 2**31  # of gradients that wait for others like them, to be decomposed together


_States = dict[tuple[Layer, ...], SketchState]  # of the layers of each stack


class Found(NamedTuple):
    spectrum: Spectrum
    values: Spectrum  # with the singular values and norms as NumPy arrays


class Spectra(NamedTuple):
    result: PassResult
    passes: int
    layers: dict[str, Found]  # a layer that no gradient reached may be missing


def sketched(session: Session, config: Config) -> Spectra:
    ops = session.ops
    states = _start(session, config)
    spectra: dict[str, Found] | None = None
    suspect: Layer | None = None
    for number in range(1, config.pass_counts[-1] + 1):
        probes = {
            layer.name: Probe(side, factor if len(layers) == 1 else factor[index])
            for layers, state in states.items()
            for side, factor in [probe(ops, state)]
            for index, layer in enumerate(layers)
        }
        result, gradients = session.sketch_pass(probes)
        for layers, state in states.items():
            some = [_or_zeros(ops, gradients.pop(layer.name), probes.pop(layer.name), layer) for layer in layers]
            gradient = stacked(ops, some)
            _check_finite(ops, layers, gradient, f"in pass {number}")
            states[layers] = advance(ops, state, gradient)
            # A lazy framework computes the state here, and lets the gradient go.
            ops.to_numpy(ops.sum(states[layers].coordinates[-1]))
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
            may_go_on = number < config.pass_counts[-1]
            suspect = _lacking(ops, states, suspect) if may_go_on and suspect is not None else None
            if suspect is None:
                spectra, suspect = _finished(ops, states, may_go_on)
            if session.all_agree(spectra is not None):
                break
    assert spectra is not None
    return Spectra(first, number, spectra)


def _start(session: Session, config: Config) -> _States:
    """A state for the layers of each kind."""
    ops = session.ops

    def drawn(layer: Layer) -> np.ndarray:
        width = min(layer.rank + config.oversample, layer.out_features, layer.in_features)
        return draw_omega(config.seed, layer.name, layer.in_features, width)

    states = {}
    with ThreadPoolExecutor() as pool:  # NumPy draws outside of Python's lock; a GPU would wait for it
        for layers in _groups(session):
            like = session.like(layers[0].name)
            omega = stacked(ops, [ops.asarray(x, like=like) for x in pool.map(drawn, layers)])
            states[layers] = start(ops, omega, layers[0].out_features)
    return states


def _or_zeros(ops: Ops, gradient: Array | None, probe: Probe, layer: Layer) -> Array:
    """No gradient is one of zeros: such a layer keeps plain LoRA's start."""
    if gradient is not None:
        return gradient
    if probe.side == "A":
        return ops.zeros((layer.out_features, probe.factor.shape[0]), like=probe.factor)
    return ops.zeros((probe.factor.shape[1], layer.in_features), like=probe.factor)


def _finished(ops: Ops, states: _States, may_go_on: bool) -> tuple[dict[str, Found] | None, Layer | None]:
    """The spectra of all layers; or where more passes may be made and one holds too little, that layer."""
    spectra: dict[str, Found] = {}
    for layers, state in states.items():
        found = _by_layer(ops, layers, finish(ops, state, layers[0].rank))
        worst = min(layers, key=lambda layer: _share(found[layer.name].values))
        if may_go_on and _share(found[worst.name].values) < ENOUGH:
            return None, worst
        spectra |= found
    return spectra, None


def _lacking(ops: Ops, states: _States, layer: Layer) -> Layer | None:
    """The layer itself if it holds too little: one that did after the pass before is asked alone, before all others."""
    [(layers, state)] = [(layers, state) for layers, state in states.items() if layer in layers]
    alone = one_of(state, layers.index(layer), len(layers))
    found = _by_layer(ops, (layer,), finish(ops, alone, layer.rank))
    return layer if _share(found[layer.name].values) < ENOUGH else None


def _share(values: Spectrum) -> float:
    """Of the best energy; a layer without a gradient has all there is."""
    return share_of_best(values) if values.s[0] > 0 else 1.0


def exact(session: Session) -> Spectra:
    ops = session.ops
    layer_of = {layer.name: layer for layer in session.layers}
    spectra: dict[str, Found] = {}
    waiting: dict[Hashable, dict[Layer, Gradient]] = defaultdict(dict)

    def size(of_kind: Hashable) -> int:
        return sum(array.nbytes for gradient in waiting[of_kind].values() for array in arrays_of(gradient))

    def decompose(of_kind: Hashable) -> None:
        some = waiting.pop(of_kind)
        layers = tuple(some)
        found = exact_spectra(ops, list(some.values()), layers[0].rank)
        spectra.update(_by_layer(ops, layers, stack_of(ops, found)))

    def consume(name: str, gradient: Gradient) -> None:
        layer = layer_of[name]
        for array in arrays_of(gradient):
            _check_finite(ops, (layer,), array, "of the weight")
        of_kind = _kind(session, layer)
        waiting[of_kind][layer] = gradient
        if not session.stacks_layers:  # there is no other of its kind
            decompose(of_kind)
        while sum(map(size, waiting)) > STACK_BYTES:
            decompose(max(waiting, key=size))

    result = session.exact_pass(consume)
    for of_kind in list(waiting):
        decompose(of_kind)
    return Spectra(result, 1, spectra)


def _check_finite(ops: Ops, layers: tuple[Layer, ...], gradient: Array, where: str) -> None:
    """Of one layer, or of a stack."""
    if np.isfinite(ops.to_numpy(ops.sum(gradient))):
        return
    finite = ops.to_numpy(ops.isfinite(gradient))
    for layer, its in zip(layers, finite if len(layers) > 1 else [finite], strict=True):
        if not its.all():  # it may be the sum alone that overflows
            raise GradientError(
                f"layer {layer.name!r}: its gradient {where} has {int((~its).sum())} of {its.size} entries that are "
                "not finite, expected none; a float16 model overflows easily: use bfloat16 or float32, or look at the "
                "batches"
            )


def _by_layer(ops: Ops, layers: tuple[Layer, ...], spectrum: Spectrum) -> dict[str, Found]:
    """The spectrum of each layer of a stack. A lazy framework computes it here.

    The vectors stay where they are, and are only checked.

    Raises:
        GradientError: something is not finite.
    """
    # The vectors are orthonormal: their sum cannot overflow.
    entries = sum(ops.sum(ops.sum(x, axis=-1), axis=-1) for x in (spectrum.u, spectrum.vt))
    on_host = [ops.to_numpy(x) for x in (entries, spectrum.s, *spectrum[3:])]
    found = {}
    for index, (layer, its) in enumerate(zip(layers, unstacked(spectrum, len(layers)), strict=True)):
        _, s, *norms = values = [x[index] if len(layers) > 1 else x for x in on_host]
        if not all(np.isfinite(x).all() for x in values):
            raise GradientError(
                f"layer {layer.name!r}: its gradient is finite but its SVD is not; "
                "is the loss scaled to the edge of the dtype's range?"
            )
        found[layer.name] = Found(its, Spectrum(its.u, s, its.vt, *norms))
    return found


def _kind(session: Session, layer: Layer) -> Hashable:
    """What layers have in common whose arrays can be stacked: all that they are, where the session stacks none."""
    if not session.stacks_layers:
        return layer.name
    like = session.like(layer.name)
    return layer.out_features, layer.in_features, layer.rank, like.dtype, str(like.device)


def _groups(session: Session) -> list[tuple[Layer, ...]]:
    """All layers, those of a kind together."""
    found: dict[Hashable, list[Layer]] = defaultdict(list)
    for layer in session.layers:
        found[_kind(session, layer)].append(layer)
    return [tuple(layers) for layers in found.values()]
