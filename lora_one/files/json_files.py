"""Read JSON files that others wrote, without trusting them."""

import json
from pathlib import Path
from typing import Any

from lora_one.errors import CheckpointError


def read_object(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file.

    Raises:
        CheckpointError: the file cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    # ValueError: not UTF-8, not JSON, a number of thousands of digits, a null character in the path.
    # RecursionError: brackets nested too deeply.
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON that can be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content
