"""Which frozen arrays a program multiplies with activations: the weights of linear maps, whatever layer they are in.

Found by following each array through reshapes, casts and whatever else depends on frozen arrays alone, into products.
So a scale of a norm, a table of positions that is added, or a rotation is none; an embedding is looked up.
"""

import re
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from lora_one.backends.targets import is_output_layer
from lora_one.errors import TargetsWarning

from .loss_scale import inner_programs

_PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot", "ragged_dot_general")
_NOTHING: frozenset[int] = frozenset()
Origins = frozenset[int] | None  # the frozen arrays that a value is made of; None if activations are in it


class Uses(NamedTuple):
    """Frozen arrays, by their place in the list."""

    multiplied: set[int]
    looked_up: set[int]  # read at indices that depend on the batch


def uses_of(program: Any, frozen: range) -> Uses:
    """What a jaxpr does with its frozen inputs.

    Args:
        frozen: their places among its inputs.
    """
    uses = Uses(set(), set())
    of_inputs: list[Origins] = [None] * len(program.invars)
    for index, place in enumerate(frozen):
        of_inputs[place] = frozenset({index})
    _walk(program, of_inputs, uses)
    return uses


def warn_of_left_out(names: Sequence[str | None], adapted: Iterable[str], uses: Uses) -> None:
    """Name the weights that "all-linear" left out.

    Args:
        names: of the frozen arrays, in the order of `uses`; None for one that is no weight matrix.
        adapted: the weights that have LoRA.
    """
    adapted = set(adapted)
    found = {names[i] for i in uses.multiplied - uses.looked_up}
    left = {name for name in found - adapted if name is not None and not is_output_layer(name.rpartition(".")[0])}
    if left:
        patterns = sorted({re.sub(r"(^|\.)\d+(?=\.)", r"\1*", name) for name in left})
        warnings.warn(
            f"no LoRA on {', '.join(patterns)}: the loss multiplies by these weights, but they are in no layer that is "
            f"known to be linear; it is on {len(adapted)} weights. To have it there: register_layer for an NNX layer "
            "of your own, axes={...} for a PytreeModel; to leave them out knowingly, name the targets",
            TargetsWarning,
            stacklevel=5,
        )


def _walk(program: Any, of_inputs: Sequence[Origins], uses: Uses) -> list[Origins]:
    """The origins of the outputs, from those of the inputs."""
    known: dict[Any, Origins] = dict(zip(program.invars, of_inputs, strict=True))

    def origins(variable: Any) -> Origins:  # of a literal or a constant: nothing
        return _NOTHING if hasattr(variable, "val") else known.get(variable, _NOTHING)

    for equation in program.eqns:
        given = [origins(variable) for variable in equation.invars]
        known.update(zip(equation.outvars, _outputs(equation, given, uses), strict=True))
    return [origins(variable) for variable in program.outvars]


def _outputs(equation: Any, given: list[Origins], uses: Uses) -> list[Origins]:
    name, params, count = equation.primitive.name, equation.params, len(equation.outvars)
    if name == "scan":
        carried = range(params["num_consts"], params["num_consts"] + params["num_carry"])
        inner = [None if i in carried else one for i, one in enumerate(given)]
        found = _walk(inner_programs(equation)[0], inner, uses)
        return [None if i < len(carried) else one for i, one in enumerate(found)]
    if name == "while":
        constants = given[params["cond_nconsts"] :][: params["body_nconsts"]]
        body = getattr(params["body_jaxpr"], "jaxpr", params["body_jaxpr"])
        _walk(body, [*constants, *[None] * (len(body.invars) - len(constants))], uses)
        return [None] * count
    if name == "cond":
        branches = [_walk(branch, given[1:], uses) for branch in inner_programs(equation)]
        return [_joined([given[0], *of_branches]) for of_branches in zip(*branches, strict=True)]
    inside = [inner for inner in inner_programs(equation) if len(inner.invars) == len(given)]
    if inside and name != "pallas_call":
        found = _walk(inside[0], given, uses)
        return found if len(found) == count else [_joined(given)] * count
    together = _joined(given)
    if together is None:
        frozen = frozenset().union(*(one for one in given if one is not None))
        if name in _PRODUCTS or name.endswith("_call"):  # of kernels: pallas_call, ffi_call
            uses.multiplied.update(frozen)
        elif name == "gather" and given[0] is not None:
            uses.looked_up.update(given[0])
    return [together] * count


def _joined(given: Iterable[Origins]) -> Origins:
    found: frozenset[int] = _NOTHING
    for one in given:
        if one is None:
            return None
        found |= one
    return found
