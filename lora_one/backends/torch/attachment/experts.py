"""The weights of all experts in one parameter, (experts, ., .), and PEFT's LoRA on it: a pair for each expert.

PEFT keeps the pairs of all experts in two matrices: lora_A (experts * r, in), expert by expert, and lora_B
(out, r * experts), in which the number of the expert runs fastest.
"""

from collections.abc import Sequence

from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from lora_one.backends.targets import matches
from lora_one.core.factors import Factors

from .sharding import is_spread, shape_of

_AXES = 3  # of a parameter that holds experts


def split_targets(model: nn.Module, targets: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the names that mean modules, and those that mean parameters of experts, such as "experts.down_proj".

    A name that is the end of a module's path means modules, as in PEFT.
    """
    modules = [path for path, _ in model.named_modules()]
    stacks = [path for path, parameter in model.named_parameters() if len(shape_of(parameter)) == _AXES]
    of_experts = [
        name
        for name in targets
        if any(matches(path, [name]) for path in stacks) and not any(matches(path, [name]) for path in modules)
    ]
    return [name for name in targets if name not in of_experts], of_experts


def layer_path(path: str, module: ParamWrapper) -> str:
    """Return the path of the parameter in the base model. Layers of several parameters of one module are nested."""
    return f"{path.replace('.base_layer', '')}.{module.parameter_name}"


def refusal_of_experts(module: ParamWrapper, adapter: str) -> str | None:
    """Return why LoRA-One cannot start the LoRA on a parameter, and the remedy; None if it can."""
    if len(shape_of(module.get_param())) != _AXES:
        # PEFT's "all-linear" gives this to the router of a mixture of experts, which returns more than a product.
        return f"LoRA on its parameter {module.parameter_name!r}; name linear layers, or stacks of experts, as targets"
    if is_spread(module.lora_A[adapter].weight) or is_spread(module.get_param()):
        return (
            f"LoRA on the experts in {module.parameter_name!r}, whose weights are spread over processes; attach and "
            "start LoRA before that"
        )
    return None


def pair_of(module: ParamWrapper, adapter: str, expert: int) -> Factors:
    """Return views of an expert's pair, lora_A (r, in) and lora_B (out, r)."""
    a, b = (getattr(module, side)[adapter].weight.detach() for side in ("lora_A", "lora_B"))
    rank: int = module.r[adapter]
    of_all: Tensor = b.view(len(b), rank, module.num_experts)
    return Factors(a.view(module.num_experts, rank, -1)[expert], of_all[..., expert])
