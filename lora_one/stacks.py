"""Layers that are alike: where a device waits for launches, they go together, as arrays with one more axis in front."""

from collections import defaultdict
from collections.abc import Hashable

from .backends.interface import Layer, Session


def kind(session: Session, layer: Layer) -> Hashable:
    """What layers have in common whose arrays can be stacked: all that they are, where the session stacks none."""
    if not session.stacked:
        return layer.name
    like = session.like(layer.name)
    return layer.out_features, layer.in_features, layer.rank, like.dtype, str(like.device)


def groups(session: Session) -> list[tuple[Layer, ...]]:
    """All layers, those of a kind together."""
    found: dict[Hashable, list[Layer]] = defaultdict(list)
    for layer in session.layers:
        found[kind(session, layer)].append(layer)
    return [tuple(layers) for layers in found.values()]
