"""The loss scale of a model that computes in float16, see `lora_one.core.loss_scale`, and what its gradients lose.

The first batch's backward pass runs again until a scale is found. If a later batch overflows, the scale falls and that
batch runs again. Each product is divided by the scale at once, so neither batches nor processes need the same one.
"""

import math
from collections import defaultdict

import torch
from torch import Tensor, nn

from lora_one.core.loss_scale import UNSCALED, Limits, begin
from lora_one.errors import ModelError

FIRST = 2.0**15  # the largest that a loss in float16 can be multiplied by
# Largest entry of all gradients after a raise: leaves room for other batches, and for values between the layers.
LARGEST = 2.0**11
STEP = 2.0**-24  # between float16's smallest numbers
LIMITS = Limits(
    first=FIRST,
    least=2.0**-25,
    down=2.0**-4,
    enough=2.0**-11,  # as much as rounding takes of float16's normal numbers
    raises=4,
    small_room=2.0**3,
)


class _RunAgain(Exception):
    """Leaves a backward pass that has to run again at another scale."""


class LossScale:
    """The factor of the losses, and a watch on the gradients that the taps see.

    Args:
        can_repeat: whether this process may run a batch again by itself.
    """

    def __init__(self, model: nn.Module, device: torch.device, can_repeat: bool = True):
        self._can_repeat = can_repeat
        self._search = begin(UNSCALED)
        self._is_float16 = False
        if _computes_in_float16(model, device):
            self._begin()
        self.begin_pass()

    @property
    def value(self) -> float:
        """What a product is too large by."""
        return self._search.value

    def begin_pass(self) -> None:
        """Count from here on what has been rounded away."""
        self._signal: dict[str, float] = defaultdict(float)  # per layer, sum of squares of its gradients
        self._noise: dict[str, float] = defaultdict(float)  # per layer, sum of squares of their rounding errors

    def backward(self, loss: Tensor) -> bool:
        """Run a backward pass. Return whether all its products count; if not, compute the loss again and repeat."""
        if loss.dtype == torch.float16:
            self._search = self._search._replace(value=min(self.value, FIRST))
        self._largest = self._worst = 0.0
        try:
            loss.backward(torch.full_like(loss, self.value))
        except _RunAgain:
            return False
        if self._search.is_settled:
            return True
        self._search = self._search.after_finite(
            self._worst, LARGEST / self._largest if self._largest > 0.0 else 2.0**10
        )
        return False

    def takes(self, name: str, dy: Tensor, is_output: bool = True) -> bool:
        """Look at a gradient. Return whether products of it count.

        Args:
            is_output: whether it is the gradient of a layer's output; False for one of a factor.
        """
        if not self._is_float16:
            if dy.dtype != torch.float16:
                return True
            self._begin()  # autocast inside of the model or the loss
            raise _RunAgain
        if dy.numel() == 0:  # an expert that is called with no token
            return self._search.is_settled
        norm = torch.linalg.vector_norm(dy, dtype=torch.promote_types(dy.dtype, torch.float32))
        largest, norm = torch.stack([torch.linalg.vector_norm(dy, torch.inf).to(norm.dtype), norm]).tolist()
        if not math.isfinite(largest) and self._search.can_fall:
            self._search = self._search.after_overflow()
            raise _RunAgain
        self._largest = max(self._largest, largest)
        if is_output:
            noise = dy.numel() * STEP**2 / 12.0  # of numbers that are rounded to multiples of STEP
            self._worst = max(self._worst, math.sqrt(noise) / norm if norm > 0.0 else 1.0)
            if self._search.is_settled:
                self._signal[name] += norm**2 / self.value**2
                self._noise[name] += noise / self.value**2
        return self._search.is_settled

    def rounded_away(self) -> dict[str, float]:
        """Return, per layer seen in this pass, the share of its gradient's norm that float16 may not have held."""
        return {name: math.sqrt(self._noise[name] / total) for name, total in self._signal.items() if total > 0.0}

    def _begin(self) -> None:
        if not self._can_repeat:
            raise ModelError(
                "float16 needs a loss scale, which a process finds by repeating batches, and with sharded weights none "
                "can do that alone: use bfloat16 or float32, or init before sharding"
            )
        self._is_float16 = True
        self._search = begin(LIMITS)


def _computes_in_float16(model: nn.Module, device: torch.device) -> bool:
    if torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) == torch.float16:
        return True
    tensors = [*model.parameters(), *model.buffers()]
    dtypes = {x.dtype for x in tensors} | {getattr(module, "compute_dtype", None) for module in model.modules()}
    return torch.float16 in dtypes
