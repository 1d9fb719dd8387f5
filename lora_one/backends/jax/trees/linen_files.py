"""Write and read the axes of kernels, for a model whose layers nobody has called yet.

A Linen layer shows them only when it is called, and so does the stack of an NNX layer. So `save` notes them in the
header of the file of factors, and `load` reads them there. Without the note, `load` accepts only shapes that leave no
doubt, and NNX stacks in front.
"""

import json
from collections.abc import Mapping
from typing import Any

from safetensors import safe_open

from lora_one.backends.jax.layout import Layout, plain_layout
from lora_one.checkpoint.folder import WEIGHTS
from lora_one.checkpoint.peft import AdapterFolder
from lora_one.errors import CheckpointError

from .linear import Linear, Weight, kernels_of
from .linen import PARAM
from .models import LinenModel

NOTE = "lora_one.linen_kernels"  # in safetensors' __metadata__
_GROUPS = ("shape", "stack", "ins", "outs", "lifts")


def note_of(layouts: Mapping[str, Layout]) -> dict[str, str]:
    """Return the note on layers, by path, as an entry of the header."""
    return {NOTE: json.dumps({name: {g: getattr(layout, g) for g in _GROUPS} for name, layout in layouts.items()})}


def fresh_layers(model: LinenModel, folder: AdapterFolder) -> tuple[Linear, list[str]]:
    """Return the layers for which the folder has factors and the model a kernel, and the problems with them."""
    notes = read_note(folder)
    linear: Linear = {}
    problems = []
    for name, kernel in kernels_of(model).items():
        count = _count(folder, name)
        if count is None:
            continue
        shape = tuple(kernel.shape)
        if name in notes:
            layout: Layout | str = notes[name]
            if notes[name].shape != shape:
                layout = f"its {PARAM} must be {notes[name].shape}, got {shape}"
        else:
            layout = _by_shape(folder, name, shape, count)
        linear[name] = Weight(PARAM, kernel, layout)
        if isinstance(layout, str):
            problems.append(f"{name}: {layout}")
    return linear, problems


def read_note(folder: AdapterFolder) -> dict[str, Layout]:
    """Return the layouts in the note, by path; none without a note.

    Raises:
        CheckpointError: the note cannot be read.
    """
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
    """Return how many stacked matrices of a layer the folder has: 0 for a layer without a stack, None for no layer."""
    if name in folder.lora_A or name in folder.lora_B:
        return 0
    count = 0
    while f"{name}.{count}" in folder.lora_A:
        count += 1
    return count or None


def _by_shape(folder: AdapterFolder, name: str, shape: tuple[int, ...], count: int) -> Layout | str:
    """Return the only layout (stack..., in..., out...) of these sizes, or the reason why there is none.

    A kernel of two axes is taken as (in, out).
    """
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
        fits = []  # any of these axes may be the stack
    if len(fits) == 1:
        return fits[0]
    return (
        f"its {PARAM} {shape} does not say which axes are {sizes[1]} inputs and {sizes[2]} outputs"
        + (f" of {count} layers" if count else "")
        + ", and the folder has no note of it: load it into a model that lora_one.init returned, and save that"
    )
