"""LoRA on a base model that FSDP2 shards already."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from lora_one.errors import ModelError

from .sharding import is_dtensor, is_unit, units


def shard_attached(attached: nn.Module, known: set[int]) -> None:
    """Let FSDP2 shard what was attached to a model that it shards already, in the way of the module around it.

    Otherwise nobody would average its gradients: FSDP2 knows the parameters that were there when it was called.

    Args:
        attached: the model with its LoRA.
        known: ids of the parameters that it had before.

    Raises:
        ModelError: something else than the two linear layers of plain LoRA was attached.
    """
    if not units(attached):
        return
    new = {id(p) for p in attached.parameters()} - known
    of_unit: dict[Any, list[nn.Module]] = {}  # module of FSDP2 -> what is new in it
    for path, module, unit in _with_units(attached):
        if not new.isdisjoint(map(id, module.parameters(recurse=False))):
            if not isinstance(module, nn.Linear) or path.split(".")[-2] not in ("lora_A", "lora_B"):
                raise ModelError(
                    f"{path}: fully_shard was called before this was attached, and can be told of the factors of "
                    "linear layers alone: attach first, by lora_one.init, load or peft.get_peft_model, and shard then"
                )
            layer, _, adapter = path.rsplit(".", 2)
            _widen(attached.get_submodule(layer), adapter, module)
            of_unit.setdefault(unit, []).append(module)
    from torch.distributed.fsdp import fully_shard

    for unit, modules in of_unit.items():
        mesh = next(p for p in unit.parameters() if is_dtensor(p)).device_mesh
        fully_shard(modules, mesh=mesh, mp_policy=replace(unit._get_fsdp_state()._mp_policy, output_dtype=None))
    for module in units(attached):  # FSDP2 lists its modules in the first forward pass: let it do so again
        state = module._get_fsdp_state()
        state._is_root = None
        state._state_ctx.all_states.clear()


def check_factors_sharded(model: nn.Module) -> None:
    """Check that FSDP2 knows the LoRA of a model that it shards.

    Raises:
        ModelError: it was attached later.
    """
    for path, module, _ in _with_units(model) if units(model) else ():
        outside = [p for p in module.parameters(recurse=False) if p.requires_grad and not is_dtensor(p)]
        if outside and any(part in ("lora_A", "lora_B") for part in path.split(".")):
            raise ModelError(
                f"{path}: LoRA was attached after fully_shard, which would not average its gradients: attach it "
                "before, or call lora_one.init or load on the sharded model without LoRA, where its LoRA is sharded too"
            )


def _widen(layer: Any, name: str, factor: nn.Linear) -> None:
    """Give a new factor the width of its whole layer. PEFT takes that of a part, if FSDP2's mesh has names of its own.

    Only lora_B is too narrow, since FSDP2 splits rows; and it is zero.
    """
    weight = layer.get_base_layer().weight
    if is_dtensor(weight) and factor is layer.lora_B._modules.get(name) and len(factor.weight) != len(weight):
        zeros = factor.weight.new_zeros(len(weight), factor.in_features)  # (out, r)
        factor.weight = nn.Parameter(zeros, factor.weight.requires_grad)
        factor.out_features = layer.out_features = len(weight)


def _with_units(model: nn.Module, path: str = "", unit: Any = None) -> Iterator[tuple[str, nn.Module, Any]]:
    """Yield all modules, with their paths and the module of FSDP2 that each is in."""
    unit = model if is_unit(model) else unit
    yield path, model, unit
    for name, child in model.named_children():
        yield from _with_units(child, f"{path}.{name}" if path else name, unit)
