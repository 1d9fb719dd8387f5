"""How fast a machine is: peaks of known accelerators, two numbers that are given, or this machine, measured."""

import math
from dataclasses import dataclass

from lora_one.errors import ConfigError

TERA, GIGA = 1e12, 1e9


@dataclass(frozen=True)
class Hardware:
    """Rates that times are divided by.

    Attributes:
        name: as shown.
        flops: of dense products in the model's dtype, per second, at the peak.
        efficiency: the share of the peaks that a training step reaches.
        bandwidth: bytes per second, to and from memory.
        qr_flops, svd_flops: of decompositions of small matrices, per second, as reached.
        memory: bytes there are; None if not known.
        float32_flops: of whole gradients of weights, products in float32, at the peak.
        init_flops: of products with the weights while `init` runs, which has its own way on a CPU; None: as otherwise.
        dense_svd_flops: of decompositions of whole gradients, as reached; None: as of small matrices.
        attention_flops: of attention, as reached; None: as other products.
        thin: (columns, rate as reached) of float32 products with matrices of so few columns, by columns; empty: they
            run at the speed of memory.
        first_touch: bytes per second of memory that the process writes for the first time.
        call: seconds that an operation of the framework takes besides its work.
        heap: tensors come from the C library's heap, which keeps holes: see `memory.resident_bytes`.
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
    heap: bool = False

    @property
    def dense_rate(self) -> float:
        """Of products with the base weights, as reached."""
        return self.flops * self.efficiency

    @property
    def float32_rate(self) -> float:
        """Of dense products in float32, as reached."""
        return (self.float32_flops or self.flops) * self.efficiency

    @property
    def attention_rate(self) -> float:
        """Of attention, as reached."""
        return self.attention_flops or self.dense_rate

    def thin_rate(self, columns: int) -> float:
        """Of float32 products of a wide matrix with one of so few columns, as reached."""
        if not self.thin:  # each number of the wide matrix, 4 bytes, is used in 2 operations a column
            return min(self.float32_rate, self.bandwidth * columns / 2)
        below = [pair for pair in self.thin if pair[0] <= columns] or [self.thin[0]]
        above = [pair for pair in self.thin if pair[0] > columns] or [self.thin[-1]]
        (low, slow), (high, fast) = below[-1], above[0]
        share = 0.0 if high == low else min(1.0, max(0.0, (columns - low) / (high - low)))
        return slow + share * (fast - slow)


# Dense peaks of one accelerator, SXM boards of the A100 (80 GB), H100 and H200: TFLOP/s in bfloat16 (half of the data
# sheets' figures "with sparsity") and in float32 outside of the tensor cores, GB/s, GB. Apple states no TFLOP/s.
_PEAKS = {
    "A100": (312.0, 19.5, 2039.0, 80.0),
    "H100": (989.0, 67.0, 3350.0, 80.0),
    "H200": (989.0, 67.0, 4800.0, 141.0),
    "L4": (121.0, 30.3, 300.0, 24.0),
    "RTX4090": (165.2, 82.6, 1008.0, 24.0),
}
ASSUMED_EFFICIENCY = 0.4  # what large training runs report of the peak; not measured here
# Thin QRs and small SVDs are bound by latency and run far below the peak. An assumption too, and a cautious one.
ASSUMED_DECOMPOSITION = 0.005
KNOWN = tuple(_PEAKS)


def known(name: str, dtype: str) -> Hardware:
    """An accelerator of the table.

    Raises:
        ConfigError: one that is not there.
    """
    if name not in _PEAKS:
        raise ConfigError(f"hardware must be one of {', '.join(KNOWN)}, got {name!r}: or give --tflops and --bandwidth")
    half, single, bandwidth, memory = _PEAKS[name]
    flops = TERA * (single if dtype == "float32" else half)
    slow = ASSUMED_DECOMPOSITION * single * TERA
    return Hardware(
        name, flops, ASSUMED_EFFICIENCY, bandwidth * GIGA, slow, slow, memory * GIGA, float32_flops=single * TERA
    )


def given(tflops: float, bandwidth: float) -> Hardware:
    """A machine of which two numbers are known: TFLOP/s in the model's dtype (float32 is taken as fast), and GB/s."""
    for name, value in (("tflops", tflops), ("bandwidth", bandwidth)):
        if not value > 0:
            raise ConfigError(f"{name} must be > 0, got {value}")
    slow = ASSUMED_DECOMPOSITION * tflops * TERA
    return Hardware("as given", tflops * TERA, ASSUMED_EFFICIENCY, bandwidth * GIGA, slow, slow)
