"""Training with transformers' Trainer, which writes and reads its own files, and with checkpoints made of them."""

from pathlib import Path

from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_one.backends.torch.files.folder import load
from lora_one.errors import CheckpointError
from lora_one.files.staging import staging
from lora_one.finetune.checkpoints import Checkpoints


def train_with_checkpoints(trainer: Trainer, checkpoints: Checkpoints) -> None:
    """Train from the checkpoint to continue from, or from the beginning, and write the checkpoints that are due.

    Raises:
        CheckpointError: a checkpoint cannot be written.
    """
    start = checkpoints.start
    if start is not None and start.step >= trainer.args.max_steps:
        load(trainer.model, start.path, trainable=True)  # with no step left, a Trainer would make one more
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
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save raises a RuntimeError on a full disk
        if not saving.in_progress:
            raise
        raise CheckpointError(
            f"a checkpoint in {checkpoints.folder} cannot be written: {error}; those before it are as they were. Make "
            "room, and go on with resume"
        ) from error


class _Saving(TrainerCallback):
    """A callback that asks the Trainer for its files when a checkpoint is due, and makes a checkpoint of them."""

    def __init__(self, checkpoints: Checkpoints):
        self._checkpoints = checkpoints
        self.in_progress = False  # the Trainer is writing its files

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        control.should_save = self.in_progress = self._checkpoints.due(state.global_step)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        if control.should_training_stop:  # perhaps early: the callback before this one has decided it
            control.should_save = self.in_progress = self._checkpoints.due(state.global_step, stop=True)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        self.in_progress = False
        written = Path(args.output_dir) / f"checkpoint-{state.global_step}"

        def fill(folder: Path) -> None:
            for file in written.iterdir():
                file.rename(folder / file.name)
            written.rmdir()

        self._checkpoints.write(state.global_step, fill)
