"""What the command reports while it runs."""

from typing import Protocol

from lora_one.report import Report


class Progress(Protocol):
    """The listener that `finetune` and `initialize_only` tell how far the job is.

    Write one to show the job in a notebook, a log file or an experiment tracker: any class with these methods will do,
    and a method may do nothing. The terminal of `lora-one finetune` is one. Methods are called from the thread that
    runs the job, and an exception in one of them ends it.

    >>> class Losses:
    ...     def __init__(self):
    ...         self.losses = []
    ...     def step(self, step, loss):
    ...         self.losses.append(loss)
    ...     def __getattr__(self, name):  # all other methods do nothing
    ...         return lambda *values: None
    >>> progress = Losses()
    >>> progress.step(1, 0.5)
    >>> progress.say("Training")
    >>> progress.losses
    [0.5]
    """

    def say(self, text: str) -> None:
        """Report that a part of the job begins."""

    def part(self, done: int, total: int) -> None:
        """Report how much of the part is done: of its batches, examples or test items."""

    def warn(self, text: str) -> None:
        """Report something that the user should know, though the job continues."""

    def report(self, report: Report) -> None:
        """Report that the initialisation is done."""

    def training(self, steps: int) -> None:
        """Report that the training begins."""

    def step(self, step: int, loss: float) -> None:
        """Report that a training step is done."""

    def validation(self, when: str, loss: float) -> None:
        """Report the mean loss on held-out data; `when` is "before" or "after" the training, or "at step 20"."""

    def score(self, when: str, exact_match: float, count: int) -> None:
        """Report the exact match on `count` test items; `when` is "before" or "after" the training."""

    def benchmark(self, task: str, metric: str, value: float) -> None:
        """Report a benchmark's metric, measured after the training."""
