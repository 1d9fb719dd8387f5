"""One package per framework: its arrays, models, optimizer and files. A framework is imported only when it is used."""

from .loading import BACKENDS, backend_of, load_backend

__all__ = ["BACKENDS", "backend_of", "load_backend"]
