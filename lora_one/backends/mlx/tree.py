"""The modules of an MLX model with the places they hang in, and a snapshot of all that can be put back."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten


class Place(NamedTuple):
    """A module and where it hangs: `container[key] is module`. A container is a module, a dict or a list."""

    path: str
    module: nn.Module
    container: Any
    key: Any


def places(model: nn.Module) -> Iterator[Place]:
    """All modules below the model, in the order of definition; one that hangs in two places comes once."""
    seen: set[int] = set()

    def walk(container: Any, prefix: str) -> Iterator[Place]:
        items = list(container.items()) if isinstance(container, dict) else list(enumerate(container))
        for key, child in items:
            path = f"{prefix}.{key}" if prefix else str(key)
            if isinstance(child, nn.Module):
                if id(child) in seen:
                    continue
                seen.add(id(child))
                yield Place(path, child, container, key)
            if isinstance(child, (dict, list, tuple)):  # an nn.Module is a dict
                yield from walk(child, path)

    yield from walk(model, "")


def flat(tree: Any) -> dict[str, mx.array]:
    """The arrays of a tree by their dotted names."""
    return dict(tree_flatten(tree))


# What draws at random, or counts its batches, in train mode.
EVALUATED = (nn.Dropout, nn.Dropout2d, nn.Dropout3d, nn.BatchNorm)


def train_without_dropout(model: nn.Module) -> None:
    """Put the model into train mode, where models choose kernels that have gradients, but compute as in eval mode."""
    for module in (model, *(place.module for place in places(model))):
        module._set_training_mode(not isinstance(module, EVALUATED))


class Snapshot:
    """Submodules, parameters, frozen state, train/eval modes and attributes of a model: references, no array copied."""

    def __init__(self, model: nn.Module):
        modules = [model, *(place.module for place in places(model))]
        self._containers = [(container, _content(container)) for module in modules for container in _containers(module)]
        self._attributes = [(module, dict(vars(module))) for module in modules]
        self._frozen = [(module, set(module._no_grad)) for module in modules]
        self._training = {id(module): module.training for module in modules}
        self._modules = modules  # keeps the ids above valid
        # Modules that change more than a flag with their mode, as nn.QQLinear does, which quantises its weight.
        plain = nn.Module._set_training_mode
        self._moody = [(m, _content(m), dict(vars(m))) for m in modules if type(m)._set_training_mode is not plain]

    def restore_modes(self, root: nn.Module) -> None:
        """Put back train/eval mode. Modules that have come since, below `root`, follow the one they are in."""

        def walk(x: Any, inherited: bool) -> None:
            if isinstance(x, nn.Module):
                x._training = inherited = self._training.get(id(x), inherited)
            for child in x.values() if isinstance(x, dict) else x:
                if isinstance(child, (dict, list, tuple)):
                    walk(child, inherited)

        walk(root, self._modules[0].training)
        for module, content, attributes in self._moody:
            _refill(module, content)
            vars(module).clear()
            vars(module).update(attributes)

    def restore_frozen(self) -> None:
        """Put back which parameters of the modules that were there are frozen."""
        for module, names in self._frozen:
            module._no_grad = set(names)

    def restore(self) -> None:
        """Put back everything: what was attached since is gone."""
        for container, content in self._containers:
            _refill(container, content)
        for module, attributes in self._attributes:
            vars(module).clear()
            vars(module).update(attributes)
        self.restore_frozen()


def _content(container: Any) -> Any:
    return dict(container.items()) if isinstance(container, dict) else list(container)


def _refill(container: Any, content: Any) -> None:
    container.clear()
    if isinstance(container, dict):
        dict.update(container, content)  # nn.Module's own update is another thing
    else:
        container.extend(content)


def _containers(module: nn.Module) -> Iterator[Any]:
    """The module itself and the plain dicts and lists in it that can hold modules or arrays."""
    stack: list[Any] = [module]
    while stack:
        container = stack.pop()
        if not isinstance(container, tuple):
            yield container
        children = container.values() if isinstance(container, dict) else container
        stack += [x for x in children if isinstance(x, (dict, list, tuple)) and not isinstance(x, nn.Module)]
