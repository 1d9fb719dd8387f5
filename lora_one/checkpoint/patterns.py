"""Match regular expressions from files within a limit on time: some would take longer than the universe is old.

Python cannot stop a match. A pattern that is not obviously quick is matched in a separate process, which can be.
"""

import json
import re
import subprocess
import sys
from collections.abc import Sequence

SECONDS = 20.0  # limit for all names and patterns together; starting Python takes 0.05
_QUANTIFIERS = re.compile(r"[*+?{]")
_MATCH = """
import json, re, sys
patterns, names = json.load(sys.stdin)
try:
    compiled = [re.compile(rf"(.*\\.)?({pattern})") for pattern in patterns]
    result = [next((i for i, p in enumerate(compiled) if p.fullmatch(name)), None) for name in names]
except (re.error, OverflowError, RecursionError, MemoryError) as error:
    result = str(error)
json.dump(result, sys.stdout)
"""


def first_matches(patterns: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """Return name -> the first pattern that matches the whole name, or the whole part after one of its dots.

    This is PEFT's meaning of a pattern. A name that no pattern matches is left out.

    Raises:
        ValueError: a pattern is not a regular expression, or takes too long; the message names it.
    """
    if not patterns:
        return {}
    if all(map(_is_quick, patterns)) and all(len(name) < 1000 for name in names):
        compiled = [_compiled(pattern) for pattern in patterns]
        indices = [next((i for i, p in enumerate(compiled) if p.fullmatch(name)), None) for name in names]
    else:
        indices = _match_in_process(patterns, names)
    return {name: patterns[index] for name, index in zip(names, indices, strict=True) if index is not None}


def _is_quick(pattern: str) -> bool:
    """Return whether a match takes at worst the square of the name's length: no repetition is inside another."""
    return len(pattern) < 1000 and "(" not in pattern and len(_QUANTIFIERS.findall(pattern)) <= 1


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(rf"(.*\.)?({pattern})")
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from error


def _match_in_process(patterns: Sequence[str], names: Sequence[str]) -> list[int | None]:
    command = [sys.executable, "-I", "-S", "-c", _MATCH]
    shown = ", ".join(map(repr, patterns))
    shown = shown if len(shown) < 300 else f"{shown[:300]}..."
    try:
        done = subprocess.run(
            command, input=json.dumps([patterns, names]), capture_output=True, text=True, timeout=SECONDS
        )
        result = json.loads(done.stdout)
    except subprocess.TimeoutExpired as error:
        raise ValueError(
            f"to match {shown} takes more than {SECONDS:g} seconds: write it without repetitions inside others, "
            "or name the layers one by one"
        ) from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{shown} cannot be matched: {error}") from error
    if isinstance(result, str):
        raise ValueError(f"{shown}: no regular expression: {result}")
    return list(result)
