"""Adapters of PyTorch models on disk."""

from .folder import load, save

__all__ = ["load", "save"]
