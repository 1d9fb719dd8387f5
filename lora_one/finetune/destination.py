"""The folder that the results of a run are written to."""

import tempfile
from pathlib import Path

from lora_one.errors import ConfigError


def check_writable(folder: Path, setting: str = "out") -> None:
    """Check that a folder can be written, before hours of work, and leave the disk as it was.

    Args:
        folder: it need not exist yet.
        setting: the name of the setting that gave it, for the message.

    Raises:
        ConfigError: the folder cannot be made, or no file can be written in it.
    """
    made: list[Path] = []
    try:
        for part in (*reversed(folder.absolute().parents), folder.absolute()):
            if not part.exists():
                part.mkdir()
                made.append(part)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")
    except (OSError, ValueError) as error:  # a null byte in a name gives a ValueError
        raise ConfigError(f"{setting} must be a folder that can be written, got {str(folder)!r}: {error}") from error
    finally:
        for part in reversed(made):
            part.rmdir()
