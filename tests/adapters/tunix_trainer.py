"""A stand-in for `tunix.sft.peft_trainer` with the interface that tunix 0.1.5 and 0.1.7 state in their source.

tunix itself brings TensorFlow's data sets and numba along, and its newest version other versions of safetensors than
transformers. Where it is installed, the tests run it instead.
"""

import importlib.util
import sys
from dataclasses import dataclass
from types import ModuleType

from flax import nnx


@dataclass
class TrainingConfig:
    eval_every_n_steps: int
    max_steps: int | None = None


class PeftTrainer:
    """Trains the LoRAParams of a model by an optax transformation. Each batch goes to the loss as keywords."""

    def __init__(self, model, optimizer, training_config):
        assert any(isinstance(value, nnx.LoRAParam) for _, value in nnx.iter_graph(model))
        self.model, self.config = model, training_config
        self.optimizer = nnx.Optimizer(model, optimizer, wrt=nnx.LoRAParam)
        self.gen_model_input_fn = lambda batch: batch

    def with_loss_fn(self, loss_fn):
        self.loss_fn = loss_fn
        return self

    def _train_step(self, model, optimizer, batch):
        gradient = nnx.value_and_grad(self.loss_fn, argnums=nnx.DiffState(0, nnx.LoRAParam))
        loss, gradients = gradient(model, **self.gen_model_input_fn(batch))
        optimizer.update(model, gradients)
        return loss

    def train(self, train_ds):
        step = nnx.jit(self._train_step, donate_argnames=("optimizer",))
        for number, batch in enumerate(train_ds):
            if number == self.config.max_steps:
                break
            step(self.model, self.optimizer, batch)


def use_stand_in(monkeypatch) -> None:
    """Put the stand-in where scripts import tunix from, unless it is installed."""
    if importlib.util.find_spec("tunix") is not None:
        return
    for name in ("tunix", "tunix.sft"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "tunix.sft.peft_trainer", sys.modules[__name__])
