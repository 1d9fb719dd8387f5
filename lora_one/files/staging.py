"""Hidden folders to prepare files in. The next call removes those whose process was killed."""

import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

if sys.platform != "win32":
    import fcntl

PREFIX = ".lora-one-saving-"
_DEAD_AFTER = 24 * 3600.0  # seconds, for file systems without locks, which tell whether the process is alive


@contextlib.contextmanager
def staging(parent: Path) -> Iterator[Path]:
    """Yield a new hidden folder in `parent`, and remove it when the block ends.

    The process holds a lock on it, which the system releases when the process dies, however it dies.

    Raises:
        OSError: `parent` cannot be written to.
    """
    _remove_abandoned(parent)
    folder, lock = _new(parent)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _close(lock)


def _new(parent: Path) -> tuple[Path, int | None]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        try:
            lock = _lock(folder)
        except (BlockingIOError, FileNotFoundError):
            continue  # before this process locked it, another one removed it as abandoned
        if folder.exists():
            return folder, lock
        _close(lock)


def _remove_abandoned(parent: Path) -> None:
    try:
        with os.scandir(parent) as entries:
            folders = [Path(e.path) for e in entries if e.name.startswith(PREFIX) and e.is_dir(follow_symlinks=False)]
    except OSError:
        return  # the folder may be writable but not readable
    for folder in folders:
        try:
            lock = _lock(folder)
            if lock is not None or time.time() - folder.stat().st_mtime > _DEAD_AFTER:
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # its process is alive, or another process has just removed it
            continue
        _close(lock)


def _lock(folder: Path) -> int | None:
    """Lock a folder and return the lock's descriptor; None where folders cannot be locked, as on network file systems.

    Raises:
        BlockingIOError: another process holds the lock.
        FileNotFoundError: the folder is gone.
    """
    if sys.platform == "win32":
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _close(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)
