"""JSON files that others wrote, read without trust in them."""

import json
from pathlib import Path
from typing import Any

from lora_one.errors import CheckpointError


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: the file cannot be read, or holds something else.
    """
    try:
        found = json.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    # Not UTF-8, not JSON, a number of thousands of digits, a null character in the path; brackets without end.
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON that can be read: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(found).__name__}")
    return found
