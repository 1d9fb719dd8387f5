"""How long a call takes, and with how many columns products are timed."""

from collections.abc import Callable

Clock = Callable[[], float]


THIN_COLUMNS = (4, 8, 12, 16, 32, 64)


def least(run: Callable[[], object], clock: Clock, repeats: int = 3) -> float:
    """Seconds of a call, after one that warms up: the least, since what else the machine does only adds to it."""
    times = []
    for _ in range(repeats + 1):
        began = clock()
        run()
        times.append(clock() - began)
    return min(times[1:])
