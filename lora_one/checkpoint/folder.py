"""The files of an adapter folder: their names, and how a whole folder is replaced."""

from contextlib import AbstractContextManager
from pathlib import Path

from lora_one.files.atomic import replacing

CONFIG = "adapter_config.json"  # one file for both layouts
WEIGHTS = "adapter_model.safetensors"  # PEFT's layout
MLX_WEIGHTS = "adapters.safetensors"  # mlx-lm's layout
PICKLED = "adapter_model.bin"  # PEFT's layout as a pickle, which lora-one does not open
METADATA = "lora_one.json"
ADAPTER_FILES = (CONFIG, WEIGHTS, PICKLED, MLX_WEIGHTS, METADATA)  # a new adapter replaces or removes all of them


def is_file(path: Path) -> bool:
    """Return whether `path` is a file; False for a name that no file can have."""
    try:
        return path.is_file()
    except OSError:  # the name is too long, or its folder may not be looked into
        return False


def replacing_adapter(path: Path) -> AbstractContextManager[Path]:
    """Yield an empty folder to write an adapter into; at the end it replaces the adapter in `path` in one step.

    Raises:
        CheckpointError: see `lora_one.files.atomic.replacing`.
    """
    return replacing(path, ADAPTER_FILES)
