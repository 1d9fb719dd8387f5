"""Loading an optimizer's state in which LoRA-One's start is not made yet, or is."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lora_one.errors import CheckpointError

_FIELDS = ("start_s", "start_agreement")


def refuse_unfinished(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Check that a state is not in the middle of a start, for an optimizer that makes none.

    Raises:
        CheckpointError: it is.
    """
    group = state_dict["param_groups"][0]
    if not group.get("start_done", True):
        raise CheckpointError(
            f"the state was saved while LoRA-One's start was being made, after {group['start_taken']} steps of it, but "
            "this optimizer makes none: make it by lora_one.optimizer with the same start_steps, before the factors "
            "are loaded"
        )


def check_start_state(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Check that a state fits an optimizer that makes a start.

    Raises:
        CheckpointError: it is of an optimizer that made no start, or of another model.
    """
    if "start_done" not in state_dict["param_groups"][0]:
        raise CheckpointError(
            "this optimizer makes LoRA-One's start in its first steps, but the state is that of one that made none: "
            "make this one with start_steps=0"
        )
    ours, saved = ([len(group["params"]) for group in x] for x in (optimizer.param_groups, state_dict["param_groups"]))
    if ours != saved:
        raise CheckpointError(f"the state is of another model: parameter groups of {ours} are expected, got {saved}")
    taken = state_dict["param_groups"][0]["start_taken"]
    if taken and not any(field in state for _, state in _saved_states(optimizer, state_dict) for field in _FIELDS):
        raise CheckpointError(
            f"the state must have what the {taken} steps of LoRA-One's start have read, got nothing of it: older "
            "versions of accelerate load no optimizer's state from FSDP2's checkpoints, so upgrade accelerate"
        )
    problems = []
    for index, (parameter, state) in enumerate(_saved_states(optimizer, state_dict)):
        shapes = {"step": (), "start_agreement": (), "start_s": parameter.shape[:1]}  # the others have the parameter's
        for name, value in state.items():
            expected, got = tuple(shapes.get(name, parameter.shape)), tuple(getattr(value, "shape", ()))
            if got != expected:
                problems.append(f"parameter {index}: {name} of shape {expected} is expected, got {got}")
    if problems:
        raise CheckpointError("the optimizer's state is of another model", problems)


def restore_start_state(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Take over what a start has read as it was saved; torch.optim rounds it to the parameter's dtype."""
    for parameter, state in _saved_states(optimizer, state_dict):
        for field in _FIELDS:
            if field in state:
                optimizer.state[parameter][field] = state[field].to(parameter.device, copy=True)


def _saved_states(
    optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]
) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    keys = (key for group in state_dict["param_groups"] for key in group["params"])
    for parameter, key in zip(parameters, keys, strict=True):
        yield parameter, state_dict["state"].get(key, {})
