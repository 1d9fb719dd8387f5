"""The NumPy target: the reference implementation, run in the working precision itself."""

import numpy as np

from lora_one.backends.numpy import ops
from lora_one.conformance.target import Target


def open_target(dtype: str, device: str | None = None) -> Target | None:
    """Return NumPy, which runs on the CPU whatever the device. It has no bfloat16: None."""
    if dtype == "bfloat16":
        return None
    return Target("numpy", dtype, ops, np.zeros((), dtype=dtype))
