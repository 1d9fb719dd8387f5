"""How right a list of answers is: pairs of what was given and what was expected."""

import math
from collections import Counter
from collections.abc import Callable, Sequence

Pairs = Sequence[tuple[str, str]]  # (given, expected)


def exact_match(pairs: Pairs) -> float:
    """The share of answers that are what was expected: the accuracy, of labels."""
    return sum(given == expected for given, expected in pairs) / len(pairs)


def matthews(pairs: Pairs) -> float:
    """Matthews' correlation of given and expected labels, in [-1, 1]; 0 where one of them never changes.

    Of more than two labels it is Gorodkin's R_K (2004). An answer that is no label counts as a label of its own.
    """
    total, right = len(pairs), sum(given == expected for given, expected in pairs)
    given, expected = (Counter(column) for column in zip(*pairs, strict=True))
    covariance = right * total - sum(given[label] * expected[label] for label in expected)
    variances = [total**2 - sum(count**2 for count in labels.values()) for labels in (given, expected)]
    return covariance / math.sqrt(variances[0] * variances[1]) if all(variances) else 0.0


METRICS: dict[str, Callable[[Pairs], float]] = {"exact_match": exact_match, "matthews": matthews}
