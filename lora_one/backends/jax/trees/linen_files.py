"""What the axes of a Linen model's kernels are, for a model whose layers nobody has called yet.

A Linen layer shows it only when it is called. So `save` notes it in the header of the file of factors, and `load` reads
it there; of a folder without the note it takes what the shapes leave no doubt of.
"""

import json
from typing import Any

from safetensors import safe_open

from lora_one.backends.jax.layout import Layout, plain_layout
from lora_one.checkpoint.folder import WEIGHTS
from lora_one.checkpoint.peft import AdapterFolder
from lora_one.errors import CheckpointError

from .binding import Linear, kernels_of
from .linen import PARAM
from .models import LinenModel

NOTE = "lora_one.linen_kernels"  # in safetensors' __metadata__
_GROUPS = ("shape", "stack", "ins", "outs", "lifts")


def note_of(model: LinenModel) -> dict[str, str]:
    """The note on a model's layers, as an entry of the header."""
    axes = {name: {group: getattr(layout, group) for group in _GROUPS} for name, _, layout in model.layouts}
    return {NOTE: json.dumps(axes)}


def fresh_layers(model: LinenModel, folder: AdapterFolder) -> tuple[Linear, list[str]]:
    """The layers that the folder has factors for and the model a kernel, and what keeps others from being found."""
    noted = _read_note(folder)
    found: Linear = {}
    problems = []
    for name, kernel in kernels_of(model).items():
        count = _count(folder, name)
        if count is None:
            continue
        shape = tuple(kernel.shape)
        if name in noted:
            layout: Layout | str = noted[name]
            if noted[name].shape != shape:
                layout = f"its {PARAM} must be {noted[name].shape}, got {shape}"
        else:
            layout = _by_shape(folder, name, shape, count)
        found[name] = PARAM, kernel, layout
        if isinstance(layout, str):
            problems.append(f"{name}: {layout}")
    return found, problems


def _read_note(folder: AdapterFolder) -> dict[str, Layout]:
    with safe_open(folder.path / WEIGHTS, framework="numpy") as file:
        text = (file.metadata() or {}).get(NOTE)
    if text is None:
        return {}
    try:
        return {name: _layout(axes) for name, axes in json.loads(text).items()}
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise CheckpointError(f"{folder.path / WEIGHTS}: its note {NOTE} cannot be read: {error!r}") from error


def _layout(axes: dict[str, Any]) -> Layout:
    groups = [tuple(axes[group]) for group in _GROUPS]
    shape, stack, ins, outs, lifts = groups
    if not all(type(number) is int for group in groups for number in group):
        raise ValueError(f"axes must be integers, got {axes}")
    if sorted(stack + ins + outs) != list(range(len(shape))) or not ins or not outs:
        raise ValueError(f"each axis must be in one group, got {axes}")
    left = list(range(len(shape)))
    if tuple(left.pop(axis) for axis in lifts) != stack[: len(lifts)]:
        raise ValueError(f"lifts must take the first axes of the stack, got {axes}")
    return Layout(*groups)


def _count(folder: AdapterFolder, name: str) -> int | None:
    """How many stacked matrices of a layer are in the folder; 0 for one that is no stack; None if there is none."""
    if name in folder.lora_A or name in folder.lora_B:
        return 0
    count = 0
    while f"{name}.{count}" in folder.lora_A:
        count += 1
    return count or None


def _by_shape(folder: AdapterFolder, name: str, shape: tuple[int, ...], count: int) -> Layout | str:
    """The only (stack..., in..., out...) of these sizes, or why there is none. Two axes are taken as (in, out)."""
    first = f"{name}.0" if count else name
    sizes = max(1, count), folder.lora_A.get(first, (0, 0))[-1], folder.lora_B.get(first, (0, 0))[0]
    if len(shape) == 2 and not count:
        return plain_layout(shape, 1, 1)
    fits = []
    for stacked in range(1 if count else 0, len(shape) - 1 if count else 1):
        for ins in range(1, len(shape) - stacked):
            layout = plain_layout(shape, ins, len(shape) - stacked - ins)
            if (layout.count, layout.in_features, layout.out_features) == sizes:
                fits.append(layout)
    if count and sum(size == count for size in shape) > 1:
        fits = []  # the stack may be any of these axes
    if len(fits) == 1:
        return fits[0]
    return (
        f"its {PARAM} {shape} does not say which axes are {sizes[1]} inputs and {sizes[2]} outputs"
        + (f" of {count} layers" if count else "")
        + ", and the folder has no note of it: load it into a model that lora_one.init returned, and save that"
    )
