"""Find the frozen arrays that a program multiplies with activations: the weights of linear maps in any layer.

Each array is followed through reshapes, casts and whatever else depends on frozen arrays only, into products. So a
norm's scale, a table of positions that is added, and a rotation do not count; an embedding is looked up.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from lora_one.backends.targets import is_output_layer
from lora_one.errors import TargetsWarning, warn_user

from .loss_scale import inner_programs

_PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot", "ragged_dot_general")
_NOTHING: frozenset[int] = frozenset()
Origins = frozenset[int] | None  # the frozen arrays that a value is made of; None if activations are in it


class Uses(NamedTuple):
    """The uses of frozen arrays, which are named by their place in the list."""

    multiplied: set[int]
    looked_up: set[int]  # read at indices that depend on the batch


def uses_of(program: Any, frozen: range) -> Uses:
    """Return what a jaxpr does with its frozen inputs.

    Args:
        program: the jaxpr.
        frozen: places of the frozen arrays among its inputs.
    """
    uses = Uses(set(), set())
    inputs: list[Origins] = [None] * len(program.invars)
    for index, place in enumerate(frozen):
        inputs[place] = frozenset({index})
    _walk(program, inputs, uses)
    return uses


def warn_of_left_out(names: Sequence[str | None], adapted: Iterable[str], uses: Uses) -> None:
    """Warn of the weights that "all-linear" left out.

    Args:
        names: names of the frozen arrays, in the order of `uses`; None for one that is no weight matrix.
        adapted: the weights that have LoRA.
        uses: what the loss does with the frozen arrays.
    """
    adapted = set(adapted)
    weights = {names[i] for i in uses.multiplied - uses.looked_up}
    left = {name for name in weights - adapted if name is not None and not is_output_layer(name.rpartition(".")[0])}
    if left:
        patterns = sorted({re.sub(r"(^|\.)\d+(?=\.)", r"\1*", name) for name in left})
        warn_user(
            f"no LoRA on {', '.join(patterns)}: the loss multiplies by these weights, but they are in no layer that is "
            f"known to be linear; it is on {len(adapted)} weights. To have it there: name an nnx.Conv in targets, "
            "register_layer for an NNX layer "
            "of your own, axes={...} for a PytreeModel; to leave them out knowingly, name the targets",
            TargetsWarning,
        )


def _walk(program: Any, inputs: Sequence[Origins], uses: Uses) -> list[Origins]:
    """Return the origins of a program's outputs from those of its inputs, and add its uses."""
    by_variable: dict[Any, Origins] = dict(zip(program.invars, inputs, strict=True))

    def origins(variable: Any) -> Origins:  # a literal or a constant has none
        return _NOTHING if hasattr(variable, "val") else by_variable.get(variable, _NOTHING)

    for equation in program.eqns:
        operands = [origins(variable) for variable in equation.invars]
        by_variable.update(zip(equation.outvars, _outputs(equation, operands, uses), strict=True))
    return [origins(variable) for variable in program.outvars]


def _outputs(equation: Any, operands: list[Origins], uses: Uses) -> list[Origins]:
    name, params, count = equation.primitive.name, equation.params, len(equation.outvars)
    if name == "scan":
        carried = range(params["num_consts"], params["num_consts"] + params["num_carry"])
        inputs = [None if i in carried else origins for i, origins in enumerate(operands)]
        outputs = _walk(inner_programs(equation)[0], inputs, uses)
        return [None if i < len(carried) else origins for i, origins in enumerate(outputs)]
    if name == "while":
        constants = operands[params["cond_nconsts"] :][: params["body_nconsts"]]
        body = getattr(params["body_jaxpr"], "jaxpr", params["body_jaxpr"])
        _walk(body, [*constants, *[None] * (len(body.invars) - len(constants))], uses)
        return [None] * count
    if name == "cond":
        branches = [_walk(branch, operands[1:], uses) for branch in inner_programs(equation)]
        return [_union([operands[0], *outputs]) for outputs in zip(*branches, strict=True)]
    inside = [inner for inner in inner_programs(equation) if len(inner.invars) == len(operands)]
    if inside and name != "pallas_call":
        outputs = _walk(inside[0], operands, uses)
        return outputs if len(outputs) == count else [_union(operands)] * count
    together = _union(operands)
    if together is None:
        frozen = frozenset().union(*(origins for origins in operands if origins is not None))
        if name in _PRODUCTS or name.endswith("_call"):  # kernels: pallas_call, ffi_call
            uses.multiplied.update(frozen)
        elif name == "gather" and operands[0] is not None:
            uses.looked_up.update(operands[0])
    return [together] * count


def _union(operands: Iterable[Origins]) -> Origins:
    """Return the origins of a value that depends on all operands."""
    union: frozenset[int] = _NOTHING
    for origins in operands:
        if origins is None:
            return None
        union |= origins
    return union
