"""What the processes of a parallel run tell each other: that all of them are there, and that one has failed.

They use a store of short texts that the framework's launcher has set up. A wait in it ends when we say, and no
collective that a process waits in, of the model's own or of the user's, gets in its way.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count
from typing import Protocol

from lora_one.errors import LoraOneError, ProcessError

ARRIVAL_SECONDS = 120.0  # for all processes to make the call, whatever each has done before it
PASS_SECONDS = 1800.0  # for the slowest process to end a pass: as long as PyTorch's own collectives wait with gloo
LEAVING_SECONDS = 5.0  # for the others to read why: the store may be in the process that fails

_CALLS: dict[str, Iterator[int]] = defaultdict(count)  # the same number in every process, as all make each call


class Store(Protocol):
    """A store that all processes share. Its methods raise RuntimeError if it has ended.

    Attributes:
        rank: of this process.
        size: how many processes there are.
    """

    rank: int
    size: int

    def add(self, key: str, number: int) -> int:
        """Add to a number, which begins at 0, and return the sum."""
        ...

    def put(self, key: str, text: str) -> None:
        """Set a text."""
        ...

    def text(self, key: str) -> str | None:
        """Return a text, without waiting; None if it is not set."""
        ...

    def wait(self, key: str, seconds: float) -> bool:
        """Wait until a text is set, and return whether it is."""
        ...


class Processes:
    """The processes that make one call together.

    Attributes:
        rank: of this process.
        size: how many there are.

    Args:
        call: what every process must call, such as "lora_one.init".
        store: what they share; None for a process that needs no others: then nothing ever waits.
    """

    def __init__(self, call: str, store: Store | None):
        self._call = call
        self._store = store
        self._prefix = ""
        self.rank, self.size = 0, 1
        self._points = 0  # that this process has passed or waits at
        if store is not None:
            self.rank, self.size = store.rank, store.size
            self._prefix = f"lora_one/{call}/{next(_CALLS[call])}"

    @contextmanager
    def together(self) -> Iterator[None]:
        """Let an error in the block be an error in all processes, and wait until all are in the block.

        Raises:
            ProcessError: an error in another process, or it did not come.
        """
        try:
            self.count(seconds=ARRIVAL_SECONDS)
            yield
        except BaseException as error:
            of_another = self._failure()
            self._leave(error)
            # A collective fails when a process that takes part in it has ended: the reason is that process's error.
            if of_another and isinstance(error, RuntimeError) and not isinstance(error, LoraOneError):
                raise ProcessError(of_another) from error
            raise

    def count(self, yes: bool = True, seconds: float = PASS_SECONDS) -> int:
        """Wait for all processes. Return how many of them say yes.

        Raises:
            ProcessError: another process has failed, or did not come within the time.
        """
        return self._meet("yes", int(yes), seconds)

    def agree(self, text: str) -> bool:
        """Wait for all processes. Return whether all of them say the same; raise as `count` does."""
        return self._meet(f"said {text}", 1, PASS_SECONDS) == self.size

    def least(self, numbers: Mapping[str, int]) -> dict[str, int]:
        """Wait for all processes. Return the least number under each name; raise as `count` does.

        The names are the same in every process, in the same order.
        """
        if self._store is None:
            return dict(numbers)
        key = self._key(f"{self._points + 1}/numbers")
        self._store.put(f"{key}/{self.rank}", " ".join(map(str, numbers.values())))
        self.count()
        rows = [[int(x) for x in (self._store.text(f"{key}/{r}") or "").split()] for r in range(self.size)]
        return dict(zip(numbers, map(min, *rows), strict=True))

    def is_first(self, text: str) -> bool:
        """Return, without waiting, whether this process is the first of those that say this."""
        return self._store is None or self._store.add(self._key(f"first {text}"), 1) == 1

    def check(self) -> None:
        """Look, without waiting, whether another process has failed.

        Raises:
            ProcessError: one has.
        """
        if failure := self._failure():
            raise ProcessError(failure)

    def _meet(self, what: str, number: int, seconds: float) -> int:
        """Wait for all processes, and return the sum of their numbers under a name."""
        if self._store is None:
            return number
        self._points += 1
        point, store = self._key(str(self._points)), self._store
        store.add(f"{point}/{what}", number)
        store.put(f"{point}/{self.rank}", "here")
        if store.add(f"{point}/here", 1) == self.size:
            store.put(f"{point}/all", "here")
        if not store.wait(f"{point}/all", seconds):
            missing = [str(rank) for rank in range(self.size) if store.text(f"{point}/{rank}") is None]
            raise ProcessError(
                f"{self._call} must be called by every process, with a share of the batches each: rank "
                f"{', '.join(missing)} did not come to its step {self._points} within {seconds:g} s"
            )
        self.check()
        return store.add(f"{point}/{what}", 0)

    def _failure(self) -> str:
        with suppress(RuntimeError):  # the store may have ended with the process that failed
            if self._store is not None:
                return self._store.text(self._key("failed")) or ""
        return ""

    def _leave(self, error: BaseException) -> None:
        """Tell the others why, and wait until they know."""
        store = self._store
        if store is None:
            return
        with suppress(RuntimeError):
            if not isinstance(error, ProcessError) or not self._failure():
                reason = f"{self._call} failed on rank {self.rank}: {type(error).__name__}: {error}"
                store.put(self._key("failed"), reason)
                store.put(self._key(f"{self._points + 1}/all"), "failed")  # where the others wait for this process
            if store.add(self._key("left"), 1) == self.size:
                store.put(self._key("all left"), "left")
            store.wait(self._key("all left"), LEAVING_SECONDS)

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}"
