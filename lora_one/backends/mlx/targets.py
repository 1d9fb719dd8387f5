"""The layers of an MLX model that get LoRA, and the weights that "all-linear" leaves out."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from lora_one.backends.targets import Targets, check_apart, matches, no_match
from lora_one.checkpoint.whole import is_within
from lora_one.checks import shown_names
from lora_one.errors import ModelError, TargetsWarning, warn_user

from .layout import EMBEDDINGS
from .tree import Place, places

DENSE = (nn.Linear, nn.QuantizedLinear)
SWITCH = (SwitchLinear, QuantizedSwitchLinear)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)  # their weights are (out, size, ..., in of a group)
OUTPUT_LAYERS = ("lm_head", "output")
# Parameters with two axes that scale elementwise: the decay of Mamba's states, and PLaMo 2's norms of heads.
ELEMENTWISE = ("A_log", "q_weight", "k_weight")


def is_linear(module: nn.Module) -> bool:
    """Return whether mlx-lm's LoRA layers fit the module: a linear layer, or a subclass that computes the same.

    A subclass with a `__call__` of its own is tried on a random input: AFM's FusedLinear, for example, is an nn.Linear
    whose output is a list of arrays.
    """
    base: Any = next((kind for kind in DENSE + SWITCH if isinstance(module, kind)), None)
    if base is None or type(module) is base or type(module).__call__ is base.__call__:
        return base is not None
    x = mx.random.normal((1, columns(module)), key=mx.random.key(0))
    arguments = (x, mx.zeros((1, 1), dtype=mx.uint32)) if base in SWITCH else (x,)
    try:
        got, expected = module(*arguments), base.__call__(module, *arguments)
        return bool(got.shape == expected.shape and mx.allclose(got, expected, rtol=1e-2, atol=1e-3).item())
    except Exception:  # a user's layer may raise anything: then it is no linear layer
        return False


def columns(module: Any) -> int:
    """Return in_features of a linear layer, float or quantised."""
    packed = int(module.weight.shape[-1])
    return packed * 32 // module.bits if "scales" in module else packed  # packed into 32-bit words


def find_targets(model: nn.Module, targets: Targets, whole: Sequence[str] = ()) -> list[Place]:
    """Return the linear layers that `Config.targets` means.

    "all-linear" is what mlx-lm converts by default: the linear layers inside `model.layers`, routers included; in a
    model without `layers`, all of them except an output layer. Gates with one output are left out, since they have no
    low-rank part.

    Args:
        whole: the paths of the modules that are trained whole, in which "all-linear" means no layer.

    Raises:
        ModelError: no layer matches, or one that matches is not linear, or is in a module that is trained whole.
    """
    modules = list(places(model))
    linear = [place for place in modules if is_linear(place.module)]
    if targets == "all-linear":
        inside = [place for place in _inside_layers(model, linear) if place.module.weight.shape[-2] > 1]
        chosen = [place for place in inside if not is_within(place.path, whole)]
    else:
        chosen = [place for place in modules if matches(place.path, targets)]
        check_apart((place.path for place in chosen), whole)
        fit = [*linear, *(place for place in modules if isinstance(place.module, EMBEDDINGS))]
        wrong = [f"{place.path} ({type(place.module).__name__})" for place in chosen if place not in fit]
        if wrong:
            raise ModelError(
                f"targets must match linear layers and embeddings only, got {targets!r}, "
                f"which matches {shown_names(wrong)}"
            )
    if not chosen:
        others = [f"{path} ({kind})" for path, kind in _left_out(model, [])]
        none = f"none; mlx-lm has no LoRA layer for {shown_names(others)}" if others else "none"
        raise ModelError(no_match(targets, [place.path for place in linear], none))
    return chosen


def last_layers(model: nn.Module, num_layers: int, targets: str | tuple[str, ...] = "all-linear") -> tuple[str, ...]:
    """Return the targets inside the last blocks of a model, for `Config(targets=...)`.

    mlx-lm trains only the last 16 blocks by default, its option `num_layers`. Use this function to start the same
    layers by LoRA-One, so that adapters and memory can be compared with a run of `mlx_lm.lora`.

    Args:
        model: an `mlx.nn.Module` with a list of blocks, `model.layers`.
        num_layers: the number of blocks from the end; 0 or less means all of them, as in mlx-lm.
        targets: a choice among the layers of these blocks, see `Config.targets`; default "all-linear".

    Returns:
        The paths of the layers.

    Raises:
        ModelError: the model has no `layers`, or fewer blocks, or no target in them.

    >>> import mlx.nn as nn
    >>> last_layers(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), 1)
    ('layers.2',)
    """
    blocks = getattr(model, "layers", None)
    if blocks is None or num_layers > len(blocks):
        count = "none" if blocks is None else len(blocks)
        raise ModelError(f"num_layers must be <= the number of model.layers, got {num_layers} where there are {count}")
    last = {id(module) for block in blocks[-max(num_layers, 0) :] for module in block.modules()}
    paths = tuple(place.path for place in find_targets(model, targets) if id(place.module) in last)
    if not paths:
        raise ModelError(f"targets {targets!r} match no linear layer in the last {num_layers} of model.layers")
    return paths


def warn_of_left_out(model: nn.Module, targets: list[Place], whole: Sequence[str] = ()) -> None:
    """Warn of the weights that multiply activations, get no LoRA and are not trained whole.

    Embeddings and the output layer are left out on purpose. Gates with one output and depthwise convolutions have no
    low-rank part.

    Warns:
        TargetsWarning: there are such weights.
    """
    alike: dict[tuple[str, str], list[str]] = {}  # weights whose paths differ only in numbers are named once
    for path, kind in _left_out(model, targets):
        if is_within(path, whole):
            continue
        alike.setdefault((re.sub(r"\d+", "*", path), kind), []).append(path)
    if not alike:
        return
    names = [
        f"{paths[0]} ({kind}{f'; {len(paths) - 1} more like it' if len(paths) > 1 else ''})"
        for (_, kind), paths in alike.items()
    ]
    warn_user(
        f'"all-linear" leaves {sum(map(len, alike.values()))} weights without LoRA, and they stay frozen: '
        f"{shown_names(names)}; linear layers among them can be named in targets, mlx-lm has no LoRA layer for the "
        "others",
        TargetsWarning,
    )


def _left_out(model: nn.Module, targets: list[Place]) -> Iterator[tuple[str, str]]:
    """Yield the path of every weight that is left out, or the path of its module, and its kind."""
    modules = [("", model), *((place.path, place.module) for place in places(model))]
    targeted = {id(place.module) for place in targets}
    inside = _ids_inside_layers(model)
    vocabularies = {module.weight.shape[0] for _, module in modules if _is_embedding(module) and "weight" in module}
    for path, module in modules:
        if id(module) in targeted or _is_embedding(module) or "norm" in type(module).__name__.lower():
            continue
        is_inside = inside is None or id(module) in inside
        for name, array in _arrays(module):
            if not _is_matrix(module, name, array):
                continue
            is_output = path.rsplit(".", 1)[-1] in OUTPUT_LAYERS or array.shape[-2] in vocabularies
            if is_output and (inside is None or not is_inside):
                continue
            if name != "weight":
                yield f"{path}.{name}".lstrip("."), f"a parameter of shape {array.shape}"
            elif is_inside or not is_linear(module):
                yield path, type(module).__name__
            else:
                yield path, f"{type(module).__name__} outside model.layers"


def _is_matrix(module: nn.Module, name: str, array: mx.array) -> bool:
    """Return whether the parameter multiplies activations, and has a low-rank part."""
    name = name.rsplit(".", 1)[-1]
    if array.ndim < 2 or name in ELEMENTWISE or name.startswith("_") or name.endswith(("scales", "bias", "biases")):
        return False
    rows = array.shape[0] if isinstance(module, CONVOLUTIONS) else array.shape[-2]
    is_number = name == "weight" or mx.issubdtype(array.dtype, mx.floating)  # packed weights are integers
    return is_number and min(rows, array.shape[-1]) > 1


def _arrays(module: nn.Module) -> Iterator[tuple[str, mx.array]]:
    """Yield the module's own parameters, also those in lists and dicts, but not those of its submodules."""

    def walk(container: Any, prefix: str) -> Iterator[tuple[str, mx.array]]:
        for key, child in list(container.items() if isinstance(container, dict) else enumerate(container)):
            if isinstance(child, mx.array):
                yield f"{prefix}{key}", child
            elif isinstance(child, (dict, list, tuple)) and not isinstance(child, nn.Module):
                yield from walk(child, f"{prefix}{key}.")

    return walk(module, "")


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(module, (nn.Embedding, nn.QuantizedEmbedding)) or hasattr(module, "as_linear")


def _ids_inside_layers(model: nn.Module) -> set[int] | None:
    """Return the ids of all modules in `model.layers`; None if the model has no `layers`."""
    blocks = getattr(model, "layers", None)
    if blocks is None:
        return None
    return {id(module) for block in blocks if isinstance(block, nn.Module) for module in block.modules()}


def _inside_layers(model: nn.Module, linear: list[Place]) -> list[Place]:
    inside = _ids_inside_layers(model)
    if inside is None:
        return [place for place in linear if place.path.rsplit(".", 1)[-1] not in OUTPUT_LAYERS]
    return [place for place in linear if id(place.module) in inside]
