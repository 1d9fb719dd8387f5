"""What qwix keeps to itself: the scale of a LoRA layer, alpha / rank of its rule, and its quantised weights."""

import re
from typing import Any

import jax
from flax import nnx

# The attribute by which qwix marks each module of a model that it has adapted.
QWIX_PATH = "qwix_path"
QWIX_ATTRIBUTES = (QWIX_PATH, "qwix_rngs", "disable_quant_stats_update")  # everything that it leaves on a module


def qwix_scale(model: Any, path: tuple[Any, ...], rank: int) -> float:
    """Return alpha / rank of the rule that made a layer's factors.

    qwix keeps its rules only in the closure of the adapted model's `__call__`.

    Raises:
        ValueError: the closure holds no such rule.
    """
    joined = "/".join(map(str, path))
    for rule in _rules(vars(type(model)).get("__call__"), depth=4):
        if getattr(rule, "rank", None) == rank and re.fullmatch(rule.module_path, joined):
            return rule.alpha / rank
    raise ValueError(
        "the qwix rule that made it is not found on the model, so its scale is unknown: hand in the model that "
        "qwix.apply_lora_to_model returned"
    )


def is_quantised(weight: Any) -> bool:
    """Return whether an attribute of a layer is a weight that qwix has quantised."""
    return hasattr(getattr(weight, "array", None), "qvalue")


def dequantise(model: nnx.Module) -> None:
    """Make floating-point parameters of all weights that qwix has quantised. Layers that share one still do."""
    import qwix

    made: dict[int, Any] = {}
    for _, module in nnx.iter_modules(model):
        for name, weight in list(vars(module).items()):
            if is_quantised(weight):
                if id(weight.array) not in made:
                    made[id(weight.array)] = nnx.Param(qwix.dequantize(_unboxed(weight.array)))
                setattr(module, name, made[id(weight.array)])


def _unboxed(tree: Any) -> Any:
    """Return a tree of arrays from one of variables."""

    def is_variable(leaf: Any) -> bool:
        return isinstance(leaf, nnx.Variable)

    return jax.tree.map(lambda leaf: leaf.get_value() if is_variable(leaf) else leaf, tree, is_leaf=is_variable)


def plain_class(model: Any) -> type | None:
    """Return the class that a model had before qwix replaced it; None for any other model."""
    return vars(type(model)).get("_unquantized_type")


def _rules(function: Any, depth: int) -> list[Any]:
    """Return the rules in the closure of a function, or in the closures of functions there."""
    if depth == 0 or function is None:
        return []
    for cell in getattr(function, "__closure__", None) or ():
        try:
            value = cell.cell_contents
        except ValueError:  # an empty cell
            continue
        provider = getattr(value, "__self__", value)
        rules = getattr(provider, "_rules", None)
        if isinstance(rules, (list, tuple)):
            return list(rules)
        inner = _rules(getattr(value, "func", value), depth - 1) if callable(value) else []
        if inner:
            return inner
    return []
