"""A power of two that a loss is multiplied by where a model computes in float16, whose range ends at 6e-8: the
gradients of a mean over a few thousand tokens lie below. It is taken out of each product in float32, exactly.

To find it the first batch's backward pass is run once more: lower while gradients overflow, higher while some
layer's are below the range and the largest leave room. Later an overflow lowers it and repeats the batch. No product
holds the scale, so neither batches nor processes need the same one.
"""

import math
from collections import defaultdict

import torch
from torch import Tensor, nn

FIRST = 2.0**15  # the largest that a loss in float16 can be multiplied by
LEAST = 2.0**-25  # below which an infinite gradient is the model's own
DOWN = 2.0**-4
# Of all entries of gradients, after raising: room for what other batches have more, and for what lies between layers.
LARGEST = 2.0**11
FULL = 2.0**8  # from where on raising is not worth a try
RAISES = 4
STEP = 2.0**-24  # between float16's smallest numbers
ENOUGH = 2.0**-11  # what rounding may take of a layer's gradient: what it takes of float16's other numbers


class _Again(Exception):
    """What leaves a backward pass that has to be run once more."""


class LossScale:
    """Multiplies losses, and watches the gradients that taps get to see.

    Attributes:
        value: what a product is too large by.
    """

    def __init__(self, model: nn.Module, device: torch.device):
        self.value = 1.0
        self._narrow = False
        self._settled = True
        if _computes_in_float16(model, device):
            self._begin()
        self.begin_pass()

    def begin_pass(self) -> None:
        """What has been rounded away is counted from here on."""
        self._signal: dict[str, float] = defaultdict(float)  # of each layer, sums of squares
        self._noise: dict[str, float] = defaultdict(float)

    def backward(self, loss: Tensor) -> bool:
        """Run a backward pass; whether all products of it are there. If not the loss is to be computed again."""
        if loss.dtype == torch.float16:
            self.value = min(self.value, FIRST)
        self._largest = self._worst = 0.0
        try:
            loss.backward(torch.full_like(loss, self.value))
        except _Again:
            return False
        if self._settled:
            return True
        self._raise()
        return False

    def takes(self, name: str, dy: Tensor, is_output: bool = True) -> bool:
        """Look at a gradient; whether products of it count.

        Args:
            is_output: of a layer's output, and not of a factor of it.
        """
        if not self._narrow:
            if dy.dtype != torch.float16:
                return True
            self._begin()  # autocast inside of the model or the loss
            raise _Again
        if dy.numel() == 0:  # an expert that is called with no token
            return self._settled
        norm = torch.linalg.vector_norm(dy, dtype=torch.promote_types(dy.dtype, torch.float32))
        largest, norm = torch.stack([torch.linalg.vector_norm(dy, torch.inf).to(norm.dtype), norm]).tolist()
        if not math.isfinite(largest) and self.value > LEAST:
            self.value *= DOWN
            self._raises = 0
            raise _Again
        self._largest = max(self._largest, largest)
        if is_output:
            noise = dy.numel() * STEP**2 / 12.0  # of numbers that are rounded to multiples of STEP
            self._worst = max(self._worst, math.sqrt(noise) / norm if norm > 0.0 else 1.0)
            if self._settled:
                self._signal[name] += norm**2 / self.value**2
                self._noise[name] += noise / self.value**2
        return self._settled

    def rounded_away(self) -> dict[str, float]:
        """Of each layer that was seen in this pass, the share of its gradient's norm that float16 may not have held."""
        return {name: math.sqrt(self._noise[name] / total) for name, total in self._signal.items() if total > 0.0}

    def _begin(self) -> None:
        self._narrow, self._settled, self.value, self._raises = True, False, FIRST, RAISES

    def _raise(self) -> None:
        if self._worst <= ENOUGH or self._largest >= FULL or self._raises == 0:
            self._settled = True
            return
        self._raises -= 1
        room = math.floor(math.log2(LARGEST / self._largest)) if self._largest > 0.0 else 10
        self.value *= 2.0**room


def _computes_in_float16(model: nn.Module, device: torch.device) -> bool:
    if torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) == torch.float16:
        return True
    tensors = [*model.parameters(), *model.buffers()]
    dtypes = {x.dtype for x in tensors} | {getattr(module, "compute_dtype", None) for module in model.modules()}
    return torch.float16 in dtypes
