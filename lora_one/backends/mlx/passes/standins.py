"""What stands in for LoRA's factors, or for its layers, during a pass."""

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn

from lora_one.backends.mlx.attach import Site
from lora_one.backends.mlx.layout import write_factor
from lora_one.core.sketch import Probe

from .tap import tap, zeros_without_memory


@contextmanager
def installed(site: Site, probes: list[Probe]) -> Iterator[None]:
    """Put probes, one a pair, into a LoRA layer for a while, at scale 1; the other factor is zero."""
    module = site.module
    before = module.lora_a, module.lora_b, module.scale
    given: list[mx.array] = []
    zeros: list[mx.array] = []
    for probe, layer in zip(probes, site.layers, strict=True):
        k = probe.factor.shape[0 if probe.side == "A" else 1]
        shape = (layer.out_features, k) if probe.side == "A" else (k, layer.in_features)
        given.append(probe.factor)
        zeros.append(zeros_without_memory(shape, probe.factor.dtype))
    both = write_factor(module, given), write_factor(module, zeros)
    module.lora_a, module.lora_b = both if probes[0].side == "A" else both[::-1]
    module.scale = 1.0
    try:
        yield
    finally:
        module.lora_a, module.lora_b, module.scale = before


@contextmanager
def tapped(site: Site) -> Iterator[nn.Module]:
    """A tap in the place of a LoRA layer for a while, which computes W x alone."""
    standing_in = tap(site.module)
    site.place.container[site.place.key] = standing_in
    try:
        yield standing_in
    finally:
        site.place.container[site.place.key] = site.module
