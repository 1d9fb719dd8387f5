"""The computations of the suite that end in a spectrum: exact, and by folds or passes that read both sides."""

from collections.abc import Sequence

import numpy as np

from lora_one.core import exact, fold, omega, sides
from lora_one.core.factors import Factors
from lora_one.core.gradient import Gradient, RowProduct, times, transposed_times
from lora_one.core.ops import Array, Ops
from lora_one.core.spectrum import Spectrum

from .types import Host, Params, View


def drawn_omega(ops: Ops, inputs: Sequence[Array], params: Params) -> Sequence[Array]:
    rows, columns = params["shape"]
    return [ops.asarray(omega.draw_omega(params["seed"], params["layer"], rows, columns), like=inputs[0])]


def exact_spectrum(ops: Ops, inputs: Sequence[Array], params: Params) -> Sequence[Array]:
    return exact.exact_spectrum(ops, inputs[0], params["rank"])


def folded_spectra(ops: Ops, inputs: Sequence[Array], params: Params) -> Sequence[Array]:
    """The product of the factors that read random sides, and the spectra at the stages that `stages` names.

    Inputs are the test matrices omega, of the norm, and of the left side; then the gradients of two batches: G, and a
    pair of rows.
    """
    start, test, left, gradient, dy, x = inputs
    gradients = [gradient, RowProduct(dy, x)]
    new = fold.start_fold(ops, start, gradient.shape[0], test)
    probes = sides.Sides(ops.concat([new.v, test], axis=-1), left)
    states = [_at_stage(ops, stage, gradients, new, probes) for stage in params["stages"]]
    lora_A, lora_B = sides.sides_as_factors(ops, probes)
    spectra = [x for state in states for x in fold.finish_fold(ops, state, params["rank"])]
    return [ops.matmul(lora_B, lora_A), *spectra]


def _at_stage(
    ops: Ops, stage: str, gradients: Sequence[Gradient], new: fold.FoldState, probes: sides.Sides
) -> fold.FoldState:
    """The state at a stage. Only what it needs is computed: a compiler takes long for each fold."""
    first, second = gradients
    match stage:
        case "1 batch":
            return fold.fold(ops, new, first)
        case "2 batches":
            return fold.fold(ops, fold.fold(ops, new, first), second)
        case "2 batches, merged":
            return fold.merge_folds(ops, fold.fold(ops, new, first), fold.fold(ops, new, second))
        case "2 batches, both sides":
            earlier = _at_stage(ops, "2 batches", gradients, new, probes)
        case "2 passes from random sides":
            earlier = fold.aim(ops, new, _read(ops, gradients, probes))
        case "3 passes from random sides":
            earlier = _at_stage(ops, "2 passes from random sides", gradients, new, probes)
        case _:
            raise ValueError(f"no such stage: {stage}")
    return fold.read_both_sides(ops, earlier, _read(ops, gradients, sides.Sides(earlier.v, earlier.u)))


def _read(ops: Ops, gradients: Sequence[Gradient], directions: sides.Sides) -> sides.Products:
    """What a backward pass does: by the chain rule, the gradient of B is G A^T, and that of A is B^T G."""
    lora_A, lora_B = sides.sides_as_factors(ops, directions)
    gradient_b = sum(times(ops, gradient, ops.matrix_transpose(lora_A)) for gradient in gradients)
    gradient_a = sum(transposed_times(ops, gradient, lora_B) for gradient in gradients)
    gradient = Factors(ops.matrix_transpose(gradient_a), gradient_b)
    return sides.products_of(ops, gradient, directions.right.shape[-1])


def fold_view(arrays: Host, inputs: Host, params: Params) -> View:
    """The views of the spectra, by stage, and the product of the factors."""
    product, *spectra = arrays
    view, size = {"random sides: B A": product}, len(Spectrum._fields)
    for index, stage in enumerate(params["stages"]):
        of_stage = spectrum_view(spectra[index * size : (index + 1) * size], inputs[3:], params)
        view.update({f"{stage}: {name}": value for name, value in of_stage.items()})
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
