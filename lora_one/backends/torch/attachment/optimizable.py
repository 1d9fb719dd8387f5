"""Whether an optimizer of PyTorch trains a model's factors, and can tell lora_A from lora_B."""

from collections.abc import Iterable

from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from lora_one.backends.torch.places import FLATTENED
from lora_one.checks import shown_names
from lora_one.errors import ModelError

from .attach import Site
from .kinds import factors_of
from .sharded_base import check_factors_sharded
from .sharding import is_dtensor, shape_of
from .wrappers import is_engine
from .zero import has_engine, is_partitioned


def check_optimizable(model: nn.Module, precondition: bool, loraplus_lr_ratio: float) -> None:
    """Check that an optimizer of PyTorch can train a model's factors with these settings.

    Raises:
        ModelError: DeepSpeed's engine trains them, FSDP2 does not know them, or a setting needs matrices and they are
            flat.
    """
    check_no_engine(model)
    check_factors_sharded(model)
    asked = {"precondition": (precondition, False), "loraplus_lr_ratio": (loraplus_lr_ratio, 1.0)}
    settings = [f"{name}={value}" for name, (value, usual) in asked.items() if value != usual]
    if settings and (flat := _flat_factors(model)):
        raise ModelError(
            f"{' and '.join(settings)} needs the factors of each layer as matrices, got {len(flat)} flattened ones: "
            f"FullyShardedDataParallel keeps them like that; shard with fully_shard, or leave "
            f"{' and '.join(settings)} out"
        )
    wrappers = [x for x in model.modules() if isinstance(x, ParamWrapper)]
    if precondition and any(
        p.requires_grad for x in wrappers for p in (*x.lora_A.parameters(), *x.lora_B.parameters())
    ):
        raise ModelError(
            f"precondition=True takes one pair at a time, got the experts in {wrappers[0].parameter_name!r}, whose "
            "pairs are one parameter: leave precondition=True out, or the experts out of the targets"
        )
    if precondition and (spread := [x for x in _factors(model) if len(shape_of(x)) > 2 and is_dtensor(x)]):
        raise ModelError(
            f"precondition=True needs whole factors of convolutions, got {len(spread)} that fully_shard has split: "
            "leave precondition=True out, or the convolutions out of the targets"
        )


def check_no_engine(model: nn.Module) -> None:
    """Check that an optimizer may still be made for a model.

    Raises:
        ModelError: DeepSpeed's engine has one.
    """
    if is_engine(model) or has_engine(model):
        raise ModelError(
            "DeepSpeed's engine has an optimizer of its own: make lora_one.optimizer(model) before, and hand it to "
            "deepspeed.initialize(model=model, optimizer=...); lora_one.init(model, batches) starts a model in an "
            "engine"
        )


def check_no_experts(sites: Iterable[Site]) -> None:
    """Check that no pair is a part of a parameter, which an optimizer could not start.

    Raises:
        ModelError: one is.
    """
    if experts := [site.layer.name for site in sites if site.expert is not None]:
        raise ModelError(
            f"the start of experts that are one parameter is made by lora_one.init(model, batches) alone, got "
            f"{shown_names(experts, 2)} without batches: hand in batches, or leave the experts out of the targets"
        )


def check_stays_whole(model: nn.Module) -> None:
    """Check that an optimizer will find the factors whole in its steps.

    Raises:
        ModelError: the model is loaded in parts, for DeepSpeed's engine of ZeRO-3, which flattens them.
    """
    if any(map(is_partitioned, model.parameters())):
        raise ModelError(f"the model's weights are in parts, by deepspeed.zero.Init. {FLATTENED}")


def _flat_factors(model: nn.Module) -> list[Tensor]:
    return [x for x in _factors(model) if len(shape_of(x)) < 2]


def _factors(model: nn.Module) -> list[Tensor]:
    """Return the trainable factors of all LoRA pairs."""
    layers = [x for x in model.modules() if isinstance(x, LoraLayer) and not isinstance(x.lora_A, nn.ParameterDict)]
    adapters = [(layer, name) for layer in layers for name in (*layer.lora_A, *layer.lora_embedding_A)]
    return [factor for layer, name in adapters for factor in factors_of(layer, name) if factor.requires_grad]
