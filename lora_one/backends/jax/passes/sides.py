"""The sides of `lora_one.core.sides` as factors of a model, and the gradients of the factors as products.

Some layers fix the number of columns that their factors have (`Site.width`). More columns go through such a layer in
turns, one pass over the batches each.
"""

from collections.abc import Iterator, Mapping
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from lora_one.backends.jax.layout import Layout
from lora_one.backends.jax.ops import JaxOps
from lora_one.backends.jax.sites import Leaves, Site
from lora_one.core.factors import Factors
from lora_one.core.sides import Products, Sides, products_of, sides_as_factors

_OPS = JaxOps()

Sites = Mapping[str, Site]


def installed_sides(sites: Sites, sides: Mapping[str, Sides]) -> dict[str, Leaves]:
    """Return the factors of each site that read its layers' gradients in the given directions.

    Args:
        sites: name -> site.
        sides: layer -> its sides; layers without an entry get zeros.
    """
    groups = [_of_all_layers(site, sides) for site in sites.values()]
    return dict(zip(sites, _installed(_layouts(sites), groups), strict=True))


def products_by_layer(
    sites: Sites, sides: Mapping[str, Sides], turns: list[dict[str, Leaves]], factors: Mapping[str, Leaves]
) -> dict[str, Products]:
    """Return the products of each layer that has sides, as if the layer multiplied its pair by 1.

    Args:
        sites: name -> site.
        sides: layer -> its sides.
        turns: site -> gradients of its factors, for each of `column_turns`.
        factors: what `installed_sides` returned.
    """
    rights = {
        site.name: sides[layer.name].right for site in sites.values() for layer in site.layers() if layer.name in sides
    }
    columns = tuple(rights[name].shape[-1] if name in rights else 0 for name in sites)
    natives = tuple(site.native for site in sites.values())
    products = _products(_layouts(sites), natives, columns, joined(sites, turns, factors))
    names = [layer.name for site in sites.values() for layer in site.layers()]
    return {name: product for name, product in zip(names, products, strict=True) if name in sides}


def column_turns(sites: Sites, factors: Mapping[str, Leaves]) -> Iterator[dict[str, Leaves]]:
    """Yield the factors of each pass, where they belong; sites of any width get all of theirs in each pass."""
    turns = max(
        -(-leaves.a.shape[-1] // sites[name].width) if sites[name].width else 1 for name, leaves in factors.items()
    )
    for turn in range(turns):
        yield {name: sites[name].place(_columns(sites[name], leaves, turn)) for name, leaves in factors.items()}


def joined(sites: Sites, turns: list[dict[str, Leaves]], factors: Mapping[str, Leaves]) -> list[Leaves]:
    """Return the gradients of all columns of each site, from those of each of `column_turns`."""
    return [_joined(site, [turn[name] for turn in turns], factors[name].a.shape[-1]) for name, site in sites.items()]


def _layouts(sites: Sites) -> tuple[Layout, ...]:
    return tuple(site.layout for site in sites.values())


def _of_all_layers(site: Site, sides: Mapping[str, Sides]) -> list[Sides]:
    """Return the sides of all matrices of a site: zeros, as many as of the others, where none are given."""
    given = [sides.get(layer.name) for layer in site.layers()]
    example = next((one for one in given if one is not None), None)
    p, q = (0, 0) if example is None else (side.shape[-1] for side in example)
    dtype = jnp.promote_types(site.dtype, jnp.float32)
    zeros = Sides(jnp.zeros((site.layout.in_features, p), dtype), jnp.zeros((site.layout.out_features, q), dtype))
    return [zeros if one is None else one for one in given]


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
    if site.width is None:
        return turns[0]
    axis = len(site.layout.stack)
    a = jnp.concatenate([leaves.a for leaves in turns], axis=-1)[..., :columns]
    b = jnp.concatenate([leaves.b for leaves in turns], axis=axis)
    return Leaves(a, lax.slice_in_dim(b, 0, columns, axis=axis))


# The next two functions treat all layers in one program: without jit, each operation would be compiled for each shape.
@partial(jax.jit, static_argnums=0)
def _installed(layouts: tuple[Layout, ...], groups: list[list[Sides]]) -> list[Leaves]:
    return [
        Leaves(*layout.leaves([sides_as_factors(_OPS, sides) for sides in group]))
        for layout, group in zip(layouts, groups, strict=True)
    ]


@partial(jax.jit, static_argnums=(0, 1, 2))
def _products(
    layouts: tuple[Layout, ...], natives: tuple[float, ...], columns: tuple[int, ...], gradients: list[Leaves]
) -> list[Products]:
    """Return the products of each matrix; `columns` are the numbers of right columns."""
    products: list[Products] = []
    for layout, native, right, leaves in zip(layouts, natives, columns, gradients, strict=True):
        for pair in layout.pairs(*leaves):
            products.append(products_of(_OPS, Factors(pair.lora_A / native, pair.lora_B / native), right))
    return products
