"""The state of a model before we change it, so that it can be restored."""

from collections import OrderedDict

from torch import nn

# Exact types: a subclass may be frozen, as diffusers' configurations are.
_TABLES = (dict, OrderedDict, list, set)


class Snapshot:
    """The attributes of all modules of a model, and the content of its tables: references, without copies of weights.

    This covers train/eval modes, submodules, parameters, hooks, and the ranks and scalings that PEFT's layers keep.
    """

    def __init__(self, model: nn.Module):
        modules = list(model.modules())
        self._attributes = [(module, dict(vars(module))) for module in modules]
        tables = {id(value): value for module in modules for value in vars(module).values() if type(value) in _TABLES}
        self._tables = [(table, table.copy()) for table in tables.values()]
        self._requires_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def restore_modes(self, root: nn.Module) -> None:
        """Restore train/eval modes. Newer modules below `root` get the mode of the module that contains them."""
        modes = {module: attributes["training"] for module, attributes in self._attributes}

        def walk(module: nn.Module, inherited: bool) -> None:
            module.training = modes.get(module, inherited)
            for child in module.children():
                walk(child, module.training)

        walk(root, inherited=self._attributes[0][1]["training"])

    def restore(self) -> None:
        """Restore everything, so that what was attached since is gone."""
        for module, attributes in self._attributes:
            vars(module).clear()
            vars(module).update(attributes)
        for table, content in self._tables:
            table.clear()
            if isinstance(table, list):
                table.extend(content)
            else:
                table.update(content)
        for parameter, requires_grad in self._requires_grad:
            parameter.requires_grad_(requires_grad)
