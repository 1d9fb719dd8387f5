"""Fine-tuning a model in Hugging Face's format: a causal one, an encoder-decoder, or one of images and text."""

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
    """See `lora_one.finetune.tuners.interface.Tuner`; also for encoder-decoder and image-text models.

    Args:
        folder: or, where no such folder is, a name on the hub.

    Raises:
        ConfigError: no such device.
        ModelError: it holds no such model that transformers can load, or a tokenizer that ends no text.
    """
    place = _device(device)
    # Without trust_remote_code transformers asks in the terminal whether to run the model's own code.
    where: Any = {"local_files_only": folder.is_dir(), "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(str(folder), **where)
        seeing = hasattr(config, "vision_config")
        loader: Any = AutoModelForCausalLM
        if seeing:
            loader = AutoModelForImageTextToText
        elif config.is_encoder_decoder:
            loader = AutoModelForSeq2SeqLM
        opener: Any = AutoProcessor if seeing else AutoTokenizer
        words = opener.from_pretrained(str(folder), **where)
        check_tokenizer(words.tokenizer if seeing else words, folder)
        model = loader.from_pretrained(str(folder), dtype=getattr(torch, dtype), **where)
    except ModelError:
        raise
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder} must hold a causal language model and its tokenizer: {error}") from error
    model = model.to(place)
    if seeing:
        return VisionTuner(model, words)
    return Seq2SeqTuner(model, words) if config.is_encoder_decoder else TorchTuner(model, words)


def _device(name: str | None) -> torch.device:
    try:
        place = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # of CUDA where there is none: AssertionError
        first = str(error).splitlines()[0]
        raise ConfigError(f"device must be one that PyTorch can use here, got {name!r}: {first}") from error
    return place
