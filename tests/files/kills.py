"""Kill processes while they write: at each change that they make to the disk, one after the other."""

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

_CHANGES = {"os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir", "os.symlink", "os.chmod"}  # audit events


def killed_before_each_change(
    action: Callable[[], object], prepare: Callable[[], object] = int, step: int = 1
) -> Iterator[int]:
    """Run `action` again and again in a separate process, killed before its 1st, 2nd, ... change; yield the number.

    The last run is not killed, and yields 0. Python does not report an exchange of two names as a change; the state
    after it is seen before the next change.
    """
    for moment in range(1, 1000, step):
        if not _killed(moment, action, prepare):
            yield 0
            return
        yield moment
    raise AssertionError("the action never ends")


def _killed(moment: int, action: Callable[[], object], prepare: Callable[[], object]) -> bool:
    child = os.fork()
    if child == 0:
        try:
            prepare()
            sys.addaudithook(Killer(moment))
            action()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


class Killer:
    """An audit hook that ends the process before its `moment`-th change to the disk; 0 for never.

    Args:
        below: counts only changes to paths that begin with this.
    """

    def __init__(self, moment: int, below: str = ""):
        self._left = moment
        self._below = below

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and bool((arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if (writes or event in _CHANGES) and str(arguments[0]).startswith(self._below):
            self._left -= 1
            if self._left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
