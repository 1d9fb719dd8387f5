"""Probes as factors of a model, and the gradients of the factors as the spec's matrices.

Some layers fix the number of columns that their factors have (`Site.width`). A wider probe goes through such a layer
in turns, one pass over the batches each.
"""

from collections.abc import Iterator, Mapping
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from lora_one.backends.jax.layout import Layout
from lora_one.backends.jax.sites import Leaves, Site
from lora_one.core.sketch import Probe, Side

Sites = Mapping[str, Site]


def installed(sites: Sites, probes: Mapping[str, Probe]) -> dict[str, Leaves]:
    """Return the factors of each site that hold its probes, one per matrix, the other side zero.

    Args:
        sites: name -> site.
        probes: layer -> probe; all matrices of a site have theirs on one side.
    """
    factors = [[probes[layer.name].factor for layer in site.layers()] for site in sites.values()]
    leaves = _installed(_layouts(sites), _sides(sites, probes), factors)
    return dict(zip(sites, leaves, strict=True))


def column_turns(sites: Sites, factors: Mapping[str, Leaves]) -> Iterator[dict[str, Leaves]]:
    """Yield the factors of each pass, where they belong; sites of any width get all of theirs in each pass."""
    turns = max(
        -(-leaves.a.shape[-1] // sites[name].width) if sites[name].width else 1 for name, leaves in factors.items()
    )
    for turn in range(turns):
        yield {name: sites[name].place(_columns(sites[name], leaves, turn)) for name, leaves in factors.items()}


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
    joined = [_joined(site, [turn[name] for turn in turns], factors[name].a.shape[-1]) for name, site in sites.items()]
    natives = tuple(site.native for site in sites.values())
    matrices = _at_scale_1(_layouts(sites), natives, _sides(sites, probes), joined)
    names = [layer.name for site in sites.values() for layer in site.layers()]
    return dict(zip(names, matrices, strict=True))


def _layouts(sites: Sites) -> tuple[Layout, ...]:
    return tuple(site.layout for site in sites.values())


def _sides(sites: Sites, probes: Mapping[str, Probe]) -> tuple[Side, ...]:
    return tuple(probes[site.layers()[0].name].side for site in sites.values())


def _columns(site: Site, leaves: Leaves, turn: int) -> Leaves:
    """Return the columns of this turn, padded with zeros to the width of the site."""
    if site.width is None:
        return leaves
    axis = len(site.layout.stack)
    start, stop = turn * site.width, (turn + 1) * site.width
    a = leaves.a[..., start:stop]
    b = lax.slice_in_dim(leaves.b, min(start, leaves.b.shape[axis]), min(stop, leaves.b.shape[axis]), axis=axis)
    missing = site.width - a.shape[-1]
    return Leaves(
        jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, missing)]),
        jnp.pad(b, [(0, missing if i == axis else 0) for i in range(b.ndim)]),
    )


def _joined(site: Site, turns: list[Leaves], columns: int) -> Leaves:
    """Return the gradients of all columns from those of each turn."""
    if site.width is None:
        return turns[0]
    axis = len(site.layout.stack)
    a = jnp.concatenate([leaves.a for leaves in turns], axis=-1)[..., :columns]
    b = jnp.concatenate([leaves.b for leaves in turns], axis=axis)
    return Leaves(a, lax.slice_in_dim(b, 0, columns, axis=axis))


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
