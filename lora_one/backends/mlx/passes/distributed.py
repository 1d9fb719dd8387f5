"""Sums over the processes of a run under `mlx.launch`: with them all processes compute the same start."""

from collections.abc import Mapping

import mlx.core as mx
import numpy as np

from lora_one.backends.mlx.processes import is_parallel


def sum_over_processes(x: mx.array) -> mx.array:
    """Return the sum of x over all processes, which must all call this in the same order; x itself if it is alone."""
    return mx.distributed.all_sum(x, stream=mx.cpu) if is_parallel() else x


def of_all_processes(x: mx.array) -> list[mx.array]:
    """Return the x of each process; x itself if it is alone."""
    return list(mx.distributed.all_gather(x[None], stream=mx.cpu)) if is_parallel() else [x]


def all_agree(decision: bool) -> bool:
    """Return whether all processes decide yes."""
    return not np.array(sum_over_processes(mx.array(0.0 if decision else 1.0))).any()


def least_of_processes(numbers: Mapping[str, int]) -> dict[str, int]:
    """Return the least of all processes' numbers under each name; the names are the same in all, in the same order."""
    everyones = np.array([np.array(x) for x in of_all_processes(mx.array(list(numbers.values())))])
    return dict(zip(numbers, everyones.min(axis=0).tolist(), strict=True))


def mean_over_processes(total: float, count: int) -> tuple[float, int]:
    """Return (sum of all totals / sum of all counts, sum of all counts)."""
    if not is_parallel():
        return total / count, count
    # All of MLX's communication libraries can sum float32; counts below 2^24 are exact in it.
    totals = np.array(mx.distributed.all_sum(mx.array([total, float(count)]), stream=mx.cpu))
    return float(totals[0] / totals[1]), int(totals[1])
