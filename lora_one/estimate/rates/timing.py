"""The time of a call, and the numbers of columns with which thin products are timed."""

from collections.abc import Callable

Clock = Callable[[], float]

THIN_COLUMNS = (4, 8, 12, 16, 32, 64)


def least(run: Callable[[], object], clock: Clock, repeats: int = 3) -> float:
    """Return the fewest seconds that a call takes, after one call to warm up.

    The minimum is best, since everything else on the machine only adds time.
    """
    times = []
    for _ in range(repeats + 1):
        began = clock()
        run()
        times.append(clock() - began)
    return min(times[1:])
