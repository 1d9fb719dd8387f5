"""Regular expressions out of files, matched within bounds: some take longer than the universe has.

Python cannot stop a match. What is not plainly quick is matched in a process of its own, which can be stopped.
"""

import json
import re
import subprocess
import sys
from collections.abc import Sequence

SECONDS = 20.0  # for all names and patterns; starting Python takes a twentieth of one
_QUANTIFIERS = re.compile(r"[*+?{]")
_MATCH = """
import json, re, sys
patterns, names = json.load(sys.stdin)
try:
    compiled = [re.compile(rf"(.*\\.)?({pattern})") for pattern in patterns]
    found = [next((i for i, p in enumerate(compiled) if p.fullmatch(name)), None) for name in names]
except (re.error, OverflowError, RecursionError, MemoryError) as error:
    found = str(error)
json.dump(found, sys.stdout)
"""


def first_matches(patterns: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """name -> the first pattern that matches all of it, or all after one of its dots (PEFT's meaning).

    Raises:
        ValueError: a pattern that is no regular expression, or that takes too long; says which.
    """
    if not patterns:
        return {}
    if all(map(_is_quick, patterns)) and all(len(name) < 1000 for name in names):
        compiled = [_compiled(pattern) for pattern in patterns]
        indices = [next((i for i, p in enumerate(compiled) if p.fullmatch(name)), None) for name in names]
    else:
        indices = _matched_elsewhere(patterns, names)
    return {name: patterns[index] for name, index in zip(names, indices, strict=True) if index is not None}


def _is_quick(pattern: str) -> bool:
    """No choices inside of others: at worst, the square of the name's length."""
    return len(pattern) < 1000 and "(" not in pattern and len(_QUANTIFIERS.findall(pattern)) <= 1


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(rf"(.*\.)?({pattern})")
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from error


def _matched_elsewhere(patterns: Sequence[str], names: Sequence[str]) -> list[int | None]:
    command = [sys.executable, "-I", "-S", "-c", _MATCH]
    shown = ", ".join(map(repr, patterns))
    shown = shown if len(shown) < 300 else f"{shown[:300]}..."
    try:
        done = subprocess.run(
            command, input=json.dumps([patterns, names]), capture_output=True, text=True, timeout=SECONDS
        )
        found = json.loads(done.stdout)
    except subprocess.TimeoutExpired as error:
        raise ValueError(
            f"to match {shown} takes more than {SECONDS:g} seconds: write it without repetitions inside others, "
            "or name the layers one by one"
        ) from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{shown} cannot be matched: {error}") from error
    if isinstance(found, str):
        raise ValueError(f"{shown}: no regular expression: {found}")
    return list(found)
