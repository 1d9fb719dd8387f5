"""Passes over the model -> the spectrum of each layer's gradient, from a running SVD or from the exact gradient.

Layers of equal shape and dtype go through the algorithm together, as one stack, if the session asks for it.
"""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from .backends.checks import AGAINST_OVERFLOW
from .backends.interface import Layer, PassResult, Session, followed_rank
from .backends.numpy import NumpyOps
from .config import Config
from .core.exact import exact_spectra
from .core.fold import TEST_COLUMNS, FoldState, aim, finish_fold, read_both_sides, start_fold
from .core.gradient import Gradient, arrays_of
from .core.omega import draw_omega
from .core.ops import Array, Ops, as_one_program
from .core.sides import Products, Sides
from .core.spectrum import Spectrum, leading
from .core.stacking import stack_of, stacked, unstacked
from .errors import ChangingBatchesWarning, GradientError, warn_user
from .ranks import layer_ranks
from .report import share_of_best

ENOUGH = 0.95  # share of the energy of the best rank-r gradient at which passes="auto" stops
SAME_LOSS = 1e-3  # well above what rounding, or a shuffle that regroups the same data into batches, changes
STACK_BYTES = 2**31  # most gradients that may wait for others of their stack, to be decomposed together

Stack = tuple[Layer, ...]  # layers that go through the algorithm together
_States = dict[Stack, FoldState]


class LayerSpectrum(NamedTuple):
    """The spectrum of one layer's gradient, for the factors and for the report."""

    spectrum: Spectrum  # arrays of the framework, on the layer's device
    values: Spectrum  # the same, but with the singular values and norms as NumPy arrays

    def of_rank(self, ops: Ops, rank: int) -> "LayerSpectrum":
        """Return the spectrum of the best part of a rank, which may be smaller."""
        return LayerSpectrum(leading(ops, self.spectrum, rank), leading(NumpyOps(), self.values, rank))


class Spectra(NamedTuple):
    """The spectra of all layers' gradients, and the passes that gave them."""

    result: PassResult  # of the first pass
    passes: int
    layers: dict[str, LayerSpectrum]  # a layer that no gradient reached may be missing


def sketch_gradients(session: Session, config: Config) -> Spectra:
    """Follow each layer's gradient by a running SVD: renewed in the first pass, its sides read in each further one.

    Layers whose rows the session cannot see start from random sides, which takes two passes, at double width.

    Raises:
        GradientError: a gradient is not finite.
    """
    ops, results, states = session.ops, list[PassResult](), _States()
    unfolded: Sequence[Layer] = session.layers
    if session.folds:
        states, unfolded = _folded(session, config, results)
    if unfolded:
        states |= _of_random_sides(session, config, unfolded, results)
    while len(results) < config.pass_counts[-1]:
        if len(results) >= config.pass_counts[0] and session.all_agree(_hold_enough(session, config, states)):
            break
        _read(session, states, results)
    spectra: dict[str, LayerSpectrum] = {}
    for layers in list(states):
        spectra |= _finish(ops, config, layers, states.pop(layers))
    return Spectra(results[0], len(results), spectra)


def _folded(session: Session, config: Config, results: list[PassResult]) -> tuple[_States, list[Layer]]:
    """Make the pass that folds. Return the states, and the layers that it could not fold."""
    ops, states = session.ops, dict[str, FoldState]()
    for layers, state in _start(session, config, session.layers, random_sides=False).items():
        names = [layer.name for layer in layers]
        states |= zip(names, unstacked(state, len(layers)), strict=True)
    result, folded = session.fold_pass(states)
    results.append(result)
    reached: dict[Hashable, dict[Layer, FoldState]] = defaultdict(dict)
    for layer in session.layers:
        of_layer = folded.pop(layer.name)
        if of_layer is not None and layer.name not in result.not_folded:
            reached[_stack_key(session, layer)][layer] = of_layer
    stacks: _States = {}
    for of_kind in reached.values():
        layers = tuple(of_kind)
        stacks[layers] = stack_of(ops, list(of_kind.values()))
        _check_finite(ops, layers, stacks[layers].tested, "in pass 1")
    return stacks, [layer for layer in session.layers if layer.name in result.not_folded]


def _of_random_sides(session: Session, config: Config, layers: Sequence[Layer], results: list[PassResult]) -> _States:
    """Make two passes that read sides: random ones, and those that the first pass found."""
    ops, states = session.ops, _start(session, config, layers, random_sides=True)
    sides = {of_stack: Sides(ops.concat([x.v, x.test], axis=-1), x.u) for of_stack, x in states.items()}
    for of_stack, products in _products(session, sides, results).items():
        states[of_stack] = aim(ops, states[of_stack], products)
    _read(session, states, results)
    return states


def _read(session: Session, states: _States, results: list[PassResult]) -> None:
    """Make a pass that reads the sides of all states, and renew them in place."""
    sides = {layers: Sides(state.v, state.u) for layers, state in states.items()}
    for layers, products in _products(session, sides, results).items():
        states[layers] = as_one_program(session.ops, read_both_sides)(states[layers], products)
        # A lazy framework computes the state here, and frees the products.
        session.ops.to_numpy(session.ops.sum(states[layers].s))


def _products(session: Session, sides: dict[Stack, Sides], results: list[PassResult]) -> dict[Stack, Products]:
    ops, number = session.ops, len(results) + 1
    by_layer = {
        layer.name: of_layer
        for layers, of_stack in sides.items()
        for layer, of_layer in zip(layers, unstacked(of_stack, len(layers)), strict=True)
    }
    result, products = session.sides_pass(by_layer)
    results.append(result)
    _warn_if_batches_changed(results)
    stacks = {}
    for layers in sides:
        in_stack = [products.pop(layer.name) or _zeros(ops, layer, by_layer[layer.name]) for layer in layers]
        stacks[layers] = stack_of(ops, in_stack)
        for array in stacks[layers]:
            _check_finite(ops, layers, array, f"in pass {number}")
    return stacks


def _start(session: Session, config: Config, layers: Sequence[Layer], random_sides: bool) -> _States:
    """Return the state of each stack before the first pass; with random sides it is twice as wide, and u is random."""
    ops, states = session.ops, _States()
    with ThreadPoolExecutor() as pool:  # NumPy draws without Python's lock; a GPU would wait for one thread

        def drawn(stack: Stack, suffix: str, rows: int, columns: int) -> Array:
            draws = pool.map(lambda layer: draw_omega(config.seed, layer.name + suffix, rows, columns), stack)
            return stacked(ops, [ops.asarray(x, like=session.like(stack[0].name)) for x in draws])

        for stack in _stacks(session, layers):
            out_features, in_features = stack[0].out_features, stack[0].in_features
            directions = followed_rank(config, stack[0]) + config.oversample
            width = min((2 if random_sides else 1) * directions, out_features, in_features)
            omega, test = drawn(stack, "", in_features, width), drawn(stack, ", test", in_features, TEST_COLUMNS)
            states[stack] = start_fold(ops, omega, out_features, test)
            if random_sides:
                u, _ = ops.qr(drawn(stack, ", left", out_features, width))
                states[stack] = states[stack]._replace(u=u)
    return states


def _zeros(ops: Ops, layer: Layer, sides: Sides) -> Products:
    """Return the products of a layer that no gradient reached: it keeps plain LoRA's start."""
    right, left = sides
    return Products(
        ops.zeros((layer.out_features, right.shape[1]), like=right),
        ops.zeros((layer.in_features, left.shape[1]), like=left),
    )


def _warn_if_batches_changed(results: list[PassResult]) -> None:
    first, last = results[0].loss, results[-1].loss
    if abs(last - first) > SAME_LOSS * (1.0 + abs(first)):
        warn_user(
            f"the loss on the init batches was {first:.6g} in pass 1 and {last:.6g} in pass {len(results)}, "
            "expected the same: do the batches change from one reading to the next, is loss_fn random?",
            ChangingBatchesWarning,
        )


def _hold_enough(session: Session, config: Config, states: _States) -> bool:
    """Return whether the factors of all layers would hold enough, by the report's own estimate."""
    spectra: dict[str, Spectrum] = {}
    for layers, state in states.items():
        finished = _finish(session.ops, config, layers, state)
        spectra |= {name: of_layer.values for name, of_layer in finished.items() if of_layer.values.s[0] > 0}
    ranks = layer_ranks(session.layers, config, spectra)
    return all(share_of_best(leading(NumpyOps(), x, ranks[name])) >= ENOUGH for name, x in spectra.items())


def _finish(ops: Ops, config: Config, layers: Stack, state: FoldState) -> dict[str, LayerSpectrum]:
    finish = as_one_program(ops, finish_fold, ("rank",))
    return _by_layer(ops, layers, finish(state, rank=followed_rank(config, layers[0])))


def exact_gradients(session: Session, config: Config) -> Spectra:
    """Make one pass that forms each layer's gradient, and decompose the gradients as they come.

    Raises:
        GradientError: a gradient is not finite.
    """
    decomposer = _Decomposer(session, config)
    result = session.exact_pass(decomposer.add)
    decomposer.decompose_all()
    return Spectra(result, 1, decomposer.spectra)


class _Decomposer:
    """Gradients that wait for others of their stack, up to `STACK_BYTES`, and the spectra of those decomposed."""

    def __init__(self, session: Session, config: Config):
        self.spectra: dict[str, LayerSpectrum] = {}
        self._session, self._config = session, config
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
        spectra = exact_spectra(ops, list(gradients.values()), followed_rank(self._config, layers[0]))
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
                f"that are not finite, expected none; {AGAINST_OVERFLOW}"
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


def _stacks(session: Session, layers: Sequence[Layer]) -> list[Stack]:
    stacks: dict[Hashable, list[Layer]] = defaultdict(list)
    for layer in layers:
        stacks[_stack_key(session, layer)].append(layer)
    return [tuple(of_kind) for of_kind in stacks.values()]


def _stack_key(session: Session, layer: Layer) -> Hashable:
    """Return what the layers of a stack have in common; it differs for all layers if the session stacks none."""
    if not session.stacks_layers:
        return layer.name
    like = session.like(layer.name)
    return layer.out_features, layer.in_features, layer.rank, like.dtype, str(like.device)
