"""The command's terminal is its own: what other libraries print, log and warn of stays away from it.

Only the command does this, while it works; to a program that imports lora_one nothing of it happens.
"""

import contextlib
import io
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.markup import escape

VERBOSE = "LORA_ONE_VERBOSE"
# For what does not go through Python's streams: code in C++ and Rust, and processes that a library starts.
_SETTINGS = {
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TF_CPP_MIN_LOG_LEVEL": "2",
    "GRPC_VERBOSITY": "ERROR",
}


def is_verbose() -> bool:
    """Whether the environment asks for what other libraries say."""
    return os.environ.get(VERBOSE, "") not in ("", "0")


@contextlib.contextmanager
def quiet(console: Console, verbose: bool = False) -> Iterator[None]:
    """While the block runs, only `console` reaches the terminal, with the warnings of lora_one's own classes.

    Errors are exceptions, and leave the block as they do without it.

    Args:
        console: without a file of its own, so that it prints to sys.stdout.
        verbose: do nothing; LORA_ONE_VERBOSE=1 asks for the same.
    """
    if verbose or is_verbose():
        yield
        return
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    out, err = _Nowhere(sys.stdout), _Nowhere(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        warnings.showwarning = _shown_on(console)
        yield


class _Nowhere(io.TextIOBase):
    """A stream that keeps nothing, but for rich's consoles, which look for the stream that it stands for."""

    encoding = "utf-8"

    def __init__(self, stream: Any):
        self.rich_proxied_file = getattr(stream, "rich_proxied_file", stream)

    def write(self, text: str) -> int:
        return len(text)

    def writable(self) -> bool:
        return True


def _shown_on(console: Console) -> Any:
    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if category.__module__.startswith("lora_one."):
            console.print(f"[yellow]warning:[/] {escape(str(message))}", soft_wrap=True)

    return show
