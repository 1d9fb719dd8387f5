"""Whether a model's gradients can be folded: each forward pass must call each layer once, where a tap sees it."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from lora_one.backends.interface import followed_rank
from lora_one.backends.jax.ops import JaxOps
from lora_one.backends.jax.sites import Site
from lora_one.backends.jax.tap import FOLDED
from lora_one.config import Config
from lora_one.core.fold import TEST_COLUMNS, FoldState, start_fold

from .loss_scale import inner_programs

# Primitives that run one program once, with the same outputs.
_CALLS = ("pjit", "jit", "closed_call", "core_call", "remat", "remat2", "checkpoint")


def has_rows(site: Site) -> bool:
    """Return whether a tap can stand in a site: in one matrix, whole on its device, in a layer that we adapt."""
    return not site.layout.stack and site.width is None and not isinstance(site.sharding, NamedSharding)


def abstract_states(sites: Mapping[str, Site], config: Config) -> dict[str, FoldState]:
    """Return the shapes of the states that a start gives to `fold_pass`, by site."""
    states = {}
    for name, site in sites.items():
        ins, outs = site.layout.in_features, site.layout.out_features
        width = min(followed_rank(config, site.layers()[0]) + config.oversample, ins, outs)
        omega, test = (
            jax.ShapeDtypeStruct((ins, k), jnp.promote_types(site.dtype, jnp.float32)) for k in (width, TEST_COLUMNS)
        )
        states[name] = jax.eval_shape(partial(start_fold, JaxOps(), out_features=outs), omega, test=test)
    return states


def folds_once(program: Any, sites: int) -> bool:
    """Return whether each new state of a fold step is what one fold returned, or nothing where no layer was called.

    Two calls of a layer show as a sum of two states, a call under vmap as a sum over an axis, and one in a loop or a
    branch as an output of that.

    Args:
        program: the jaxpr of the step, see `GradientFunction.fold_step`.
        sites: the number of states.
    """
    fields = len(FoldState._fields)
    tested = FoldState._fields.index("tested")  # any one would do
    outputs = [program.outvars[1 + site * (fields + 1) + tested] for site in range(sites)]
    return all(_is_one_fold(program, output) for output in outputs)


def _is_one_fold(program: Any, variable: Any) -> bool:
    makers = {output: equation for equation in program.eqns for output in equation.outvars}
    while (equation := makers.get(variable)) is not None and equation.primitive.name == "select_n":
        variable = equation.invars[-1]  # the step keeps the old state where the new one is not finite
    if equation is None:
        return False
    name = equation.primitive.name
    if name in _CALLS:
        (inner,) = inner_programs(equation)
        return _is_one_fold(inner, inner.outvars[equation.outvars.index(variable)])
    if name == "broadcast_in_dim":  # zeros
        return hasattr(equation.invars[0], "val")
    return name == "name" and equation.params["name"] == FOLDED
