"""The bar that `lora_one.init` shows on a terminal while it reads the batches."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from operator import length_hint
from typing import Any

from .errors import ConfigError


@contextmanager
def shown(batches: Iterable[Any], progress: bool | None) -> Iterator[Iterable[Any]]:
    """Yield the batches; while they are read, a bar counts those that are done. It ends with the block.

    What is yielded is an iterator if `batches` is one, and can be read again if `batches` can.

    Args:
        progress: True shows the bar, False does not, and None shows it if stderr is a terminal and tqdm is installed.

    Raises:
        ConfigError: `progress` is True, and tqdm is not installed.
    """
    is_wanted = sys.stderr is not None and sys.stderr.isatty() if progress is None else progress
    if not is_wanted or not isinstance(batches, Iterable):
        yield batches
        return
    try:
        from tqdm.auto import tqdm
    except ModuleNotFoundError as error:
        if progress:
            raise ConfigError("progress=True needs the package 'tqdm': pip install tqdm") from error
        yield batches
        return
    with tqdm(desc="LoRA-One", total=length_hint(batches) or None, unit="batch", file=sys.stderr) as bar:
        counted = _Counted(batches, bar)
        yield iter(counted) if isinstance(batches, Iterator) else counted
        bar.update(1)  # the last batch of the last pass


class _Counted:
    """The batches, as a collection that moves a bar while it is read."""

    def __init__(self, batches: Iterable[Any], bar: Any):
        self._batches = batches
        self._bar = bar
        self._passes = 0  # complete ones: who looks at the first batch only makes none

    def __iter__(self) -> Iterator[Any]:
        self._bar.set_description_str(f"LoRA-One, pass {self._passes + 1}", refresh=False)
        self._bar.reset()
        for index, batch in enumerate(self._batches):
            yield batch
            self._bar.update(index > 0)  # passes ask for the next batch before they compute with this one
        self._passes += 1

    def __len__(self) -> int:
        return len(self._batches)  # type: ignore[arg-type]  # a TypeError where they have none
