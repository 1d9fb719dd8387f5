"""The bar that `lora_one.init` shows on a terminal while it reads the batches."""

import sys
from collections.abc import Callable, Iterable, Iterator
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
        counted = Counted(batches, _mover(bar))
        yield iter(counted) if isinstance(batches, Iterator) else counted
        bar.update(1)  # the last batch of the last pass


def _mover(bar: Any) -> Callable[[int, int], None]:
    """Return the function that moves a bar of tqdm to the batches of a pass that are done."""

    def move(number: int, done: int) -> None:
        if not done:
            bar.set_description_str(f"LoRA-One, pass {number}", refresh=False)
            bar.reset()
        bar.update(done - bar.n)

    return move


class Counted:
    """The batches, as a collection that tells how far it is read.

    Args:
        batches: the batches.
        tell: called with the number of the pass, from 1, and with the number of its batches that are done.
    """

    def __init__(self, batches: Iterable[Any], tell: Callable[[int, int], None]):
        self._batches = batches
        self._tell = tell
        self._passes = 0  # complete ones: who looks at the first batch only makes none

    def __iter__(self) -> Iterator[Any]:
        number = self._passes + 1
        self._tell(number, 0)
        for index, batch in enumerate(self._batches):
            yield batch
            if index:
                self._tell(number, index)  # passes ask for the next batch before they compute with this one
        self._passes = number

    def __len__(self) -> int:
        return len(self._batches)  # type: ignore[arg-type]  # a TypeError where they have none
