"""Write an adapter in the layout of diffusers' pipelines: one file for the models of a pipeline, no configuration."""

from pathlib import Path

from lora_one.errors import CheckpointError, ConfigError

from .adapter import Adapter
from .peft import with_kernel
from .tensors import Tensor, wider, write_tensors

COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2")  # of a pipeline, those with LoRA
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"


def check_component(component: str | None) -> None:
    """Raise ConfigError if the pipeline's model is not named, or diffusers opens no adapter for it."""
    if component not in COMPONENTS:
        raise ConfigError(
            "for diffusers, component must name the pipeline's model that the adapter is for, "
            f"one of {', '.join(COMPONENTS)}, got {component!r}"
        )


def write_diffusers(path: Path, adapter: Adapter, component: str) -> None:
    """Write an adapter into an empty folder, as `load_lora_weights` of diffusers opens it.

    Without a configuration diffusers takes every scale to be 1, and some versions take it to be r / r', r the rank of
    the first layer. So the scales go into lora_B, and all layers get the largest rank, filled with zeros.

    Raises:
        CheckpointError: DoRA on a text encoder.
    """
    if adapter.is_dora and component.startswith("text_encoder"):
        raise CheckpointError(
            f"diffusers leaves DoRA's magnitudes out when it opens the LoRA of a {component}: merge it, or keep it in "
            "PEFT's layout"
        )
    rank = max(layer.rank for layer in adapter.layers.values())
    tensors = {}
    for name, layer in adapter.layers.items():
        pair = layer.with_scale(1.0, rank).pairs[0]  # (r, in), (out, r)
        a, b = (with_kernel(factor, side, layer.form) for factor, side in zip(pair, "AB", strict=True))
        # In bfloat16 the product with the scale would be rounded again.
        dtype = layer.dtype if layer.scaling == 1.0 else wider(layer.dtype, "F32")
        tensors[f"{component}.{name}.lora_A.weight"] = Tensor(a, layer.dtype)
        tensors[f"{component}.{name}.lora_B.weight"] = Tensor(b, dtype)
        if layer.magnitude is not None:
            tensors[f"{component}.{name}.lora_magnitude_vector"] = layer.magnitude
    write_tensors(path / DIFFUSERS_WEIGHTS, tensors, "pt")
