"""The whole job that `lora-one finetune` runs: data, model, LoRA-One's start, training, the adapter on disk."""

from .data import read_examples
from .encoding import encode
from .job import Outcome, finetune, initialize_only
from .progress import Progress

__all__ = ["Outcome", "Progress", "encode", "finetune", "initialize_only", "read_examples"]
