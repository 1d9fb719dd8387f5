"""How a model was before we touched it, so that it can be put back."""

from typing import Any

from torch import nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Snapshot:
    """Train/eval modes, requires_grad, submodules, hooks and attributes of a model: references, no weights copied."""

    def __init__(self, model: nn.Module):
        self._modules = [(module, dict(module._modules), dict(module._parameters)) for module in model.modules()]
        self._training = [(module, module.training) for module in model.modules()]
        self._requires_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        self._hooks = [(table, dict(table)) for module in model.modules() for table in _hook_tables(module)]
        self._attributes = [(module, set(vars(module))) for module in model.modules()]

    def restore_modes(self, root: nn.Module) -> None:
        """Put back train/eval mode. Modules that have come since, below `root`, follow the one they are in."""
        modes = dict(self._training)

        def walk(module: nn.Module, inherited: bool) -> None:
            module.training = modes.get(module, inherited)
            for child in module.children():
                walk(child, module.training)

        walk(root, inherited=self._training[0][1])

    def restore_requires_grad(self) -> None:
        """Put back requires_grad of the parameters that were there."""
        for parameter, requires_grad in self._requires_grad:
            parameter.requires_grad_(requires_grad)

    def restore(self) -> None:
        """Put back everything: what was attached since is gone."""
        for module, children, parameters in self._modules:
            _refill(module._modules, children)
            _refill(module._parameters, parameters)
        for table, hooks in self._hooks:
            _refill(table, hooks)
        for module, names in self._attributes:
            for name in set(vars(module)) - names:
                delattr(module, name)
        for module, training in self._training:
            module.training = training
        self.restore_requires_grad()


def _hook_tables(module: nn.Module) -> list[dict[Any, Any]]:
    return [vars(module)[name] for name in _HOOKS]


def _refill(table: dict[Any, Any], content: dict[Any, Any]) -> None:
    table.clear()
    table.update(content)
