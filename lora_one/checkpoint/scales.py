"""The rank r and the scale s of each layer, as `adapter_config.json` states them (PEFT's meaning).

With rsLoRA s = alpha / sqrt(r), by the plain rule s = alpha / r. Some readers, such as llama.cpp, Ollama and ExLlama,
know only the plain rule and ignore `use_rslora`. So lora-one writes every scale by the plain rule, with the alpha that
this requires.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from .patterns import first_matches

DEFAULT_ALPHA = 8  # PEFT's, where a configuration has none


def layer_ranks(config: Mapping[str, Any], layers: Sequence[str]) -> dict[str, int]:
    """Return layer -> rank: `r`, or the value in `rank_pattern`. The configuration must be a checked one.

    Raises:
        ValueError: see `first_matches`.
    """
    table = config.get("rank_pattern") or {}
    patterns = first_matches(list(table), layers)
    return {layer: table[patterns[layer]] if layer in patterns else config["r"] for layer in layers}


def layer_scalings(config: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, float]:
    """Return layer -> s, from `lora_alpha` or `alpha_pattern`. The configuration must be a checked one.

    Raises:
        ValueError: see `first_matches`.
    """
    table = config.get("alpha_pattern") or {}
    patterns = first_matches(list(table), list(ranks))
    usual = DEFAULT_ALPHA if config.get("lora_alpha") is None else config["lora_alpha"]
    alphas = {layer: table[patterns[layer]] if layer in patterns else usual for layer in ranks}
    return {layer: _scaling(config, alphas[layer], rank) for layer, rank in ranks.items()}


def scaling_of(config: Mapping[str, Any], layer: str) -> float:
    """Return the factor s of one layer by PEFT's own configuration in memory, whose patterns are trusted."""
    rank = _by_pattern(config.get("rank_pattern"), layer, config["r"])
    alpha = _by_pattern(config.get("alpha_pattern"), layer, config.get("lora_alpha", DEFAULT_ALPHA))
    return _scaling(config, alpha, rank)


def plain_alpha(scaling: float, rank: int) -> float:
    """Return the alpha for which alpha / rank is the scaling.

    It is an int if it is a whole number, since some readers expect one.
    """
    alpha = scaling * rank
    whole = round(alpha)
    return whole if whole and math.isclose(alpha, whole, rel_tol=1e-12) else alpha


def plain_settings(layers: Mapping[str, tuple[int, float]]) -> dict[str, Any]:
    """Return the settings for ranks and scales by the plain rule: the most common ones, and the exceptions.

    Args:
        layers: path -> (rank, scaling).
    """
    sizes = {path: (rank, plain_alpha(scaling, rank)) for path, (rank, scaling) in layers.items()}
    rank, alpha = Counter(sizes.values()).most_common(1)[0][0]
    # Patterns are anchored: one for "up" would otherwise match "blocks.0.up" too.
    return {
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": False,
        "rank_pattern": {f"^{re.escape(path)}": r for path, (r, _) in sizes.items() if r != rank},
        "alpha_pattern": {f"^{re.escape(path)}": a for path, (_, a) in sizes.items() if a != alpha},
    }


def _scaling(config: Mapping[str, Any], alpha: float, rank: int) -> float:
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(patterns: Mapping[str, Any] | None, layer: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", layer):
            return value
    return default
