"""The LoRA pairs in a tree of parameters: where they are, and what their axes mean."""

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import jax
from flax import nnx

from lora_one.config import Config
from lora_one.errors import ModelError

from .layout import Layout, plain_layout
from .nnx.adopt import find_adapters
from .sites import Leaves, Site, key_names
from .trees.models import AdaptedWeight, LinenModel, PytreeModel

Path = tuple[str, ...]
Entry = TypeVar("Entry")
# The path of a pair, or its end -> the number of axes in front that count matrices, or the layout of its model.
StackAxes = Mapping[Path, int | Layout] | None


class PairPlaces(NamedTuple):
    """The places of a pair's two leaves in the list of a tree's leaves."""

    a: int
    b: int


class ModelPair(NamedTuple):
    """The LoRA pair of a layer in a model, or those of a stack of layers."""

    site: Site
    leaves: Leaves


def find_pairs(tree: Any) -> dict[Path, PairPlaces]:
    """Return the LoRA pairs of a tree, in its order, by their path up to `..._lora`.

    Raises:
        ModelError: a factor without its other.
    """
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    sides: dict[str, dict[Path, int]] = {"a": {}, "b": {}}
    for place, (keys, _) in enumerate(leaves):
        names = key_names(keys)
        for depth in range(len(names) - 1, -1, -1):
            if names[depth].endswith(("lora_a", "lora_b")):
                side, stem = names[depth][-1], names[depth][:-2]
                sides[side][(*names[:depth], stem)] = place
                break
    lonely = sorted(sides["a"].keys() ^ sides["b"].keys())
    if lonely:
        missing = "; ".join(f"{'.'.join(path)}_{'b' if path in sides['a'] else 'a'}" for path in lonely)
        raise ModelError(
            f"each lora_a needs its lora_b in the same tree, got none for: {missing}; is one of them masked or frozen?"
        )
    return {path: PairPlaces(place, sides["b"][path]) for path, place in sides["a"].items()}


def entry_of(path: Path, table: Mapping[Path, Entry]) -> Entry | None:
    """Return a pair's entry in a table of a model's pairs; the model's tree may be a branch of the pair's tree."""
    return next((table[path[begin:]] for begin in range(len(path)) if path[begin:] in table), None)


def pair_layouts(tree: Any, stack_axes: StackAxes) -> list[tuple[PairPlaces, Layout]]:
    """Return the LoRA pairs of a tree, each with the layout that its shapes give.

    Args:
        tree: parameters.
        stack_axes: what the shapes leave open.

    Raises:
        ModelError: a factor without its other, or shapes that do not fit each other or leave the layout open.
    """
    leaves = jax.tree.leaves(tree)
    stacked = stack_axes or {}
    return [
        (pair, _layout_of(path, leaves[pair.a].shape, leaves[pair.b].shape, entry_of(path, stacked)))
        for path, pair in find_pairs(tree).items()
    ]


def model_pairs(model: Any, config: Config) -> dict[Path, ModelPair]:
    """Return the LoRA pairs of a model in its own order, by their path in the tree of its factors, up to `..._lora`.

    Args:
        model: the model.
        config: gives the scaling of an nnx.LoRA, which has none of its own.

    Raises:
        ModelError: no LoRA in the model.
    """
    if isinstance(model, nnx.Module):
        adapters = find_adapters(model, config)
        pairs = {_stem(key_names(layer.a_path)): ModelPair(layer.site, layer.leaves) for layer in adapters}
    elif isinstance(model, (LinenModel, PytreeModel)):
        pairs = {(weight.layer, f"{weight.param}_lora"): _of_tree(model, weight) for weight in model.layouts}
    else:
        pairs = {}
    if not pairs:
        raise ModelError(f"the model must have LoRA layers, got none in {type(model).__name__}")
    return pairs


def _stem(path: Path) -> Path:
    return (*path[:-1], path[-1].removesuffix("_a"))


def _of_tree(model: LinenModel | PytreeModel, weight: AdaptedWeight) -> ModelPair:
    leaves, scaling = weight.leaves(model.lora), model.scaling
    rank, dtype = weight.layout.rank(leaves.a), leaves.a.dtype
    return ModelPair(Site(weight.layer, weight.layout, rank, scaling, scaling, None, dtype, None), leaves)


def _layout_of(path: Path, a: tuple[int, ...], b: tuple[int, ...], stack: int | Layout | None) -> Layout:
    if isinstance(stack, Layout):
        rank = stack.rank(jax.ShapeDtypeStruct(a, float))
        if (a, b) == (stack.a_shape(rank), stack.b_shape(rank)):
            return stack
        stack = None
    most = min(len(a), len(b)) - 2
    fits = [n for n in range(most + 1) if a[:n] == b[:n] and a[-1] == b[n]]
    if stack is not None:
        fits = [n for n in fits if n == stack]
    if len(fits) != 1:
        what = "do not fit each other" if not fits else f"fit with {' or '.join(map(str, fits))} stacked axes"
        raise ModelError(
            f"{'.'.join(path)}_a and _b must be (stack..., in..., r) and (stack..., r, out...), got {a} and {b}, which "
            f"{what}" + ("" if not fits else f": say which with stack_axes={{{path!r}: ...}}")
        )
    n = fits[0]
    return plain_layout((*a[:-1], *b[n + 1 :]), len(a) - 1 - n, len(b) - 1 - n)
