"""A tiny model that FSDP2 shards, its numbers whole, and its training."""

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

import lora_one
from lora_one.backends.torch.attachment.attach import find_sites
from lora_one.backends.torch.attachment.sharding import gathered
from tests.backends.torch.models import causal_batches

BATCHES = causal_batches(4)
FACTORS = "lora_A", "lora_B"


def shard(model: nn.Module, **settings: Any) -> nn.Module:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    for layer in inner.model.layers:
        fully_shard(layer, **settings)
    return fully_shard(model, **settings)


def factors(model) -> dict[str, np.ndarray]:
    return {
        f"{site.layer.name}.{side}": gathered(getattr(site, side).weight).detach().double().numpy()
        for site in find_sites(model)
        for side in FACTORS
    }


def products(model) -> dict[str, np.ndarray]:
    pairs = factors(model)
    return {site.layer.name: pairs[f"{site.layer.name}.lora_B"] @ pairs[f"{site.layer.name}.lora_A"]
            for site in find_sites(model)}  # fmt: skip


def trained(model: nn.Module, rank: int = 0, processes: int = 1, steps: int = 3, **options: Any) -> list[float]:
    """Train for some steps; return the mean losses of all processes' batches."""
    return train(model, lora_one.optimizer(model, learning_rate=1e-2, **options), range(steps), rank, processes)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, rank: int = 0, processes: int = 1
) -> list[float]:
    losses = []
    for step in steps:
        own = {key: value[rank::processes] for key, value in BATCHES[step % len(BATCHES)].items()}
        loss = model.train()(**own).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if processes > 1:
            torch.distributed.all_reduce(mean)
        losses.append(float(mean) / processes)
    return losses


def assert_equal(got: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float = 1e-5) -> None:
    assert got.keys() == expected.keys()
    for key, x in expected.items():
        np.testing.assert_allclose(got[key], x, atol=tolerance * np.abs(x).max(), err_msg=key)
