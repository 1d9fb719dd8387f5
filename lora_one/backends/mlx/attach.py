"""LoRA on an MLX model, by mlx-lm's own layers: attach them, and find them."""

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
from lora_one.backends.targets import check_held
from lora_one.checks import shown_names
from lora_one.config import Config
from lora_one.errors import ModelError

from .dora import is_dora, lora_names
from .layout import EMBEDDINGS, LoraModule, dropout_of, is_switch
from .targets import SWITCH, columns, find_targets, warn_of_left_out
from .tree import Place, places
from .whole import find_whole, train_whole, whole_parameters

LORA = (LoRALinear, LoRASwitchLinear, LoRAEmbedding, DoRALinear)
OTHER_ADAPTERS = (DoRAEmbedding,)


@dataclass(frozen=True)
class Site:
    """A LoRA layer of the model, its place in it, and its pairs: one, or one per expert."""

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
        """Whether at least one of its own parameters is trainable."""
        return not self.module._no_grad >= set(self.names)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its own parameters in the module."""
        return lora_names(self.module)

    def set_trainable(self, trainable: bool) -> None:
        """Freeze or unfreeze its own parameters, and nothing else."""
        change = self.module.unfreeze if trainable else self.module.freeze
        change(keys=list(self.names), recurse=False)


def attach_plain(model: nn.Module, config: Config) -> nn.Module:
    """Attach LoRA to an MLX model with mlx-lm's own start: A random, B zero.

    It is the baseline that LoRA-One's start is compared with: layers, rank and scale are those of `lora_one.init` with
    the same `Config`, but no batch is read. The model is changed in place, and its base weights are frozen. The random
    stream of `mx.random` stays where it is.

    Args:
        model: an `mlx.nn.Module` without LoRA.
        config: `rank`, `alpha`, `use_rslora`, `targets`, `modules_to_save`, `dropout`, `dora` and `seed` count. A is
            drawn by the seed.

    Returns:
        The model itself.

    Raises:
        ModelError: no linear layer matches the targets.

    >>> import mlx.nn as nn
    >>> from lora_one import Config
    >>> model = attach_plain(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)), Config(rank=2))
    >>> model.layers[0].lora_a.shape, model.layers[0].lora_b.shape
    ((6, 2), (2, 5))
    """
    with random_stream_kept():
        mx.random.seed(config.seed)
        adapted = attach_lora(model, config)
        mx.eval(adapted.trainable_parameters())
    return adapted


def attach_lora(model: nn.Module, config: Config) -> nn.Module:
    """Freeze a plain model and put LoRA on its targets, in place, with its usual start. `Snapshot` can undo it.

    The modules that are trained whole stay unfrozen.

    Warns:
        TargetsWarning: "all-linear" leaves weights out.
    """
    whole = find_whole(model, config.modules_to_save)
    paths = [place.path for place in whole]
    targets = find_targets(model, config.targets, paths)
    if config.targets == "all-linear":
        warn_of_left_out(model, targets, paths)
    others = [place.path for place in targets if isinstance(place.module, SWITCH + EMBEDDINGS)]
    if config.dora and others:
        raise ModelError(f"dora=True is for linear layers, got {shown_names(others)}: name other targets")
    model.freeze()
    for place in targets:
        attach_layer(place, config.rank, config.scaling, config.dropout, config.dora)
    train_whole(place.module for place in whole)
    return model


def attach_layer(place: Place, rank: int, scale: float, dropout: float, dora: bool = False) -> LoraModule:
    """Replace a linear layer by mlx-lm's LoRA layer around it."""
    module: LoraModule
    if dora:  # not DoRALinear.from_base, which takes weights of 3, 5 or 6 bits for narrower
        module = DoRALinear(columns(place.module), place.module.weight.shape[0], r=rank, scale=scale, dropout=dropout)
        module.set_linear(place.module)
    else:
        kind: Any = LoRASwitchLinear if isinstance(place.module, SWITCH) else LoRALinear
        kind = LoRAEmbedding if isinstance(place.module, EMBEDDINGS) else kind
        module = kind.from_base(place.module, r=rank, scale=scale, dropout=dropout)
    place.container[place.key] = module
    return module


@contextmanager
def random_stream_kept() -> Iterator[None]:
    """Put the user's random stream back afterwards: mlx-lm's layers draw a random start, which is overwritten."""
    key = random_key()
    try:
        yield
    finally:
        set_random_key(key)


def random_key() -> mx.array:
    """Return the position of the random stream, (2,)."""
    state: Any = mx.random.state
    return mx.array(np.array(state[0]))


def set_random_key(key: mx.array) -> None:
    """Continue the random stream from the position `key`."""
    high, low = (int(word) for word in np.array(key))
    mx.random.seed(high << 32 | low)


def find_sites(model: nn.Module) -> list[Site]:
    """Return the LoRA layers of a model; an empty list for a plain one.

    Raises:
        ModelError: adapters that LoRA-One does not start: DoRA on an embedding, unknown ones.
    """
    problems = []
    for place in places(model):
        if isinstance(place.module, OTHER_ADAPTERS):
            problems.append(f"{place.path}: {type(place.module).__name__}")
        elif "lora_a" in place.module and not isinstance(place.module, LORA):
            problems.append(f"{place.path}: {type(place.module).__name__}, which is no LoRA layer of mlx-lm")
    if problems:
        raise ModelError("LoRA-One starts, loads, saves and merges LoRA and DoRA, got:\n  " + "\n  ".join(problems))
    return lora_sites(model)


def lora_sites(model: nn.Module) -> list[Site]:
    """Return the LoRA layers of a model, whatever other adapters it has."""
    return [Site(place, _layers(place)) for place in places(model) if isinstance(place.module, LORA)]


def check_adapter_fits(model: nn.Module, sites: list[Site], config: Config) -> None:
    """Check that a `Config` asks for nothing else than the LoRA layers that the model has already.

    Raises:
        ModelError: a setting is neither its default nor the adapter's.
    """
    default = Config()
    wrong: dict[str, None] = {}  # an ordered set
    for site in sites:
        rank, scaling, dropout = site.layers[0].rank, site.module.scale, dropout_of(site.module)
        if config.rank not in (default.rank, rank):
            wrong[f"rank {config.rank} (the adapter's: {rank})"] = None
        is_scale_set = (config.alpha, config.use_rslora) != (default.alpha, default.use_rslora)
        if is_scale_set and abs(config.scaling - scaling) > 1e-6 * abs(scaling):
            wrong[f"scaling {config.scaling:g} from alpha and rank (the adapter's: {scaling:g})"] = None
        if config.dropout != default.dropout and abs(config.dropout - dropout) > 1e-6:
            wrong[f"dropout {config.dropout} (the adapter's: {dropout:g})"] = None
        if config.dora and not is_dora(site.module):
            wrong["dora True (the adapter's: False)"] = None
    if config.rank_max is not None:
        wrong[f"rank_max {config.rank_max}"] = None
    if config.targets != default.targets:
        wrong[f"targets {config.targets!r}"] = None
    check_held(config, whole_parameters(model))
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
        Layer(f"{place.path}[{expert}]", out_features, in_features, rank, module.scale, module=place.path)
        for expert in range(experts)
    )
