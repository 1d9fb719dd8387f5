"""The kinds of layers in a folder, and the order of the axes of a convolution: Flax's kernels have the channels last.

Of a layer as a matrix, lora_A is (r, size... x in) in Flax and (r, in x size...) in PEFT.
"""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from flax import nnx

from lora_one.checkpoint.adapter import Form
from lora_one.core.factors import Factors

from .nnx.inject import linear_layers
from .sites import Site


def forms_of(model: Any, sites: Iterable[Site]) -> dict[str, Form]:
    """Return layer -> kind, of the layers that are not linear."""
    if not isinstance(model, nnx.Module):
        return {}
    layers, forms = linear_layers(model), dict[str, Form]()
    for site in sites:
        layer = layers.get(site.name)
        if isinstance(layer, nnx.Embed):
            forms |= dict.fromkeys((x.name for x in site.layers()), Form(is_embedding=True))
        elif isinstance(layer, nnx.Conv):
            forms |= dict.fromkeys((x.name for x in site.layers()), Form(kernel=tuple(layer.kernel_size)))
    return forms


def in_pefts_order(pair: Factors, form: Form) -> Factors:
    """Return a pair whose lora_A has the channels before the kernel's sizes, as in PEFT."""
    a = pair.lora_A
    return pair._replace(lora_A=_moved(a.reshape(len(a), *form.kernel, -1), -1, 1)) if form.kernel else pair


def in_flaxs_order(pair: Factors, form: Form) -> Factors:
    """Return a pair whose lora_A has the channels after the kernel's sizes: the inverse of `in_pefts_order`."""
    a, size = pair.lora_A, math.prod(form.kernel)
    if not form.kernel:
        return pair
    return pair._replace(lora_A=_moved(a.reshape(len(a), a.shape[1] // size, *form.kernel), 1, -1))


def _moved(a: np.ndarray, source: int, destination: int) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(a, source, destination)).reshape(len(a), -1)
