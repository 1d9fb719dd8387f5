"""What an init and a training step will take, from a model's config.json alone: `lora-one estimate`."""

from .architecture import read_architecture
from .jobs import Column, Estimate, estimate, measured_error
from .workload import Workload

__all__ = ["Column", "Estimate", "Workload", "estimate", "measured_error", "read_architecture"]
