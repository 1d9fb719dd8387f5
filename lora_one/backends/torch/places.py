"""The places of LoRA pairs in an optimizer's parameter groups.

accelerate and DeepSpeed exchange the parameters in the groups for others, each in its place. So pairs are found by
their places at each step, and not by the objects that they once were.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from lora_one.errors import ModelError

from .pairs import LoraPair

FLATTENED = (
    "DeepSpeed's ZeRO, and other engines that flatten weights, train with precondition=False and start_steps=0 only: "
    "make the start by lora_one.init(model, batches)"
)
Groups = Sequence[Mapping[str, Any]]


class _Place(NamedTuple):
    group: int
    position: int
    side: str
    shape: tuple[int, ...]


class Places:
    """The places of LoRA pairs.

    Args:
        pairs: each is taken once.
        groups: the optimizer's, as they are when it is made.

    Raises:
        ModelError: a factor that is not in a group, or that two different pairs share.
    """

    def __init__(self, pairs: Iterable[LoraPair], groups: Groups):
        position = {id(p): (i, j) for i, group in enumerate(groups) for j, p in enumerate(group["params"])}
        self._places: list[tuple[_Place, ...]] = []
        for pair in _distinct(pairs):
            if missing := [side for side, factor in pair._asdict().items() if id(factor) not in position]:
                shape = tuple(getattr(pair, missing[0]).shape)
                raise ModelError(f"each factor of a pair must be in params, got a {missing[0]} {shape} that is not")
            self._places.append(
                tuple(_Place(*position[id(x)], side, tuple(x.shape)) for side, x in pair._asdict().items())
            )

    def pairs(self, groups: Groups) -> list[LoraPair]:
        """Return the pairs that are there now.

        Raises:
            ModelError: there are parameters of other shapes.
        """
        return [LoraPair(*(_parameter(groups, place) for place in places)) for places in self._places]

    def group_of(self, pairs: Sequence[LoraPair]) -> dict[int, int]:
        """Return id of a factor of these pairs, as `pairs` has returned them -> index of its group."""
        both = zip(self._places, pairs, strict=True)
        return {id(x): place.group for places, pair in both for place, x in zip(places, pair, strict=True)}


def _parameter(groups: Groups, place: _Place) -> Any:
    params = groups[place.group]["params"] if place.group < len(groups) else ()  # DeepSpeed steps one by one
    parameter = params[place.position] if place.position < len(params) else None
    if parameter is None or tuple(parameter.shape) != place.shape:
        shape = None if parameter is None else tuple(parameter.shape)
        raise ModelError(
            f"each {place.side} must stay a matrix in its place in the optimizer's groups; parameter {place.position} "
            f"of group {place.group} was {place.shape}, got {shape}. {FLATTENED}"
        )
    return parameter


def _distinct(pairs: Iterable[LoraPair]) -> list[LoraPair]:
    """Return each pair once. Two pairs that share a single factor are an error: one's step would undo the other's."""
    distinct = list({(id(pair.lora_A), id(pair.lora_B)): pair for pair in pairs}.values())
    seen: set[int] = set()
    for pair in distinct:
        for side, factor in pair._asdict().items():
            if id(factor) in seen:
                raise ModelError(
                    f"each pair needs factors of its own, got a {side} {tuple(factor.shape)} that two pairs share: "
                    "untie it, or use precondition=False and start_steps=0"
                )
            seen.add(id(factor))
    return distinct
