"""Saving and loading the adapters of PyTorch models."""

from .folder import load, save

__all__ = ["load", "save"]
