"""Where a run's results go: whether they can be written there is known before the work, not after it."""

import tempfile
from pathlib import Path

from lora_one.errors import ConfigError


def check_writable(folder: Path, setting: str = "out") -> None:
    """Try to write a file in a folder that may not be there yet; afterwards all is as it was.

    Raises:
        ConfigError: it cannot be made, or not be written in.
    """
    made: list[Path] = []
    try:
        for part in (*reversed(folder.absolute().parents), folder.absolute()):
            if not part.exists():
                part.mkdir()
                made.append(part)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")
    except (OSError, ValueError) as error:  # a name with a null byte is a ValueError
        raise ConfigError(f"{setting} must be a folder that can be written, got {str(folder)!r}: {error}") from error
    finally:
        for part in reversed(made):
            part.rmdir()
