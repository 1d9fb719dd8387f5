"""What the processes of a parallel run tell each other: that all of them are there, and that one has failed.

They use the store of the default process group. Every backend with a store has the same one, NCCL's too; a wait in it
ends when we say; and no collective that a process waits in, of the model's own or of the user's, gets in its way.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import count
from typing import Any

from torch import distributed as dist

from lora_one.errors import LoraOneError, ProcessError

ARRIVAL_SECONDS = 120.0  # for all processes to make the call, whatever each has done before it
PASS_SECONDS = 1800.0  # for the slowest process to end a pass: as long as PyTorch's own collectives wait with gloo
LEAVING_SECONDS = 5.0  # for the others to read why: the store may be in the process that fails

_CALLS: dict[str, Iterator[int]] = defaultdict(count)  # the same number in every process, as all make each call


def is_parallel() -> bool:
    """Return whether this is one of several processes of an initialised default group."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class Processes:
    """The processes that make one call together.

    Attributes:
        rank: of this process.
        size: how many there are.

    Args:
        call: what every process must call, such as "lora_one.init".
        alone: whether this process needs no others; then nothing ever waits.
    """

    def __init__(self, call: str, alone: bool = False):
        self._call = call
        self._store: dist.Store | None = None
        self.rank, self.size = 0, 1
        self._points = 0  # that this process has passed or waits at
        store = None if alone or not is_parallel() else _store()
        if store is not None:
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
            self._store = dist.PrefixStore(f"{call}/{next(_CALLS[call])}", store)

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
        if self._store is None:
            return int(yes)
        self._points += 1
        point = str(self._points)
        self._store.add(f"{point}/yes", int(yes))
        self._store.set(f"{point}/{self.rank}", "")
        if self._store.add(f"{point}/here", 1) == self.size:
            self._store.set(f"{point}/all", "")
        try:
            self._store.wait([f"{point}/all"], timedelta(seconds=seconds))
        except dist.DistStoreError as error:
            missing = [str(rank) for rank in range(self.size) if not self._store.check([f"{point}/{rank}"])]
            raise ProcessError(
                f"{self._call} must be called by every process, with a share of the batches each: rank "
                f"{', '.join(missing)} did not come to its step {point} within {seconds:g} s"
            ) from error
        self.check()
        return int(self._store.add(f"{point}/yes", 0))

    def gather(self, x: Any) -> list[Any]:
        """Return the objects of all processes, by rank."""
        everyones = [x]
        if self._store is not None:
            everyones *= self.size
            dist.all_gather_object(everyones, x)
        return everyones

    def check(self) -> None:
        """Look, without waiting, whether another process has failed.

        Raises:
            ProcessError: one has.
        """
        if failure := self._failure():
            raise ProcessError(failure)

    def _failure(self) -> str:
        with suppress(RuntimeError):  # the store may have ended with the process that failed
            if self._store is not None and self._store.check(["failed"]):
                return self._store.get("failed").decode()
        return ""

    def _leave(self, error: BaseException) -> None:
        """Tell the others why, and wait until they know."""
        if self._store is None:
            return
        with suppress(RuntimeError):
            if not isinstance(error, ProcessError) or not self._failure():
                self._store.set("failed", f"{self._call} failed on rank {self.rank}: {type(error).__name__}: {error}")
                self._store.set(f"{self._points + 1}/all", "")  # where the others wait for this process
            if self._store.add("left", 1) == self.size:
                self._store.set("all left", "")
            self._store.wait(["all left"], timedelta(seconds=LEAVING_SECONDS))


def _store() -> dist.Store | None:
    group = dist.group.WORLD
    try:
        return None if group is None else group.get_group_store()
    except RuntimeError:  # a backend without one
        return None
