"""Probes as factors of a model, and the gradients of the factors as the spec's matrices."""

from collections.abc import Mapping
from functools import partial

import jax
from jax import Array

from lora_one.backends.jax.layout import Layout
from lora_one.backends.jax.sites import Leaves
from lora_one.core.sketch import Probe, Side

from .sides import Sites, joined


def installed(sites: Sites, probes: Mapping[str, Probe]) -> dict[str, Leaves]:
    """Return the factors of each site that hold its probes, one per matrix, the other side zero.

    Args:
        sites: name -> site.
        probes: layer -> probe; all matrices of a site have theirs on one side.
    """
    factors = [[probes[layer.name].factor for layer in site.layers()] for site in sites.values()]
    leaves = _installed(_layouts(sites), _sides(sites, probes), factors)
    return dict(zip(sites, leaves, strict=True))


def matrix_gradients(
    sites: Sites, probes: Mapping[str, Probe], turns: list[dict[str, Leaves]], factors: Mapping[str, Leaves]
) -> dict[str, Array]:
    """Return the gradient of each layer's zero factor, as if the layer multiplied by 1.

    Args:
        sites: name -> site.
        probes: layer -> probe.
        turns: site -> gradients of its factors, for each of `column_turns`.
        factors: what `installed` returned.
    """
    natives = tuple(site.native for site in sites.values())
    matrices = _at_scale_1(_layouts(sites), natives, _sides(sites, probes), joined(sites, turns, factors))
    names = [layer.name for site in sites.values() for layer in site.layers()]
    return dict(zip(names, matrices, strict=True))


def _layouts(sites: Sites) -> tuple[Layout, ...]:
    return tuple(site.layout for site in sites.values())


def _sides(sites: Sites, probes: Mapping[str, Probe]) -> tuple[Side, ...]:
    return tuple(probes[site.layers()[0].name].side for site in sites.values())


# The next two functions treat all layers in one program: without jit, each operation would be compiled for each shape.
@partial(jax.jit, static_argnums=(0, 1))
def _installed(layouts: tuple[Layout, ...], sides: tuple[Side, ...], factors: list[list[Array]]) -> list[Leaves]:
    return [Leaves(*layout.probed(side, group)) for layout, side, group in zip(layouts, sides, factors, strict=True)]


@partial(jax.jit, static_argnums=(0, 1, 2))
def _at_scale_1(
    layouts: tuple[Layout, ...], natives: tuple[float, ...], sides: tuple[Side, ...], gradients: list[Leaves]
) -> list[Array]:
    """Return the gradient of each matrix's zero factor; `sides` are those of the probes, not of the zero factors."""
    matrices: list[Array] = []
    for layout, native, side, leaves in zip(layouts, natives, sides, gradients, strict=True):
        factors = layout.lora_Bs(leaves.b) if side == "A" else layout.lora_As(leaves.a)
        matrices += [factor / native for factor in factors]
    return matrices
