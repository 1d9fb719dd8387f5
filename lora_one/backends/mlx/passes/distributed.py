"""Sums over the processes of a run under `mlx.launch`, so that all of them compute the same start."""

import mlx.core as mx
import numpy as np


def is_parallel() -> bool:
    """Whether this is one of several processes."""
    return mx.distributed.init().size() > 1


def sum_over_processes(x: mx.array) -> mx.array:
    """The sum of x over all processes; x itself where there is one. Every process must call it, in the same order."""
    return mx.distributed.all_sum(x, stream=mx.cpu) if is_parallel() else x


def all_agree(decision: bool) -> bool:
    """Whether it is that of all processes."""
    return not np.array(sum_over_processes(mx.array(0.0 if decision else 1.0))).any()


def mean_over_processes(total: float, count: int) -> tuple[float, int]:
    """(sum of all totals / sum of all counts, sum of all counts)."""
    if not is_parallel():
        return total / count, count
    # float32 is what MLX sums everywhere; counts below 2^24 are exact in it.
    both = np.array(mx.distributed.all_sum(mx.array([total, float(count)]), stream=mx.cpu))
    return float(both[0] / both[1]), int(both[1])
