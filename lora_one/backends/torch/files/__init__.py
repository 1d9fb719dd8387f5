"""Saving and loading the adapters of PyTorch models."""

from .folder import load, one_writer, save

__all__ = ["load", "one_writer", "save"]
