"""transformers' Trainer with our checkpoints: it writes and reads their files, we see to it that they are whole."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback

from lora_one.backends.torch.files.folder import load
from lora_one.errors import CheckpointError
from lora_one.files.staging import staging
from lora_one.finetune.runs import Checkpoints


def train_with_checkpoints(trainer: Trainer, checkpoints: Checkpoints) -> None:
    """Train from the checkpoint to go on from, or from the beginning, and write those that are due.

    Raises:
        CheckpointError: one cannot be written.
    """
    start = checkpoints.start
    if start is not None and start.step >= trainer.args.max_steps:
        load(trainer.model, start.path, trainable=True)  # with no step left to do, a Trainer makes one more
        return
    source = None if start is None else str(start.path)
    if checkpoints.every is None:
        trainer.train(resume_from_checkpoint=source)
        return
    saving = _Saving(checkpoints)
    trainer.add_callback(saving)
    try:
        checkpoints.folder.mkdir(parents=True, exist_ok=True)
        with staging(checkpoints.folder) as scratch:
            trainer.args.output_dir = str(scratch)
            trainer.train(resume_from_checkpoint=source)
    except (OSError, RuntimeError, SafetensorError) as error:  # a RuntimeError is what torch.save has for a full disk
        if not saving.now:
            raise
        raise CheckpointError(
            f"a checkpoint in {checkpoints.folder} cannot be written: {error}; those before it are as they were. Make "
            "room, and go on with resume"
        ) from error


class _Saving(TrainerCallback):
    """Asks the Trainer for its files where a checkpoint is due, and makes one of them."""

    def __init__(self, checkpoints: Checkpoints):
        self._checkpoints = checkpoints
        self.now = False  # whether the Trainer is writing

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = self.now = self._checkpoints.due(state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.now = False
        written = Path(args.output_dir) / f"checkpoint-{state.global_step}"

        def fill(folder: Path) -> None:
            for file in written.iterdir():
                file.rename(folder / file.name)
            written.rmdir()

        self._checkpoints.write(state.global_step, fill)
