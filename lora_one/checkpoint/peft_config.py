"""PEFT's `adapter_config.json`, checked: what it says of ranks and scales, before any of it is computed with."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lora_one.checks import is_number, shown

from .patterns import first_matches

LARGEST_RANK = 2**20
LARGEST_ALPHA = 1e9  # and its inverse the smallest: ratios of two are finite in every dtype


def config_problems(config: Mapping[str, Any]) -> list[str]:
    """All that cannot be in what this library reads of a configuration: one sentence a setting."""
    checks = {
        "r": (is_rank, "an integer from 1 on"),
        "lora_alpha": (_is_alpha, "a number, 0 or of size 1e-9 to 1e9"),
        "lora_dropout": (lambda value: is_number(value) and 0 <= value <= 1, "a number in [0, 1]"),
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
        for name, (holds, expected) in checks.items()
        if config.get(name) is not None and not holds(config[name])
    ]


def layer_ranks(config: Mapping[str, Any], layers: Sequence[str]) -> dict[str, int]:
    """layer -> the rank that a checked configuration gives it: `r`, or what `rank_pattern` says (PEFT's meaning).

    Raises:
        ValueError: see `first_matches`.
    """
    table = config.get("rank_pattern") or {}
    chosen = first_matches(list(table), layers)
    return {layer: table[chosen[layer]] if layer in chosen else config["r"] for layer in layers}


def layer_scalings(config: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, float]:
    """layer -> its factor s: alpha / sqrt(rank) or alpha / rank, with `alpha_pattern` (PEFT's meaning).

    Raises:
        ValueError: see `first_matches`.
    """
    table = config.get("alpha_pattern") or {}
    chosen = first_matches(list(table), list(ranks))
    usual = 8 if config.get("lora_alpha") is None else config["lora_alpha"]
    alphas = {layer: table[chosen[layer]] if layer in chosen else usual for layer in ranks}
    root = math.sqrt if config.get("use_rslora") else float
    return {layer: alphas[layer] / root(rank) for layer, rank in ranks.items()}


def check_patterns(config: Mapping[str, Any], layers: Sequence[str]) -> None:
    """Try the regular expressions that PEFT will match itself, without bounds.

    Raises:
        ValueError: see `first_matches`.
    """
    for name in ("target_modules", "exclude_modules"):
        if isinstance(config.get(name), str):
            first_matches([config[name]], layers)


def is_rank(value: Any) -> bool:
    """Whether a value out of a file can be a rank."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= LARGEST_RANK


def _is_alpha(value: Any) -> bool:
    return is_number(value) and (value == 0 or 1 / LARGEST_ALPHA <= abs(value) <= LARGEST_ALPHA)


def _is_table(value: Any, holds: Any) -> bool:
    return isinstance(value, dict) and all(map(holds, value.values()))


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _are_names_or_pattern(value: Any) -> bool:
    return isinstance(value, str) or _are_names(value)
