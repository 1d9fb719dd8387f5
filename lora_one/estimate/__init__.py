"""The memory and time that an init and a training step need, from a model's config.json: `lora-one estimate`."""

from .jobs import Column, Estimate, estimate
from .reader import read_architecture
from .workload import Workload

__all__ = ["Column", "Estimate", "Workload", "estimate", "read_architecture"]
