"""The job whose costs are estimated: the settings of the training and of the init that the costs depend on."""

from dataclasses import dataclass, field

from lora_one.config import Config
from lora_one.errors import ConfigError

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
FLOAT32 = DTYPE_BYTES["float32"]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One training step and one init.

    Attributes:
        batch_size, seq_len: sequences per batch, and their length in tokens, padding included.
        init_batches: number of batches that the init reads, all of that size.
        dtype: of the base weights and the activations. LoRA's factors are float32, as in PEFT.
        quantized: the blocks' linear layers are 4-bit in groups of 64; embedding and output layer stay in `dtype`.
        attention: "eager" keeps the attention matrix for the backward pass, "sdpa" does not.
        checkpointing: each block's activations are recomputed in the backward pass instead of kept.
        precondition: use the r x r preconditioner of `lora_one.optimizer`.
        config: of `lora_one.init`; its rank, rank_max, passes, oversample and targets count. passes="auto" counts as
            the fewest.
    """

    batch_size: int = 1
    seq_len: int = 2048
    init_batches: int = 8
    dtype: str = "bfloat16"
    quantized: bool = False
    attention: str = "sdpa"
    checkpointing: bool = False
    precondition: bool = False
    config: Config = field(default_factory=Config)

    def __post_init__(self) -> None:
        for name in ("batch_size", "seq_len", "init_batches"):
            if (value := getattr(self, name)) < 1:
                raise ConfigError(f"{name} must be >= 1, got {value}")
        if self.dtype not in DTYPE_BYTES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPE_BYTES)}, got {self.dtype!r}")
        if self.attention not in ("sdpa", "eager"):
            raise ConfigError(f"attention must be sdpa or eager, got {self.attention!r}")

    @property
    def tokens(self) -> int:
        """Number of tokens per batch."""
        return self.batch_size * self.seq_len

    @property
    def directions(self) -> int:
        """Number of directions of a gradient that the start needs: the rank, or the largest that a layer may get."""
        return self.config.rank_max or self.config.rank

    @property
    def width(self) -> int:
        """Number of directions that a running SVD follows, k."""
        return self.directions + self.config.oversample

    @property
    def item(self) -> int:
        """Bytes per number in `dtype`."""
        return DTYPE_BYTES[self.dtype]
