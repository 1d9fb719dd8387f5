"""The scale s of an adapter's layers, as adapter_config.json says it (PEFT's meaning).

Readers differ: llama.cpp, Ollama, ExLlama and others know the plain rule s = alpha / rank alone, and pass over
`use_rslora`. So what lora-one writes says every scale by the plain rule, whatever it was asked for in.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any


def rank_of(config: Mapping[str, Any], layer: str) -> int:
    """The rank that a configuration gives a layer: `r`, or what `rank_pattern` says."""
    return _by_pattern(config.get("rank_pattern"), layer, config["r"])


def scaling_of(config: Mapping[str, Any], layer: str) -> float:
    """The factor s of a layer: alpha / sqrt(rank) or alpha / rank, with `alpha_pattern`."""
    alpha = _by_pattern(config.get("alpha_pattern"), layer, config.get("lora_alpha", 8))
    rank = rank_of(config, layer)
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def plain_alpha(scaling: float, rank: int) -> float:
    """The alpha whose alpha / rank is the scaling; an integer where it is one, since some readers expect that."""
    alpha = scaling * rank
    whole = round(alpha)
    return whole if whole and math.isclose(alpha, whole, rel_tol=1e-12) else alpha


def plain_settings(layers: Mapping[str, tuple[int, float]]) -> dict[str, Any]:
    """What adapter_config.json says of ranks and scales, by the plain rule: the most common ones, and the exceptions.

    Args:
        layers: path -> (rank, scaling).
    """
    sizes = {path: (rank, plain_alpha(scaling, rank)) for path, (rank, scaling) in layers.items()}
    rank, alpha = Counter(sizes.values()).most_common(1)[0][0]
    # Patterns are anchored: one for "up" would otherwise hold for "blocks.0.up" too.
    return {
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": False,
        "rank_pattern": {f"^{re.escape(path)}": r for path, (r, _) in sizes.items() if r != rank},
        "alpha_pattern": {f"^{re.escape(path)}": a for path, (_, a) in sizes.items() if a != alpha},
    }


def _by_pattern(patterns: Mapping[str, Any] | None, layer: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", layer):
            return value
    return default
