"""The same causal language model's folder and adapter in every framework: how each opens them, and its logits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import lora_one


def torch_model(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def jax_model(folder: Path) -> Any:
    from lora_one.backends.jax import load_llama

    return load_llama(folder)


def mlx_model(folder: Path) -> Any:
    import mlx.core as mx

    from lora_one.backends.mlx import load_pretrained

    model, _ = load_pretrained(folder)
    model.set_dtype(mx.float32)
    return model


MODELS: dict[str, Callable[[Path], Any]] = {"torch": torch_model, "jax": jax_model, "mlx": mlx_model}


def logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    """Logits, (rows, length, vocabulary), without dropout, of a model of any framework."""
    model.eval()
    package = {cls.__module__.split(".")[0] for cls in type(model).__mro__}
    if "torch" in package:
        import torch

        with torch.no_grad():
            return model(torch.tensor(tokens)).logits.numpy()
    if "mlx" in package:
        import mlx.core as mx

        return np.array(model(mx.array(tokens)))
    return np.asarray(model(tokens))


def opened_by_lora_one(backend: str, base: Path, adapter: Path) -> Any:
    return lora_one.load(MODELS[backend](base), adapter)


def opened_by_peft(base: Path, adapter: Path) -> Any:
    """PEFT alone; a name or a shape that does not fit is an error here, not a warning."""
    import warnings

    import peft

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*adapter keys.*")
        return peft.PeftModel.from_pretrained(torch_model(base), adapter)


def opened_by_mlx_lm(base: Path, adapter: Path) -> Any:
    """mlx-lm alone, which lists what does not fit."""
    from mlx_lm.tuner.utils import load_adapters

    return load_adapters(mlx_model(base), str(adapter))


def said_beside_bitsandbytes(stderr: str) -> list[str]:
    """Return the lines but for what bitsandbytes logs as it is imported on a processor with AVX512-BF16."""
    return [line for line in stderr.splitlines() if "Failed to load CPU gemm_4bit_forward" not in line]
