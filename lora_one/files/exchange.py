"""Exchange two names on disk in one step, where the system can do that: on Linux and macOS."""

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


def exchange(first: Path, second: Path) -> None:
    """Exchange two folders or files in one step: at any moment each name leads to one of them.

    Raises:
        OSError: the system or the file system cannot do it, or one of them is a mount point.
    """
    swap = _system_call()
    if swap is None:
        raise OSError(errno.ENOTSUP, "this system cannot exchange two names", str(first))
    if swap(os.fsencode(first), os.fsencode(second)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(first), None, str(second))


@functools.cache
def _system_call() -> Callable[[bytes, bytes], int] | None:
    if sys.platform not in ("linux", "darwin"):
        return None
    library = ctypes.CDLL(None, use_errno=True)
    name = "renameat2" if sys.platform == "linux" else "renamex_np"
    try:
        function = getattr(library, name)
    except AttributeError:  # an older C library
        return None
    if sys.platform == "linux":
        function.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
        return lambda first, second: function(_AT_FDCWD, first, _AT_FDCWD, second, _RENAME_EXCHANGE)
    function.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_uint]
    return lambda first, second: function(first, second, _RENAME_SWAP)
