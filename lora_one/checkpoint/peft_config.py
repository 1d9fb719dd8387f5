"""The settings in PEFT's `adapter_config.json`, checked before anything is computed with them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

from lora_one.checks import is_number, shown

from .patterns import first_matches

LARGEST_RANK = 2**20
LARGEST_ALPHA = 1e9  # the smallest is its inverse, so that the ratio of two is finite in every dtype


def config_problems(config: Mapping[str, Any]) -> list[str]:
    """Return one sentence per invalid setting, among the settings that this library reads."""
    checks: dict[str, tuple[Callable[[object], bool], str]] = {
        "r": (is_rank, "an integer from 1 on"),
        "lora_alpha": (_is_alpha, "a number, 0 or of size 1e-9 to 1e9"),
        "lora_dropout": (is_dropout, "a number in [0, 1]"),
        "use_rslora": (lambda value: isinstance(value, bool), "true or false"),
        "rank_pattern": (lambda value: _is_table(value, is_rank), "a rank for each regular expression"),
        "alpha_pattern": (lambda value: _is_table(value, _is_alpha), "an alpha for each regular expression"),
        "modules_to_save": (_are_names, "a list of names"),
        "target_modules": (_are_names_or_pattern, "a list of names, or a regular expression"),
        "exclude_modules": (_are_names_or_pattern, "a list of names, or a regular expression"),
        "task_type": (lambda value: isinstance(value, str), "text"),
    }
    return [
        f'"{name}" must be {expected}, got {shown(config[name])}'
        for name, (is_valid, expected) in checks.items()
        if config.get(name) is not None and not is_valid(config[name])
    ]


def check_patterns(config: Mapping[str, Any], layers: Sequence[str]) -> None:
    """Try the regular expressions that PEFT will match itself, without a limit on time.

    Raises:
        ValueError: see `first_matches`.
    """
    for name in ("target_modules", "exclude_modules"):
        if isinstance(config.get(name), str):
            first_matches([config[name]], layers)


def is_rank(value: object) -> TypeGuard[int]:
    """Return whether a value from a file can be a rank."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= LARGEST_RANK


def is_dropout(value: object) -> TypeGuard[float]:
    """Return whether a value from a file can be a dropout rate."""
    return is_number(value) and 0 <= value <= 1


def _is_alpha(value: object) -> bool:
    return is_number(value) and (value == 0 or 1 / LARGEST_ALPHA <= abs(value) <= LARGEST_ALPHA)


def _is_table(value: object, is_valid: Callable[[object], bool]) -> bool:
    return isinstance(value, dict) and all(map(is_valid, value.values()))


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _are_names_or_pattern(value: object) -> bool:
    return isinstance(value, str) or _are_names(value)
