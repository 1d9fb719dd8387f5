"""The whole job that `lora-one finetune` runs: data, model, LoRA-One's start, training, the adapter on disk."""

from .data import encode, read_examples
from .job import Outcome, Progress, finetune, initialize_only

__all__ = ["Outcome", "Progress", "encode", "finetune", "initialize_only", "read_examples"]
