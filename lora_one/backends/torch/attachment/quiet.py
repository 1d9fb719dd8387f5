"""PEFT, called so that the user does not notice."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

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
