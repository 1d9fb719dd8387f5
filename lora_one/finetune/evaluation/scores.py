"""Metrics of a list of answers, computed from pairs of the given and the expected text."""

import math
from collections import Counter
from collections.abc import Callable, Sequence

Pairs = Sequence[tuple[str, str]]  # (given, expected)


def exact_match(pairs: Pairs) -> float:
    """Return the share of answers that equal the expected ones; for labels, this is the accuracy."""
    return sum(given == expected for given, expected in pairs) / len(pairs)


def matthews(pairs: Pairs) -> float:
    """Return Matthews' correlation of given and expected labels, in [-1, 1].

    It is 0 if all given, or all expected, labels are the same. For more than two labels it is Gorodkin's R_K (2004). An
    answer that is not among the expected labels counts as a label of its own.
    """
    total, right = len(pairs), sum(given == expected for given, expected in pairs)
    given, expected = (Counter(column) for column in zip(*pairs, strict=True))
    covariance = right * total - sum(given[label] * expected[label] for label in expected)
    variances = [total**2 - sum(count**2 for count in labels.values()) for labels in (given, expected)]
    return covariance / math.sqrt(variances[0] * variances[1]) if all(variances) else 0.0


METRICS: dict[str, Callable[[Pairs], float]] = {"exact_match": exact_match, "matthews": matthews}
