"""What the processes of a run under `mlx.launch` tell each other: that all of them are there, and that one has failed.

MLX has no store and no time limits, only collectives. So each text goes through one, in a thread of its own, and the
caller waits for the thread as long as it likes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from queue import Empty, SimpleQueue
from threading import Thread

import mlx.core as mx
import numpy as np

from lora_one.backends.processes import ARRIVAL_SECONDS, LEAVING_SECONDS, PASS_SECONDS
from lora_one.errors import ProcessError

_LENGTH = 1024  # bytes of a text: all processes must send as many


class Processes:
    """The processes that make one call together. All of them must come to the same points, in the same order.

    Args:
        call: what every process must call, such as "lora_one.init".
        alone: whether this process needs no others; then nothing ever waits.
    """

    def __init__(self, call: str, alone: bool = False):
        self._call = call
        self._alone = alone or not is_parallel()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Let an error in the block be an error in all processes, at their next point, and wait until all are in it.

        Raises:
            ProcessError: an error in another process, or it did not come.
        """
        self.meet(seconds=ARRIVAL_SECONDS)
        try:
            yield
        except ProcessError:
            raise
        except BaseException as error:
            self._say(f"{type(error).__name__}: {error}", LEAVING_SECONDS)
            raise

    def meet(self, seconds: float = PASS_SECONDS) -> None:
        """Wait for all processes.

        Raises:
            ProcessError: another process has failed, or did not come within the time.
        """
        texts = self._say("", seconds)
        must = f"{self._call} must be called by every process, with a share of the batches each"
        if texts is None:
            raise ProcessError(f"{must}: one did not come within {seconds:g} s")
        for rank, text in enumerate(texts):
            if not text.startswith(self._call):  # MLX ends collectives with a process that has ended by any numbers
                raise ProcessError(f"{must}: rank {rank} has ended, or called something else")
            if error := text.removeprefix(self._call):
                raise ProcessError(f"{self._call} failed on rank {rank}: {error}")

    def _say(self, text: str, seconds: float) -> list[str] | None:
        """Return what all processes say, by rank; None if one says nothing for that long."""
        if self._alone:
            return [self._call + text]
        said = (self._call + text).encode()[:_LENGTH].ljust(_LENGTH, b"\0")
        rows = _within(seconds, lambda: _gathered(np.frombuffer(said, np.uint8)))
        return None if rows is None else [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in rows]


def is_parallel() -> bool:
    """Return whether this is one of several processes."""
    return mx.distributed.init().size() > 1


def _gathered(own: np.ndarray) -> np.ndarray:
    return np.array(mx.distributed.all_gather(mx.array(own)[None], stream=mx.cpu))  # the thread's own stream


def _within(seconds: float, call: Callable[[], np.ndarray]) -> np.ndarray | None:
    """Return what a function returns, or None if it takes longer; then it goes on in a thread that holds up no exit."""
    results: SimpleQueue[np.ndarray | BaseException] = SimpleQueue()

    def run() -> None:
        try:
            results.put(call())
        except BaseException as error:
            results.put(error)

    _calls().put(run)
    try:
        result = results.get(timeout=seconds)
    except Empty:
        return None
    if isinstance(result, BaseException):
        raise result
    return result


@cache
def _calls() -> SimpleQueue[Callable[[], None]]:
    """Return the queue of the thread that sends texts; there is one, since MLX keeps the streams of all threads."""
    calls: SimpleQueue[Callable[[], None]] = SimpleQueue()

    def run() -> None:
        while True:
            calls.get()()

    Thread(target=run, daemon=True).start()
    return calls
