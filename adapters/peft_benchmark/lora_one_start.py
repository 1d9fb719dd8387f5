"""LoRA-One's start as a step of PEFT's method comparison, between `get_model` and `train`. README.md shows where."""

from typing import Any

import lora_one


def start(
    model: Any, tokenizer: Any, texts: list[str], batch_size: int = 4, samples: int = 256, **settings: Any
) -> lora_one.Report:
    """Start a PeftModel from the first texts of the training, and return what each layer has got.

    Args:
        texts: the training's texts, query and response, in its order.
        settings: those of `lora_one.Config`; rank, scale and targets are the model's.
    """
    texts = texts[:samples]
    batches = [batch(model, tokenizer, texts[i : i + batch_size]) for i in range(0, len(texts), batch_size)]
    return lora_one.init(model, batches, config=lora_one.Config(**settings))[1]


def batch(model: Any, tokenizer: Any, texts: list[str]) -> dict[str, Any]:
    """Return texts with the labels of the comparison's training loop: each token, and one end of sequence."""
    limit = tokenizer.model_max_length
    sequences = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id][:limit] for text in texts]
    padded = tokenizer.pad({"input_ids": sequences}, return_tensors="pt").to(model.device)
    return {**padded, "labels": padded["input_ids"].masked_fill(padded["attention_mask"] == 0, -100)}
