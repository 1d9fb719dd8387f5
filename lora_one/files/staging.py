"""Hidden folders in which files are got ready, and which the next one removes if their process was killed."""

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]

PREFIX = ".lora-one-saving-"
_DEAD_AFTER = 24 * 3600.0  # seconds, where no lock tells whether the process lives


@contextlib.contextmanager
def staging(parent: Path) -> Iterator[Path]:
    """A new hidden folder in `parent`, for as long as the block runs.

    Its process holds a lock on it, which the system takes away when the process dies, however it dies.

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
            continue  # before it was locked, another process took it for abandoned
        if folder.exists():
            return folder, lock
        _close(lock)


def _remove_abandoned(parent: Path) -> None:
    try:
        with os.scandir(parent) as entries:
            found = [Path(e.path) for e in entries if e.name.startswith(PREFIX) and e.is_dir(follow_symlinks=False)]
    except OSError:
        return  # it may be written to, but not listed
    for folder in found:
        try:
            lock = _lock(folder)
            if lock is not None or time.time() - folder.stat().st_mtime > _DEAD_AFTER:
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # its process lives, or another one has just removed it
            continue
        _close(lock)


def _lock(folder: Path) -> int | None:
    """Lock a folder; None where that cannot be done, as on network file systems.

    Raises:
        BlockingIOError: another process holds it.
        FileNotFoundError: it is gone.
    """
    if fcntl is None:
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
