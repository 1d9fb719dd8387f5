"""The processes of a parallel run of PyTorch: the store of the default process group is what they share.

Every backend with a store has the same one, NCCL's too.
"""

from datetime import timedelta
from typing import Any

from torch import distributed as dist

from lora_one.backends import processes


def is_parallel() -> bool:
    """Return whether this is one of several processes of an initialised default group."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class Processes(processes.Processes):
    """The processes that make one call together: see `lora_one.backends.processes.Processes`.

    Args:
        call: what every process must call, such as "lora_one.init".
        alone: whether this process needs no others; then nothing ever waits.
    """

    def __init__(self, call: str, alone: bool = False):
        super().__init__(call, None if alone or not is_parallel() else _store())

    def gather(self, x: Any) -> list[Any]:
        """Return the objects of all processes, by rank."""
        everyones = [x]
        if self._store is not None:
            everyones *= self.size
            dist.all_gather_object(everyones, x)
        return everyones


class _Store:
    """See `lora_one.backends.processes.Store`."""

    def __init__(self, store: dist.Store):
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._store = store

    def add(self, key: str, number: int) -> int:
        return int(self._store.add(key, number))

    def put(self, key: str, text: str) -> None:
        self._store.set(key, text)

    def text(self, key: str) -> str | None:
        return self._store.get(key).decode() if self._store.check([key]) else None

    def wait(self, key: str, seconds: float) -> bool:
        try:
            self._store.wait([key], timedelta(seconds=seconds))
        except dist.DistStoreError:
            return False
        return True


def _store() -> _Store | None:
    group = dist.group.WORLD
    try:
        return None if group is None else _Store(group.get_group_store())
    except RuntimeError:  # a backend without one
        return None
