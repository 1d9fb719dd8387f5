"""The computations of the suite that end in a spectrum: exact, by passes of the sketch, and by a fold."""

from collections.abc import Sequence

import numpy as np

from lora_one.core import exact, fold, omega, sides, sketch
from lora_one.core.gradient import Gradient, RowProduct, times, transposed_times
from lora_one.core.ops import Array, Ops
from lora_one.core.spectrum import Spectrum

from .types import Host, Params, View


def drawn_omega(ops: Ops, inputs: Sequence[Array], params: Params) -> Sequence[Array]:
    rows, columns = params["shape"]
    return [ops.asarray(omega.draw_omega(params["seed"], params["layer"], rows, columns), like=inputs[0])]


def exact_spectrum(ops: Ops, inputs: Sequence[Array], params: Params) -> Sequence[Array]:
    return exact.exact_spectrum(ops, inputs[0], params["rank"])


def sketched_spectra(ops: Ops, inputs: Sequence[Array], params: Params) -> Sequence[Array]:
    """The spectra after 2, 3, ... passes. The gradients of the probes are products with G."""
    gradient, omega = inputs
    state = sketch.start(ops, omega, gradient.shape[0])
    spectra: list[Array] = []
    for passes in range(1, params["passes"] + 1):
        state = sketch.advance_on(ops, state, gradient)
        if passes >= 2:
            spectra.extend(sketch.finish(ops, state, params["rank"]))
    return spectra


def folded_spectra(ops: Ops, inputs: Sequence[Array], params: Params) -> Sequence[Array]:
    """The spectra after each batch, after a pass that reads both sides, and of two processes that merge.

    Inputs are omega, the test matrix, and the gradients of the batches: G, or a pair of rows where `rows` says so.
    """
    start, test, *arrays = inputs
    gradients: list[Gradient] = []
    for is_rows in params["rows"]:
        gradients.append(RowProduct(arrays.pop(0), arrays.pop(0)) if is_rows else arrays.pop(0))
    shape, rank = gradients[0].shape, params["rank"]
    state = first = fold.start_fold(ops, start, shape[0], test)
    spectra: list[Array] = []
    states = []
    for gradient in gradients:
        state = fold.fold(ops, state, gradient)
        states.append(fold.fold(ops, first, gradient))
        spectra.extend(fold.finish_fold(ops, state, rank))
    g_v = sum(times(ops, gradient, state.v) for gradient in gradients)
    g_u = sum(transposed_times(ops, gradient, state.u) for gradient in gradients)
    spectra.extend(fold.finish_fold(ops, fold.read_both_sides(ops, state, sides.Products(g_v, g_u)), rank))
    spectra.extend(fold.finish_fold(ops, fold.merge_folds(ops, *states[:2]), rank))
    return spectra


def fold_view(arrays: Host, inputs: Host, params: Params) -> View:
    view: View = {}
    size = len(Spectrum._fields)
    batches = len(params["rows"])
    names = [*(f"{index + 1} batches" for index in range(batches)), "both sides", "merged"]
    for index, name in enumerate(names):
        part = spectrum_view(arrays[index * size : (index + 1) * size], inputs[2:], params)
        view.update({f"{name}: {key}": value for key, value in part.items()})
    return view


def sketch_view(arrays: Host, inputs: Host, params: Params) -> View:
    view: View = {}
    size = len(Spectrum._fields)
    for index in range(len(arrays) // size):
        after_pass = spectrum_view(arrays[index * size : (index + 1) * size], inputs, params)
        view.update({f"{index + 2} passes: {name}": value for name, value in after_pass.items()})
    return view


def spectrum_view(arrays: Host, inputs: Host, params: Params) -> View:
    """The well-defined parts of a spectrum, in units of the largest entry of G: no square over- or underflows."""
    spectrum = Spectrum(*arrays)
    unit = float(np.max(np.abs(inputs[0]))) or 1.0
    s, norm = spectrum.s / unit, float(spectrum.norm) / unit
    view = {
        "S": s,
        "norm": np.array(norm),
        "best norm": np.array(float(spectrum.best_norm) / unit),
        # A square root near zero magnifies rounding; its square does not.
        "norm^2 + unseen^2": np.array(norm**2 + (float(spectrum.unseen) / unit) ** 2),
        "norm^2 + norm error": np.array(norm**2 + norm * float(spectrum.norm_error) / unit),
        "U^T U": spectrum.u.T @ spectrum.u,
        "V^T V": spectrum.vt @ spectrum.vt.T,
    }
    if params["gap"]:
        view["U S V^T"] = (spectrum.u * s) @ spectrum.vt
    if params["signs"]:
        rows = np.argmax(np.abs(spectrum.u), axis=0)
        view["signs"] = np.sign(spectrum.u[rows, np.arange(spectrum.u.shape[1])])
    return view
