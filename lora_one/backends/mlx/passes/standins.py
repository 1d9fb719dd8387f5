"""Temporary replacements of LoRA's factors, or of its layers, during a pass."""

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
    """Temporarily put probes, one per pair, into a LoRA layer, at scale 1; the other factor is zero."""
    module = site.module
    before = module.lora_a, module.lora_b, module.scale
    nonzeros: list[mx.array] = []
    zeros: list[mx.array] = []
    for probe, layer in zip(probes, site.layers, strict=True):
        k = probe.factor.shape[0 if probe.side == "A" else 1]
        shape = (layer.out_features, k) if probe.side == "A" else (k, layer.in_features)
        nonzeros.append(probe.factor)
        zeros.append(zeros_without_memory(shape, probe.factor.dtype))
    factors = write_factor(module, nonzeros), write_factor(module, zeros)
    module.lora_a, module.lora_b = factors if probes[0].side == "A" else factors[::-1]
    module.scale = 1.0
    try:
        yield
    finally:
        module.lora_a, module.lora_b, module.scale = before


@contextmanager
def tapped(site: Site) -> Iterator[nn.Module]:
    """Temporarily replace a LoRA layer by a tap, which computes only W x."""
    replacement = tap(site.module)
    site.place.container[site.place.key] = replacement
    try:
        yield replacement
    finally:
        site.place.container[site.place.key] = site.module
