"""The layers of a model by kind, such as q_proj, and by their place among those of their kind."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

Series = Sequence[tuple[int, float]]  # pairs of a place and a number


class Place(NamedTuple):
    """The kind of a layer, and its number among those of its kind."""

    kind: str
    turn: int


def places(names: Iterable[str]) -> dict[str, Place]:
    """Return the place of each layer.

    A kind is the shortest end of the layers' paths, without numbers, that no other kind ends with. The number of a
    layer is the first one in its path, or its turn where two layers of the kind would have the same.

    >>> places(["model.layers.3.self_attn.q_proj", "model.layers.3.mlp.up_proj"])["model.layers.3.mlp.up_proj"]
    Place(kind='up_proj', turn=3)
    """
    paths = {name: tuple(part for part in name.split(".") if not part.isdigit()) or ("layer",) for name in names}
    ends = _ends(list(dict.fromkeys(paths.values())))
    groups: dict[str, list[str]] = {}
    for name, path in paths.items():
        groups.setdefault(ends[path], []).append(name)
    found: dict[str, Place] = {}
    for kind, members in groups.items():
        numbers = [int(number[0]) if (number := re.findall(r"\d+", name)) else 0 for name in members]
        if len(set(numbers)) < len(members):
            numbers = list(range(len(members)))
        found |= {name: Place(kind, turn) for name, turn in zip(members, numbers, strict=True)}
    return {name: found[name] for name in paths}


def kinds(names: Iterable[str]) -> list[str]:
    """Return the kinds of these layers, in the order in which they come."""
    return list(dict.fromkeys(place.kind for place in places(names).values()))


def by_kind(numbers: Mapping[str, float | None]) -> dict[str, Series]:
    """Return kind -> the numbers of its layers in their order; layers whose number is None are left out."""
    series: dict[str, list[tuple[int, float]]] = {}
    for name, place in places(numbers).items():
        number = numbers[name]
        if number is not None:
            series.setdefault(place.kind, []).append((place.turn, number))
    return {kind: sorted(pairs) for kind, pairs in series.items()}


def _ends(paths: list[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    ends = {}
    for path in paths:
        others = [other for other in paths if other != path]
        length = next((n for n in range(1, len(path)) if all(other[-n:] != path[-n:] for other in others)), len(path))
        ends[path] = ".".join(path[-length:])
    return ends
