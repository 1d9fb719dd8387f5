"""DoRA's magnitudes in PEFT's layout: a vector beside the factors of each layer, if the configuration says so."""

from collections.abc import Collection, Mapping

from .adapter import Form, LoraLayer
from .tensors import Tensor

MAGNITUDE_KEY = "base_model.model.{path}.lora_magnitude_vector"


def magnitude_problems(
    layers: Collection[str], magnitudes: Collection[str], use_dora: bool, forms: Mapping[str, Form]
) -> list[str]:
    """Return where a folder does not have the magnitudes that its configuration says.

    Args:
        layers: those with factors.
        magnitudes: the layers with magnitudes.
        use_dora: of the configuration.
        forms: of the layers that are not linear.
    """
    wanted = set(layers) if use_dora else set[str]()
    others = [f"{layer}: DoRA on {forms[layer].name}" for layer in sorted(wanted & forms.keys())]
    return others + [
        f"{layer}: lora_magnitude_vector {'is missing' if layer in wanted else 'belongs to no layer with DoRA'}: "
        f"use_dora is {use_dora}"
        for layer in sorted(wanted.symmetric_difference(magnitudes))
    ]


def magnitude_tensors(layers: Mapping[str, LoraLayer]) -> dict[str, Tensor]:
    """Return the magnitudes of layers with DoRA, by PEFT's names."""
    vectors = {MAGNITUDE_KEY.format(path=name): layer.magnitude for name, layer in layers.items()}
    return {key: tensor for key, tensor in vectors.items() if tensor is not None}
