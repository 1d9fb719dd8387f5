"""Opening a model in Hugging Face's format: a causal one, an encoder-decoder, or one of images and text."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoProcessor,
    AutoTokenizer,
)

from lora_one.errors import ConfigError, ModelError
from lora_one.finetune.fit import check_tokenizer

from .causal import TorchTuner
from .seq2seq import Seq2SeqTuner
from .vision import VisionTuner


def open_tuner(folder: Path, dtype: str, device: str | None) -> TorchTuner:
    """Open a causal, an encoder-decoder or an image-text model: see `lora_one.finetune.tuners.interface.TunerModule`.

    Args:
        folder: the folder with the model or, if there is no such folder, its name on the hub.

    Raises:
        ConfigError: PyTorch cannot use the device.
        ModelError: the folder holds no such model that transformers can load, or its tokenizer has no end-of-sequence
            token.
    """
    place = _device(device)
    # Unless trust_remote_code is set, transformers asks in the terminal whether to run the model's own code.
    where: Any = {"local_files_only": folder.is_dir(), "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(str(folder), **where)
        has_images = hasattr(config, "vision_config")
        loader: Any = AutoModelForCausalLM
        if has_images:
            loader = AutoModelForImageTextToText
        elif config.is_encoder_decoder:
            loader = AutoModelForSeq2SeqLM
        opener: Any = AutoProcessor if has_images else AutoTokenizer
        encoder = opener.from_pretrained(str(folder), **where)  # a tokenizer, or a processor that has one
        check_tokenizer(encoder.tokenizer if has_images else encoder, folder)
        model = loader.from_pretrained(str(folder), dtype=getattr(torch, dtype), **where)
    except ModelError:
        raise
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder} must hold a causal language model and its tokenizer: {error}") from error
    model = model.to(place)
    if has_images:
        return VisionTuner(model, encoder)
    return Seq2SeqTuner(model, encoder) if config.is_encoder_decoder else TorchTuner(model, encoder)


def _device(name: str | None) -> torch.device:
    try:
        place = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # AssertionError: CUDA without a GPU
        first = str(error).splitlines()[0]
        raise ConfigError(f"device must be one that PyTorch can use here, got {name!r}: {first}") from error
    return place
