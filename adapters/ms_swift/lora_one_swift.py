"""LoRA-One in ms-swift: `swift sft --external_plugins adapters/ms_swift/lora_one_swift.py`, with one of

--callbacks lora_one    # starts LoRA when training begins, from the first rows; any optimizer of ms-swift trains it
--optimizer lora_one    # lora_one.optimizer: makes the start of the first 6 to 16 steps, and is AdamW from then on
"""

from typing import Any

from swift.callbacks import callbacks_map
from swift.optimizers import OptimizerCallback, optimizers_map

from lora_one.integrations.transformers import LoraOneCallback, optimizer


class LoraOneStart(LoraOneCallback):
    """The callback in the form that ms-swift makes one."""

    def __init__(self, args: Any, trainer: Any):
        super().__init__(trainer)


class LoraOneOptimizer(OptimizerCallback):
    """The Trainer's own way to an optimizer, with lora_one's in the place of AdamW."""

    def create_optimizer(self, model: Any = None) -> Any:
        self.trainer.optimizer_cls_and_kwargs = optimizer(self.args, start_steps="auto")
        return super().create_optimizer(model)


callbacks_map["lora_one"] = LoraOneStart
optimizers_map["lora_one"] = LoraOneOptimizer
