"""Two names on disk that change places in one step, where the system can do that: Linux and macOS."""

import ctypes
import errno
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path

_AT_FDCWD = -100  # "relative to the working directory"
_RENAME_EXCHANGE = 2  # Linux
_RENAME_SWAP = 2  # macOS


def exchange(one: Path, other: Path) -> None:
    """Let two folders or files change places: at any moment each name leads to one of them.

    Raises:
        OSError: not here: the system or the file system cannot, or one of them is a mount point.
    """
    swap = _system_call()
    if swap is None:
        raise OSError(errno.ENOTSUP, "this system cannot exchange two names", str(one))
    if swap(os.fsencode(one), os.fsencode(other)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(one), None, str(other))


@functools.cache
def _system_call() -> Callable[[bytes, bytes], int] | None:
    if sys.platform not in ("linux", "darwin"):
        return None
    library = ctypes.CDLL(None, use_errno=True)
    name = "renameat2" if sys.platform == "linux" else "renamex_np"
    try:
        function = getattr(library, name)
    except AttributeError:  # a C library from before it
        return None
    if sys.platform == "linux":
        function.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
        return lambda one, other: function(_AT_FDCWD, one, _AT_FDCWD, other, _RENAME_EXCHANGE)
    function.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_uint]
    return lambda one, other: function(one, other, _RENAME_SWAP)
