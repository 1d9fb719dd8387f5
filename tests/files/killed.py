"""Run fine-tuning in separate processes that are killed, as by a scheduler, at a moment that the test chooses."""

import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any

from lora_one.finetune.job import finetune
from lora_one.finetune.recipe import make_recipe
from tests.files.kills import Killer
from tests.finetune.tuners.test_all import Diary

# Each process is forked from one that has the imports behind it, and no threads yet.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "tests.files.killed",
        "transformers.trainer",
        "transformers.models.llama.modeling_llama",
        "peft.tuners.lora",
        *(f"lora_one.finetune.tuners.{backend}" for backend in ("torch", "jax", "mlx")),
    ]
)


def run(settings: dict[str, Any], step: int = 0, change: int = 0) -> dict[str, Any] | None:
    """Fine-tune in a new process.

    Args:
        step: SIGKILL once this step is reported; 0 for no kill.
        change: SIGKILL before this change to the disk, counted from the first checkpoint on; 0 for no kill.

    Returns:
        The results of the run; None if it was killed.
    """
    results = Path(settings["out"]).with_suffix(".json")
    results.unlink(missing_ok=True)
    process = _CONTEXT.Process(target=_run, args=(settings, results, step, change))
    process.start()
    process.join(600)
    if process.exitcode is None:
        process.kill()
        raise AssertionError("the run hangs")
    assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
    return json.loads(results.read_text()) if process.exitcode == 0 else None


def _run(settings: dict[str, Any], results: Path, step: int, change: int) -> None:
    if settings["backend"] == "torch":
        import torch

        torch.set_num_threads(1)
    sys.addaudithook(Killer(change, below=str(Path(settings["out"]) / "checkpoints")))
    diary = _Diary(step)
    outcome = finetune(make_recipe(settings), diary)
    report = None if outcome.report is None else outcome.report.to_dict()
    values = {
        "losses": outcome.losses,
        "told": diary.losses,
        "validations": diary.validations,
        "scores": diary.scores,
        "start": report and [report["layers"], report["base_loss"]],
        "resumed": outcome.resumed,
        "warnings": diary.warnings,
    }
    results.write_text(json.dumps(values))


class _Diary(Diary):
    def __init__(self, last: int):
        super().__init__()
        self._last = last

    def step(self, step: int, loss: float) -> None:
        super().step(step, loss)
        if step == self._last:
            os.kill(os.getpid(), signal.SIGKILL)
