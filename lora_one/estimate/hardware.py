"""The rates of a machine: peaks of known accelerators, or two given numbers."""

import math
from dataclasses import dataclass

from lora_one.errors import ConfigError

TERA, GIGA = 1e12, 1e9


@dataclass(frozen=True)
class Hardware:
    """Rates that times are divided by.

    Attributes:
        name: as printed.
        flops: peak rate of dense products in the model's dtype, FLOP/s.
        efficiency: the share of the peaks that a training step reaches.
        bandwidth: of memory, bytes per second.
        qr_flops, svd_flops: achieved rates of decompositions of small matrices, FLOP/s.
        memory: bytes that the machine has; None if unknown.
        float32_flops: peak rate of dense products in float32, which whole gradients of weights use; None for `flops`.
        init_flops: peak rate of products with the base weights in `init`, which has its own routine on a CPU; None for
            `flops`.
        dense_svd_flops: achieved rate of decompositions of whole gradients; None for `svd_flops`.
        attention_flops: achieved rate of attention; None for that of other products.
        thin: pairs (columns, achieved rate) of float32 products with matrices of few columns, sorted by columns. Empty
            if they run at the speed of memory.
        first_touch: rate at which the process writes memory for the first time, bytes per second.
        call: seconds per call of the framework in addition to its work.
    """

    name: str
    flops: float
    efficiency: float
    bandwidth: float
    qr_flops: float
    svd_flops: float
    memory: float | None = None
    float32_flops: float | None = None
    init_flops: float | None = None
    dense_svd_flops: float | None = None
    attention_flops: float | None = None
    thin: tuple[tuple[int, float], ...] = ()
    first_touch: float = math.inf
    call: float = 0.0

    @property
    def dense_rate(self) -> float:
        """Achieved rate of products with the base weights, FLOP/s."""
        return self.flops * self.efficiency

    @property
    def float32_rate(self) -> float:
        """Achieved rate of dense products in float32, FLOP/s."""
        return (self.float32_flops or self.flops) * self.efficiency

    @property
    def attention_rate(self) -> float:
        """Achieved rate of attention, FLOP/s."""
        return self.attention_flops or self.dense_rate

    def thin_rate(self, columns: int) -> float:
        """Return the achieved rate of float32 products with a matrix of the given number of columns, FLOP/s."""
        if not self.thin:  # each number of the wide matrix, 4 bytes, is used in 2 operations per column
            return min(self.float32_rate, self.bandwidth * columns / 2)
        below = [pair for pair in self.thin if pair[0] <= columns] or [self.thin[0]]
        above = [pair for pair in self.thin if pair[0] > columns] or [self.thin[-1]]
        (low, slow), (high, fast) = below[-1], above[0]
        share = 0.0 if high == low else min(1.0, max(0.0, (columns - low) / (high - low)))
        return slow + share * (fast - slow)


# name -> TFLOP/s in bfloat16 (half of the data sheets' figures "with sparsity"), TFLOP/s in float32 without the tensor
# cores, GB/s, GB. A100 (80 GB), H100 and H200 are SXM boards. Apple publishes no TFLOP/s.
PEAKS = {
    "A100": (312.0, 19.5, 2039.0, 80.0),
    "H100": (989.0, 67.0, 3350.0, 80.0),
    "H200": (989.0, 67.0, 4800.0, 141.0),
    "L4": (121.0, 30.3, 300.0, 24.0),
    "RTX4090": (165.2, 82.6, 1008.0, 24.0),
}
ASSUMED_EFFICIENCY = 0.4  # the share that large training runs report; not measured here
# Thin QRs and small SVDs wait for latency and run far below the peak. This share is a cautious assumption.
ASSUMED_DECOMPOSITION = 0.005


def known(name: str, dtype: str) -> Hardware:
    """Return an accelerator of the table.

    Raises:
        ConfigError: the table does not have it.
    """
    if name not in PEAKS:
        raise ConfigError(f"hardware must be one of {', '.join(PEAKS)}, got {name!r}: or give --tflops and --bandwidth")
    half, single, bandwidth, memory = PEAKS[name]
    flops = TERA * (single if dtype == "float32" else half)
    slow = ASSUMED_DECOMPOSITION * single * TERA
    return Hardware(
        name, flops, ASSUMED_EFFICIENCY, bandwidth * GIGA, slow, slow, memory * GIGA, float32_flops=single * TERA
    )


def given(tflops: float, bandwidth: float) -> Hardware:
    """Return a machine from two numbers.

    Args:
        tflops: peak in the model's dtype, TFLOP/s; float32 is assumed to be as fast.
        bandwidth: of memory, GB/s.

    Raises:
        ConfigError: a number is not above zero.
    """
    for name, value in (("tflops", tflops), ("bandwidth", bandwidth)):
        if not value > 0:
            raise ConfigError(f"{name} must be > 0, got {value}")
    slow = ASSUMED_DECOMPOSITION * tflops * TERA
    return Hardware("as given", tflops * TERA, ASSUMED_EFFICIENCY, bandwidth * GIGA, slow, slow)
