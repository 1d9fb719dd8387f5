"""The processes of `jax.distributed`: the store of its coordinator is what they share.

JAX has no public way to wait for a process for a limited time: `jax.experimental.multihost_utils` waits in collectives.
So this uses the store of the client that `jax.distributed.initialize` makes, as orbax does.
"""

from typing import Any

import jax
from flax import nnx
from jax.errors import JaxRuntimeError

from lora_one.backends import processes


def spans_processes(tree: Any) -> bool:
    """Return whether any array of a tree, or of an NNX module, is spread over several processes."""
    return jax.process_count() > 1 and any(
        isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) and not leaf.is_fully_addressable
        for leaf in jax.tree.leaves(nnx.state(tree) if isinstance(tree, nnx.Module) else tree)
    )


class Processes(processes.Processes):
    """The processes that make one call together: see `lora_one.backends.processes.Processes`.

    Args:
        call: what every process must call, such as "lora_one.init".
        *trees: models and batches. Unless an array of theirs is spread over several processes, this one needs no other.
    """

    def __init__(self, call: str, *trees: Any):
        super().__init__(call, _store() if any(map(spans_processes, trees)) else None)


class _Store:
    """See `lora_one.backends.processes.Store`."""

    def __init__(self, client: Any):
        self.rank, self.size = jax.process_index(), jax.process_count()
        self._client = client

    def add(self, key: str, number: int) -> int:
        return int(self._client.key_value_increment(key, number))

    def put(self, key: str, text: str) -> None:
        self._client.key_value_set(key, text, allow_overwrite=True)

    def text(self, key: str) -> str | None:
        try:
            return str(self._client.key_value_try_get(key))
        except JaxRuntimeError as error:
            if "NOT_FOUND" in str(error):
                return None
            raise

    def wait(self, key: str, seconds: float) -> bool:
        try:
            self._client.blocking_key_value_get(key, int(1000 * seconds))
        except JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" in str(error):
                return False
            raise
        return True


def _store() -> _Store | None:
    try:
        from jax._src.distributed import global_state
    except ImportError:  # it is not public: without it a process that fails is found by JAX's own time limits
        return None
    return None if global_state.client is None else _Store(global_state.client)
