"""LoRA-One: start LoRA along the best directions of the first gradient (arXiv 2502.01235)."""

from . import errors
from .api import init, load, merge, optimizer, save
from .checkpoint.conversion import convert
from .config import Config
from .report import DeferredReport, Report

__version__ = "0.1.0"
__all__ = ["Config", "DeferredReport", "Report", "convert", "errors", "init", "load", "merge", "optimizer", "save"]
