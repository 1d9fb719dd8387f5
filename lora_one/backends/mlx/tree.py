"""The modules of an MLX model and their places in it, and a snapshot of a model that can be restored."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten


class Place(NamedTuple):
    """A module and its place: `container[key] is module`. A container is a module, a dict or a list."""

    path: str
    module: nn.Module
    container: Any
    key: Any


def places(model: nn.Module) -> Iterator[Place]:
    """Yield all modules below the model, in the order of definition, each of them once."""
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
    """Return the arrays of a tree by their dotted names."""
    return dict(tree_flatten(tree))


# Modules that draw at random, or count their batches, in train mode.
EVALUATED = (nn.Dropout, nn.Dropout2d, nn.Dropout3d, nn.BatchNorm)


def train_without_dropout(model: nn.Module) -> None:
    """Put the model into train mode, where it chooses kernels that have gradients, but with dropout off."""
    for module in (model, *(place.module for place in places(model))):
        module._set_training_mode(not isinstance(module, EVALUATED))


class Snapshot:
    """The submodules, parameters, frozen state, modes and attributes of a model. No array is copied."""

    def __init__(self, model: nn.Module):
        modules = [model, *(place.module for place in places(model))]
        self._containers = [(container, _content(container)) for module in modules for container in _containers(module)]
        self._attributes = [(module, dict(vars(module))) for module in modules]
        self._frozen = [(module, set(module._no_grad)) for module in modules]
        self._training = {id(module): module.training for module in modules}
        self._modules = modules  # keeps the ids above valid
        # Modules whose mode changes more than a flag: nn.QQLinear quantises its weight.
        plain = nn.Module._set_training_mode
        self._mode_dependent = [
            (m, _content(m), dict(vars(m))) for m in modules if type(m)._set_training_mode is not plain
        ]

    def restore_modes(self, root: nn.Module) -> None:
        """Restore train and eval modes. New modules below `root` get the mode of the module that they are in."""

        def walk(x: Any, inherited: bool) -> None:
            if isinstance(x, nn.Module):
                x._training = inherited = self._training.get(id(x), inherited)
            for child in x.values() if isinstance(x, dict) else x:
                if isinstance(child, (dict, list, tuple)):
                    walk(child, inherited)

        walk(root, self._modules[0].training)
        for module, content, attributes in self._mode_dependent:
            _refill(module, content)
            vars(module).clear()
            vars(module).update(attributes)

    def restore_frozen(self) -> None:
        """Restore which parameters are frozen, in the modules that the snapshot has."""
        for module, names in self._frozen:
            module._no_grad = set(names)

    def restore(self) -> None:
        """Restore everything; modules that were attached since are gone."""
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
        dict.update(container, content)  # nn.Module.update does something else
    else:
        container.extend(content)


def _containers(module: nn.Module) -> Iterator[Any]:
    """Yield the module itself, and the plain dicts and lists in it, which can hold modules or arrays."""
    stack: list[Any] = [module]
    while stack:
        container = stack.pop()
        if not isinstance(container, tuple):
            yield container
        children = container.values() if isinstance(container, dict) else container
        stack += [x for x in children if isinstance(x, (dict, list, tuple)) and not isinstance(x, nn.Module)]
