"""The pages of `lora-one inspect`: one HTML file each, which needs nothing else and no network."""

from .adapter import write_page
from .comparison import write_comparison

__all__ = ["write_comparison", "write_page"]
