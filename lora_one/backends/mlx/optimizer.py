"""AdamW for an MLX model with LoRA layers, which may begin with LoRA-One's start of its first gradients."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from lora_one.backends.checks import check_optimizer_settings
from lora_one.backends.waiting import deferred_start, optimizer_made, warn_of_plain_layers
from lora_one.core.precondition import Damping
from lora_one.errors import ModelError
from lora_one.report.deferred import DeferredReport, StartSteps

from .attach import Site, find_sites, lora_sites
from .deferred import DeferredAdamW, Group, Start, groups_of, is_done, readings
from .layout import read_factor
from .lora_adamw import LearningRate, LoraOneAdamW
from .tree import flat


def optimizer(
    model: nn.Module,
    learning_rate: LearningRate = 2e-4,
    weight_decay: float = 0.0,
    precondition: bool = False,
    reg: float = 1e-6,
    damping: Damping = "absolute",
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    loraplus_lr_ratio: float = 1.0,
    start_steps: StartSteps | None = None,
) -> LoraOneAdamW:
    """See `lora_one.optimizer` for the arguments. Here is only what is special to MLX.

    `model` may be any module that contains mlx-lm's LoRA layers. `learning_rate` may be a schedule of mlx.optimizers.
    The state exists from the start, so that a training step can be compiled at once. It is a tree of arrays: save it
    with mx.save_safetensors(path, dict(tree_flatten(optimizer.state))), and set it again before training is compiled.

    With `start_steps`, mx.compile traces each step of the start anew, and a step whose gradients are zero counts as
    one. The report is filled in when it is printed, and warns then of layers without a gradient.

    >>> import mlx.nn as nn
    >>> from lora_one import Config
    >>> from lora_one.backends.mlx import attach_plain
    >>> model = attach_plain(nn.Sequential(nn.Linear(6, 5)), Config(rank=2))
    >>> optimizer(model, learning_rate=1e-3, precondition=True).pairs
    ('layers.0',)
    """
    check_optimizer_settings(reg, damping, loraplus_lr_ratio)
    trainable = model.trainable_parameters()
    names = set(flat(trainable))
    if not names:
        raise ModelError("the model must have trainable parameters, got none: load with trainable=True")

    def sites(purpose: str) -> list[Site]:
        of_pairs = _with_both_factors(find_sites(model), names)
        if not of_pairs:
            raise ModelError(f"{purpose} needs trainable LoRA layers of mlx-lm, got none")
        return of_pairs

    pairs = [site.path for site in sites("precondition=True")] if precondition else []
    deferred = deferred_start(
        model,
        start_steps,
        "mlx",
        layers=lambda: [layer for site in sites("start_steps") for layer in site.layers],
        already_trained=lambda: _already_trained(sites("start_steps")),
    )
    groups = groups_of(_with_both_factors(lora_sites(model), names))
    start = Start(groups, *(deferred[1:] if deferred else (0.0, 0.0, 0, 0)))
    settings: dict[str, Any] = {"betas": list(betas), "eps": eps, "weight_decay": weight_decay}
    settings |= {"pairs": pairs, "reg": reg, "damping": damping, "loraplus_lr_ratio": loraplus_lr_ratio}
    adamw = DeferredAdamW(learning_rate, start, trainable, **settings)
    adamw.init(trainable)
    optimizer_made(model, adamw)
    if deferred:
        deferred.report.refresh = partial(_fill_in, deferred.report, groups, adamw.progress)
    return adamw


def _with_both_factors(sites: list[Site], names: set[str]) -> list[Site]:
    """Return the LoRA layers of which both factors are among the names."""
    return [site for site in sites if {f"{site.path}.lora_a", f"{site.path}.lora_b"} <= names]


def _already_trained(sites: list[Site]) -> list[str]:
    """Return the names of the layers whose B is not zero."""
    flags = [[mx.any(b != 0) for b in read_factor(site.module, site.module.lora_b)] for site in sites]
    mx.eval(flags)
    return [
        layer.name
        for site, of_site in zip(sites, flags, strict=True)
        for layer, flag in zip(site.layers, of_site, strict=True)
        if flag.item()
    ]


def _fill_in(report: DeferredReport, groups: tuple[Group, ...], progress: Mapping[str, Any]) -> None:
    """Fill in a report from the optimizer's state: after a compiled step no code of ours runs.

    It knows that part of the state only, so that it outlives the optimizer and does not keep the moments in memory.
    """
    was_done, of_layers = report.done, readings(groups, progress)
    unread: tuple[list[float], float] = ([0.0], 0.0)  # a layer that is frozen by now
    report.record(
        int(progress["steps"].item()), is_done(progress), [of_layers.get(layer.name, unread) for layer in report.layers]
    )
    if report.done and not was_done:
        warn_of_plain_layers(report)
