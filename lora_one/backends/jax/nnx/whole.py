"""Parameters of an NNX model that are trained whole beside LoRA: `Config.modules_to_save`.

They stay where they are, under another class. As a kind of nnx.LoRAParam they are trained, saved and restored wherever
the factors are, by the same filter.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

from lora_one.backends.jax.sites import dotted
from lora_one.backends.targets import modules_named
from lora_one.checkpoint.whole import is_within
from lora_one.checks import shown_names
from lora_one.errors import ModelError


class WholeParam(nnx.LoRAParam):
    """A parameter that is trained whole: `nnx.LoRAParam` means it, and `nnx.Param`, as it was before."""


def parameters(model: nnx.Module) -> dict[str, nnx.Variable]:
    """Return the model's parameters by path, each of them once, without the factors of LoRA."""
    return {
        dotted(path): node
        for path, node in nnx.iter_graph(model)
        if isinstance(node, nnx.Param) and (isinstance(node, WholeParam) or not isinstance(node, nnx.LoRAParam))
    }


def whole_parameters(model: nnx.Module) -> dict[str, nnx.Variable]:
    """Return the parameters that are trained whole, by path."""
    return {path: variable for path, variable in parameters(model).items() if isinstance(variable, WholeParam)}


def find_whole(model: nnx.Module, names: Sequence[str]) -> dict[str, nnx.Variable]:
    """Return the parameters, by path, of the modules that the names mean.

    Raises:
        ModelError: a name that the model does not have, or a module with a parameter that cannot be trained.
    """
    graph = {dotted(path): node for path, node in nnx.iter_graph(model)}
    chosen = modules_named(names, [path for path, node in graph.items() if path and isinstance(node, nnx.Module)])
    found = {path: variable for path, variable in parameters(model).items() if is_within(path, chosen)}
    problems = [f"{path} is {reason}" for path, variable in found.items() if (reason := refusal(variable))]
    problems += [
        f"{path} is a running statistic, which no optimizer trains"
        for path, node in graph.items()
        if isinstance(node, nnx.BatchStat) and is_within(path, chosen)
    ]
    if problems:
        raise ModelError(
            f"modules_to_save must name modules with floating parameters of the class nnx.Param, got {tuple(names)}, "
            f"where {shown_names(problems)}"
        )
    return found


def refusal(variable: nnx.Variable) -> str | None:
    """Return what a parameter is that cannot be trained whole; None for one that can."""
    if type(variable) not in (nnx.Param, WholeParam):
        return f"an nnx.{type(variable).__name__}"
    dtype: Any = getattr(variable.get_raw_value(), "dtype", None)
    return None if dtype is not None and jnp.issubdtype(dtype, jnp.floating) else f"of dtype {dtype}, quantised"


def train_whole(variables: Iterable[nnx.Variable]) -> None:
    """Let `nnx.LoRAParam` mean these parameters, in place."""
    for variable in variables:
        object.__setattr__(variable, "__class__", WholeParam)


def forget_whole(variables: Iterable[nnx.Variable]) -> None:
    """Make parameters that are trained whole ordinary ones, with the values that they have."""
    for variable in variables:
        object.__setattr__(variable, "__class__", nnx.Param)
