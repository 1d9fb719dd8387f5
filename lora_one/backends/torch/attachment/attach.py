"""Attach LoRA to a PyTorch model by PEFT's own layers, and find these layers."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from lora_one.backends.interface import Layer
from lora_one.backends.targets import check_module_names, no_match
from lora_one.backends.torch.pairs import LoraPair
from lora_one.checkpoint.scales import plain_alpha, scaling_of
from lora_one.config import Config
from lora_one.core.factors import Factors
from lora_one.errors import ModelError

from .adapters import mark_as_ours, require_lora, take_out_leftover
from .all_linear import ALL_LINEAR, LINEAR, RefusedByPeft, on_all_linear
from .dora import magnitude_of, renew_magnitude
from .experts import layer_path, pair_of, split_targets
from .kinds import as_kept, factors_of, features_of, has_factors, lend_settings, set_rank
from .quiet import quiet_peft
from .refusals import WHOLE_WEIGHTS, refusal
from .sharded_base import shard_attached
from .sharding import is_sharded, own_part, write
from .snapshot import Snapshot
from .tasks import heads, task_type
from .wrappers import check_open_to_lora, plain_names, unwrapped


@dataclass(frozen=True)
class Site:
    """A LoRA layer of the model, with the name of the adapter in it."""

    layer: Layer
    module: LoraLayer
    adapter: str
    expert: int | None = None  # its number, where the weights of all experts are one parameter

    @property
    def lora_A(self) -> nn.Linear:
        return self.module.lora_A[self.adapter]

    @property
    def lora_B(self) -> nn.Linear:
        return self.module.lora_B[self.adapter]

    @property
    def parameters(self) -> LoraPair:
        """The parameters of the pair, in the shapes that PEFT keeps them in; of an expert, views of its part."""
        if self.expert is not None:
            return LoraPair(*pair_of(self.module, self.adapter, self.expert))
        return factors_of(self.module, self.adapter)

    @property
    def is_embedding(self) -> bool:
        return self.adapter in self.module.lora_embedding_A

    @property
    def weight(self) -> torch.Tensor:
        """The weight of the base layer, quantised or spread over processes as it may be."""
        return self.module.get_base_layer().weight

    @property
    def magnitude(self) -> nn.Parameter | None:
        """DoRA's magnitudes, (out,); None without DoRA."""
        return magnitude_of(self.module, self.adapter)

    def assign(self, factors: Factors) -> None:
        """Set the pair, and let the layer compute (W + s B A) x with it."""
        for parameter, values in zip(self.parameters, factors, strict=True):
            write(parameter, as_kept(values, parameter))
        self.renew_magnitude()

    def renew_magnitude(self) -> None:
        """Let a layer with DoRA compute (W + s B A) x; others do."""
        renew_magnitude(self.module, self.adapter)

    def values(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return the parameters of the adapter, each with a copy, or a copy of this process's part, for `write`."""
        parameters = (*self.parameters, self.magnitude)
        return [(parameter, own_part(parameter)) for parameter in parameters if parameter is not None]

    def with_rank(self, rank: int) -> "Site":
        """Give the pair another rank at the same scaling, with trainable zeros as factors, and return its new site."""
        if self.module.r[self.adapter] != rank:  # of several experts in a parameter, the first one does it for all
            set_rank(self.module, self.adapter, rank)
            self.module.lora_alpha[self.adapter] = plain_alpha(self.layer.scaling, rank)
        return replace(self, layer=self.layer._replace(rank=rank))

    def like(self) -> torch.Tensor:
        """Return an empty scalar on the layer's device, in float32 or wider."""
        weight = self.parameters.lora_A
        return torch.empty((), device=weight.device, dtype=torch.promote_types(weight.dtype, torch.float32))


def attach_plain(model: nn.Module, config: Config) -> peft.PeftModel:
    """Attach LoRA with its usual random start to a plain model, in place, to compare LoRA-One with.

    `lora_A` is drawn from `config.seed` and `lora_B` is zero, so the model computes what it did before. Training is
    then that of plain LoRA on the same layers that `lora_one.init` would choose.

    Args:
        model: a torch.nn.Module without an adapter.
        config: see `lora_one.Config`; rank, alpha, targets, dropout, dora, modules_to_save and seed count.

    Returns:
        A PeftModel around the same modules.

    Raises:
        ModelError: no layer matches the targets, or the model has an adapter. The model is then unchanged.

    >>> import lora_one, torch
    >>> from lora_one.backends.torch import attach_plain
    >>> model = attach_plain(torch.nn.Sequential(torch.nn.Linear(8, 4)), lora_one.Config(rank=2, targets=["0"]))
    >>> model.base_model.model[0].lora_A["default"].weight.shape
    torch.Size([2, 8])
    """
    check_open_to_lora(model)
    model = unwrapped(model)
    with plain_names(model), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        before = Snapshot(model)
        try:
            return attach_lora(model, config)
        except BaseException:
            before.restore()
            raise


def attach_lora(model: nn.Module, config: Config) -> peft.PeftModel:
    """Return a new PeftModel around a plain model, whose modules stay the same objects. A `Snapshot` undoes it."""
    take_out_leftover(model)
    check_module_names(config.modules_to_save, [path for path, _ in model.named_modules()])
    if config.dora and is_sharded(model):
        raise ModelError(f"dora=True needs {WHOLE_WEIGHTS}")
    attach, known = partial(_attached, model, config), {id(p) for p in model.parameters()}
    attached = on_all_linear(model, attach) if config.targets == ALL_LINEAR else attach(config.targets)
    shard_attached(attached, known)
    lend_settings(attached)
    mark_as_ours(attached)
    return attached


def _attached(
    model: nn.Module, config: Config, targets: str | Sequence[str], excluded: Sequence[str] = ()
) -> peft.PeftModel:
    task = task_type(model)
    modules, experts = (targets, None) if isinstance(targets, str) else split_targets(model, targets)
    lora_config = peft.LoraConfig(
        r=config.rank,
        lora_alpha=plain_alpha(
            config.scaling, config.rank
        ),  # rsLoRA's scale by the plain rule, which every reader of the adapter knows
        use_rslora=False,
        lora_dropout=config.dropout,
        use_dora=config.dora,
        target_modules=modules,
        target_parameters=experts or None,
        exclude_modules=list(excluded) or None,
        modules_to_save=list(dict.fromkeys([*config.modules_to_save, *(heads(model) if task is None else ())])) or None,
        task_type=task,
    )
    with quiet_peft():
        try:
            return peft.get_peft_model(model, lora_config)
        except ValueError as error:
            reason = str(error).split(". Currently")[0]
            if refused := re.search(r"Module '([^']+)' is incompatible with", reason):
                raise RefusedByPeft(f"targets {config.targets!r}: {reason}", refused[1]) from error
            if config.dora and "DoRA" in reason:
                raise ModelError(f"dora=True needs other targets than {config.targets!r}: {reason}") from error
            if "is not supported" in reason:
                raise ModelError(
                    f"targets must be linear layers, embeddings or convolutions, got {config.targets!r}: {reason}"
                ) from error
            # a convolution in groups, which do not divide the rank; or dropout on experts
            if reason.startswith("Targeting a") or "ParamWrapper" in reason:
                raise ModelError(f"targets {config.targets!r}: {reason}") from error
            linear = [name for name, module in model.named_modules() if isinstance(module, LINEAR)]
            raise ModelError(f"{no_match(config.targets, linear)}. PEFT says: {reason}") from error


def find_sites(model: peft.PeftModel) -> list[Site]:
    """Return the LoRA layers of the one active adapter.

    Raises:
        ModelError: no LoRA, several active adapters, a merged one, or a kind of LoRA that LoRA-One cannot start:
            convolutions in groups, a bias in lora_B, routers.
    """
    require_lora(model, "init")
    adapters = model.active_adapters
    if len(adapters) != 1:
        raise ModelError(f"one active adapter is expected, got {adapters}: choose with model.set_adapter(name)")
    adapter = adapters[0]
    sites, problems = [], []
    for path, module in model.base_model.model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if not has_factors(module, adapter):
            continue
        if reason := refusal(module, adapter):
            problems.append(f"{path}: {reason}")
            continue
        rank, scaling = module.r[adapter], module.scaling[adapter]
        if isinstance(module, ParamWrapper):
            name, sizes = layer_path(path, module), (module.out_features, module.in_features, rank, scaling)
            sites += [Site(Layer(f"{name}.{i}", *sizes, name), module, adapter, i) for i in range(module.num_experts)]
        else:
            sites.append(Site(Layer(path, *features_of(module), rank, scaling), module, adapter))
    if problems:
        raise ModelError("LoRA-One starts LoRA and DoRA, got:\n  " + "\n  ".join(problems))
    if not sites:
        raise ModelError(f"the model must have LoRA layers of adapter {adapter!r}, got none")
    return sites


def check_adapter_fits(model: peft.PeftModel, config: Config) -> None:
    """Check that a `Config` asks for the settings of the adapter that is there, which keeps them.

    Raises:
        ModelError: a setting is neither its default nor the adapter's.
    """
    require_lora(model, "init")
    default = Config()
    lora_config: Any = model.peft_config[model.active_adapters[0]]
    pairs = {
        "rank": (config.rank, default.rank, lora_config.r),
        "rank_max": (config.rank_max, default.rank_max, None),
        "dropout": (config.dropout, default.dropout, lora_config.lora_dropout),
        "dora": (config.dora, default.dora, lora_config.use_dora),
    }
    wrong = [f"{name} {asked} (the adapter's: {has})" for name, (asked, usual, has) in pairs.items()
             if asked not in (usual, has)]  # fmt: skip
    wrong[1:1] = _other_scale(config, lora_config)
    if config.targets != default.targets:
        wrong.append(f"targets {config.targets!r}")
    kept = lora_config.modules_to_save or ()
    if not set(config.modules_to_save) <= set(kept):
        wrong.append(f"modules_to_save {config.modules_to_save} (the adapter's: {tuple(kept)})")
    if wrong:
        raise ModelError(
            "a PeftModel keeps its adapter's own settings, but the Config asks for "
            f"{'; '.join(wrong)}: leave them out of the Config, or hand in the model without its adapter"
        )


def _other_scale(config: Config, lora_config: Any) -> list[str]:
    """Describe a scale that is not the adapter's. Either may be given by rsLoRA's rule or the plain rule."""
    default = Config()
    asked = replace(config, rank=lora_config.r).scaling
    has = scaling_of({**lora_config.to_dict(), "alpha_pattern": {}, "rank_pattern": {}}, "")
    usual = (config.alpha, config.use_rslora) == (default.alpha, default.use_rslora)
    if usual or math.isclose(asked, has, rel_tol=1e-6):
        return []
    if config.alpha != lora_config.lora_alpha:
        return [f"alpha {config.alpha} (the adapter's: {lora_config.lora_alpha})"]
    return [f"use_rslora {config.use_rslora}, so a scale of {asked:g} (the adapter's: {has:g})"]
