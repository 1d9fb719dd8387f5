"""PEFT, called so that the user does not notice."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# Messages of PEFT's warnings about settings that it makes, and functions that it calls, itself.
_MESSAGES = (".*fan_in_fan_out.*", "The following .*_pattern keys did not match.*", ".*is_gradient_checkpointing.*")


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Silence PEFT's warnings about itself, and protect the user's random stream.

    PEFT draws a random start, which we overwrite.
    """
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        for message in _MESSAGES:
            warnings.filterwarnings("ignore", message=message)
        yield


@contextmanager
def nothing_drawn() -> Iterator[None]:
    """Let new linear layers have zeros for weights: a start that is overwritten need not be drawn."""

    def zeros(tensor: Tensor, *_: Any, **__: Any) -> Tensor:
        with torch.no_grad():
            return tensor.zero_()

    draw = nn.init.kaiming_uniform_
    nn.init.kaiming_uniform_ = zeros
    try:
        yield
    finally:
        nn.init.kaiming_uniform_ = draw
