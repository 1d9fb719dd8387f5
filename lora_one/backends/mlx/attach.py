"""LoRA on an MLX model, by mlx-lm's own layers: attaching, and finding the layers."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.tuner.dora import DoRAEmbedding, DoRALinear
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear

from lora_one.backends.interface import Layer
from lora_one.config import Config
from lora_one.errors import ModelError

from .layout import LoraModule, is_switch
from .targets import SWITCH, find_targets, warn_of_left_out
from .tree import Place, places

OTHER_ADAPTERS = (DoRALinear, DoRAEmbedding, LoRAEmbedding)


@dataclass(frozen=True)
class Site:
    """A LoRA layer of the model, its place in it, and the pairs in it: one, or one an expert."""

    place: Place
    layers: tuple[Layer, ...]

    @property
    def path(self) -> str:
        return self.place.path

    @property
    def module(self) -> LoraModule:
        return self.place.module

    @property
    def is_trainable(self) -> bool:
        """Whether one of its factors is."""
        return not self.module._no_grad >= {"lora_a", "lora_b"}

    def set_trainable(self, trainable: bool) -> None:
        """Freeze or unfreeze its factors, and nothing else."""
        change = self.module.unfreeze if trainable else self.module.freeze
        change(keys=["lora_a", "lora_b"], recurse=False)


def attach_lora(model: nn.Module, config: Config) -> nn.Module:
    """Freeze a plain model and put LoRA on its targets, in place, with its usual start. `Snapshot` takes it back.

    Warns:
        TargetsWarning: of the weights that "all-linear" leaves out.
    """
    targets = find_targets(model, config.targets)
    if config.targets == "all-linear":
        warn_of_left_out(model, targets)
    model.freeze()
    for place in targets:
        attach_layer(place, config.rank, config.scaling, config.dropout)
    return model


def attach_layer(place: Place, rank: int, scale: float, dropout: float) -> LoraModule:
    """Put mlx-lm's LoRA layer in the place of a linear one."""
    kind: Any = LoRASwitchLinear if isinstance(place.module, SWITCH) else LoRALinear
    module: LoraModule = kind.from_base(place.module, r=rank, scale=scale, dropout=dropout)
    place.container[place.key] = module
    return module


@contextmanager
def random_stream_kept() -> Iterator[None]:
    """mlx-lm's layers draw a random start. Where it is overwritten, the user's random stream should not notice."""
    key = random_key()
    try:
        yield
    finally:
        set_random_key(key)


def random_key() -> mx.array:
    """Where the random stream is, (2,)."""
    state: Any = mx.random.state
    return mx.array(np.array(state[0]))


def set_random_key(key: mx.array) -> None:
    """Go on from a place in the random stream."""
    high, low = (int(word) for word in np.array(key))
    mx.random.seed(high << 32 | low)


def find_sites(model: nn.Module) -> list[Site]:
    """The LoRA layers of a model; an empty list for a plain one.

    Raises:
        ModelError: adapters whose start is another problem: DoRA, LoRA on an embedding, unknown ones.
    """
    sites, problems = [], []
    for place in places(model):
        if isinstance(place.module, OTHER_ADAPTERS):
            problems.append(f"{place.path}: {type(place.module).__name__}")
        elif isinstance(place.module, LoRALinear | LoRASwitchLinear):
            sites.append(Site(place, _layers(place)))
        elif "lora_a" in place.module:
            problems.append(f"{place.path}: {type(place.module).__name__}, which is no LoRA layer of mlx-lm")
    if problems:
        raise ModelError(
            "LoRA-One starts, loads, saves and merges plain LoRA on linear layers, got:\n  " + "\n  ".join(problems)
        )
    return sites


def check_adapter_fits(sites: list[Site], config: Config) -> None:
    """LoRA layers that are there keep their own rank and scale; a `Config` that asks for others is an error.

    Raises:
        ModelError: a setting that is neither its default nor the adapter's.
    """
    default = Config()
    wrong: dict[str, None] = {}  # an ordered set
    for site in sites:
        rank, scaling = site.layers[0].rank, site.module.scale
        dropout = 1.0 - site.module.dropout._p_1
        if config.rank not in (default.rank, rank):
            wrong[f"rank {config.rank} (the adapter's: {rank})"] = None
        scaled = (config.alpha, config.use_rslora) != (default.alpha, default.use_rslora)
        if scaled and abs(config.scaling - scaling) > 1e-6 * abs(scaling):
            wrong[f"scaling {config.scaling:g} from alpha and rank (the adapter's: {scaling:g})"] = None
        if config.dropout != default.dropout and abs(config.dropout - dropout) > 1e-6:
            wrong[f"dropout {config.dropout} (the adapter's: {dropout:g})"] = None
    if config.targets != default.targets:
        wrong[f"targets {config.targets!r}"] = None
    if wrong:
        raise ModelError(
            "a model with LoRA layers keeps its adapter's own settings, but the Config asks for "
            f"{'; '.join(wrong)}: leave them out of the Config, or hand in the model without its adapter"
        )


def _layers(place: Place) -> tuple[Layer, ...]:
    module: Any = place.module
    if not is_switch(module):
        (in_features, rank), (_, out_features) = module.lora_a.shape, module.lora_b.shape
        return (Layer(place.path, out_features, in_features, rank, module.scale),)
    experts, rank, in_features = module.lora_a.shape
    out_features = module.lora_b.shape[1]
    return tuple(
        Layer(f"{place.path}[{expert}]", out_features, in_features, rank, module.scale) for expert in range(experts)
    )
