"""Keep the output of other libraries (prints, logs, warnings) out of the command's terminal.

Only the command does this, and only while it works. A program that imports lora_one is not affected.
"""

import contextlib
import io
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import TextIO

from rich.console import Console
from rich.markup import escape

VERBOSE = "LORA_ONE_VERBOSE"
# For output that does not pass Python's streams: code in C++ and Rust, and processes that a library starts.
SETTINGS = {
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TF_CPP_MIN_LOG_LEVEL": "2",
    "GRPC_VERBOSITY": "ERROR",
}


def is_verbose() -> bool:
    """Return whether the environment asks for the output of other libraries."""
    return os.environ.get(VERBOSE, "") not in ("", "0")


@contextlib.contextmanager
def quiet(console: Console, verbose: bool = False) -> Iterator[None]:
    """Let only `console` and lora_one's own warnings reach the terminal while the block runs.

    Exceptions leave the block as usual.

    Args:
        console: made without a file, so that it prints to sys.stdout.
        verbose: change nothing, as with LORA_ONE_VERBOSE=1.
    """
    if verbose or is_verbose():
        yield
        return
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    out, err = _Discard(sys.stdout), _Discard(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        warnings.showwarning = _printer_on(console)
        yield


class _Discard(io.TextIOBase):
    """A stream that drops all text, except that of rich's consoles: they look up the stream that it replaces."""

    encoding = "utf-8"

    def __init__(self, stream: TextIO):
        self.rich_proxied_file = getattr(stream, "rich_proxied_file", stream)

    def write(self, text: str) -> int:
        return len(text)

    def writable(self) -> bool:
        return True


def _printer_on(console: Console) -> Callable[..., None]:
    """Return a `warnings.showwarning` that prints the warnings of lora_one's own classes only."""

    def show(message: Warning | str, category: type[Warning], *where: object, **more: object) -> None:
        if category.__module__.startswith("lora_one."):
            console.print(f"[yellow]warning:[/] {escape(str(message))}", soft_wrap=True)

    return show
