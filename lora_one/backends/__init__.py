"""One package per framework: its arrays, models, optimizer and files. Imports none of them until asked to."""

from .loading import BACKENDS, backend_of, load_backend

__all__ = ["BACKENDS", "backend_of", "load_backend"]
