"""Replace folders and files as a whole: at any moment, even in a crash, the old one or the new one is there.

A folder with files in it cannot be replaced in one step, but two folders can be exchanged in one step (`exchange`). So
the replacement has three steps:

1. Make a stand-in with the new files, and with links to all files that stay. Exchange it with the folder.
2. Move the new files into the folder, which nobody sees meanwhile.
3. Exchange the two again.

The folder is the same one as before: a terminal or a program that is in it stays in it, and other files in it are not
touched. Where the system cannot exchange (Windows, some network and container file systems, mount points), the new
files replace the old ones one by one. A kill within those few renames may leave a folder that cannot be opened, but
never one that mixes the two.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from safetensors import SafetensorError

from lora_one.errors import CheckpointError

from .exchange import exchange
from .staging import PREFIX, staging

CARD = "README.md"  # PEFT writes one; a file of this name that is there may be the user's, and stays


@contextlib.contextmanager
def replacing(path: Path, owned: Sequence[str] = ()) -> Iterator[Path]:
    """Yield an empty folder to write into; when the block ends, its files appear in the folder `path` together.

    If the block raises, nothing has changed. Other files in `path` stay. Several processes may do this at once.

    Args:
        path: folder; made if it does not exist.
        owned: names that are replaced, or removed if the new folder does not have them. The first one must be the file
            without which no program opens the folder.

    Raises:
        CheckpointError: the folder cannot be written; what it held is as it was.
    """
    with _explained(path, "folder"):
        target = _target(path)
        if target.exists() and not target.is_dir():
            raise NotADirectoryError("it is a file, a folder is expected")
        with _room_near(target) as room:
            new = room / "new"
            new.mkdir()
            yield new
            _flush(new)
            _put(new, target, owned, room)


@contextlib.contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Yield a path to write a file to; when the block ends, the file replaces `path`.

    The folder of `path` is made if it does not exist.

    Raises:
        CheckpointError: the file cannot be written; what was there is as it was.
    """
    with _explained(path, "file"):
        target = _target(path)
        if target.exists() and not target.is_file():
            if target.is_dir():
                raise IsADirectoryError("it is a folder, a file is expected")
            yield target  # a terminal, a pipe
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        with staging(target.parent) as room:
            yield room / target.name
            if target.exists():
                shutil.copymode(target, room / target.name)
            _flush(room)
            os.replace(room / target.name, target)
            _flush_names(target.parent)


def write_whole(path: Path, text: str) -> None:
    """Write a text file in one step.

    Raises:
        CheckpointError: see `replacing_file`.
    """
    with replacing_file(path) as file:
        file.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def _explained(path: Path, kind: str) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"the {kind} {path} cannot be written: {reason}; what was there is as it was. Give another path or room"
        ) from error


def _target(path: Path) -> Path:
    """Return where a path leads: a symbolic link stays, and what it points at is replaced."""
    try:
        return Path(path).resolve()
    except (ValueError, RuntimeError) as error:  # a null character; a loop of links
        raise OSError(str(error)) from error


@contextlib.contextmanager
def _room_near(target: Path) -> Iterator[Path]:
    """Yield a staging folder beside the target, on its file system; inside it if none can be made beside it."""
    beside = next(folder for folder in (*target.parents, target) if os.path.lexists(folder))
    with contextlib.ExitStack() as stack:
        try:
            if os.path.ismount(target):
                raise OSError
            room = stack.enter_context(staging(beside))
        except OSError:
            if not target.is_dir():
                raise
            room = stack.enter_context(staging(target))
        yield room


def _put(new: Path, target: Path, owned: Sequence[str], room: Path) -> None:
    if not os.path.lexists(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.rename(new, target)
            _flush_names(target.parent)
            return
        except OSError:
            if not target.is_dir():  # otherwise another process has just made it
                raise
    if os.path.lexists(target / CARD) and (new / CARD).exists():
        (new / CARD).unlink()
    names = [*owned, *sorted(set(os.listdir(new)) - set(owned))]
    try:
        stand_in = _stand_in(new, target, names, room)
        exchange(target, stand_in)
    except OSError:
        _put_one_by_one(new, target, names)
    else:
        # Now all files are in place. If anything fails from here on, the stand-in stays there instead.
        with contextlib.suppress(OSError):
            _move(new, stand_in, names, room / "old")
            _flush_names(stand_in)
            exchange(target, stand_in)
    _flush_names(target.parent)


def _stand_in(new: Path, target: Path, names: list[str], room: Path) -> Path:
    """Make a folder with the new files and links to all other files of the target."""

    def is_left_out(folder: str, entries: list[str]) -> list[str]:
        return [x for x in entries if x.startswith(PREFIX) or (x in names and Path(folder) == target)]

    stand_in = room / "stand-in"
    shutil.copytree(target, stand_in, symlinks=True, copy_function=_link, ignore=is_left_out)
    shutil.copytree(new, stand_in, symlinks=True, copy_function=_link, dirs_exist_ok=True)
    shutil.copystat(target, stand_in)
    _flush_names(stand_in)
    return stand_in


def _link(source: str, destination: str) -> None:
    try:
        os.link(source, destination, follow_symlinks=False)
    except PermissionError:  # Linux does not allow a link to another user's file
        shutil.copy2(source, destination)


def _link_or_copy(source: str, destination: str) -> None:
    try:
        os.link(source, destination)
    except OSError:  # it is on another file system
        shutil.copy2(source, destination)


def _put_one_by_one(new: Path, target: Path, names: list[str]) -> None:
    with staging(target) as room:  # on the file system of the files that are replaced
        shutil.copytree(new, room / "new", copy_function=_link_or_copy)
        _flush(room / "new")
        _move(room / "new", target, names, room / "old")
        _flush_names(target)


def _move(new: Path, folder: Path, names: list[str], old: Path) -> None:
    """Move the old files of these names out of a folder and the new ones into it; if that fails, move all back.

    The first name leaves first and arrives last: without it no program opens the folder, so nobody reads a mixture.
    """
    old.mkdir()
    moved_out, moved_in = [], []
    try:
        for name in names:
            if os.path.lexists(folder / name):
                os.rename(folder / name, old / name)
                moved_out.append(name)
        for name in reversed(names):
            if os.path.lexists(new / name):
                os.rename(new / name, folder / name)
                moved_in.append(name)
    except BaseException:
        for name in reversed(moved_in):
            os.rename(folder / name, new / name)
        for name in reversed(moved_out):
            os.rename(old / name, folder / name)
        raise


def _flush(folder: Path) -> None:
    """Wait until all of a folder's files are on the disk."""
    for parent, _, files in os.walk(folder):
        for name in files:
            file = Path(parent, name)
            if file.is_symlink():
                continue
            with open(file, "rb+" if os.name == "nt" else "rb") as opened:
                os.fsync(opened.fileno())
        _flush_names(Path(parent))


def _flush_names(folder: Path) -> None:
    """Wait until a folder's list of names is on the disk, where the system can do that; its files already are."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
