"""The plugin for ms-swift, against the interface as ms-swift 4.6.0 has it. Its README says what was run in ms-swift.

Read there: swift/optimizers/base.py (OptimizerCallback), swift/optimizers/mapping.py, swift/callbacks/mapping.py, and
swift/trainers/mixin.py, which makes both before the Trainer's own __init__ and asks the first one for its optimizer.
"""

import runpy
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from transformers import Trainer

from lora_one.backends.torch import LoraOneAdamW
from lora_one.integrations.transformers import LoraOneCallback, optimizer
from tests.integrations.trainers import Recorder, Recording, adapted, arguments, factors, rows

PLUGIN = Path(__file__).parents[2] / "adapters" / "ms_swift" / "lora_one_swift.py"


class OptimizerCallback:
    """ms-swift's class: what makes the optimizer, in the place of the Trainer."""

    def __init__(self, args, trainer):
        self.args, self.trainer = args, trainer

    def create_optimizer(self, model=None):
        return Trainer.create_optimizer(self.trainer, **({} if model is None else {"model": model}))


@pytest.fixture
def swift(monkeypatch) -> tuple[dict, dict]:
    """Run the plugin as --external_plugins does, and return ms-swift's two maps."""
    maps = {}, {"default": OptimizerCallback}
    for name, names in {
        "swift": {},
        "swift.callbacks": {"callbacks_map": maps[0]},
        "swift.optimizers": {"OptimizerCallback": OptimizerCallback, "optimizers_map": maps[1]},
    }.items():
        module = ModuleType(name)
        vars(module).update(names)
        monkeypatch.setitem(sys.modules, name, module)
    runpy.run_path(str(PLUGIN))
    return maps


class SwiftTrainer(Recording):
    def __init__(self, maps, model, args, callbacks=(), optimizer="default", **settings):
        callbacks_map, optimizers_map = maps
        self.optimizer_callback = optimizers_map[optimizer](args, self)
        made = [callbacks_map[name](args, self) for name in callbacks]
        super().__init__(model, args, callbacks=made, **settings)

    def create_optimizer(self, model=None):
        self.optimizer = self.optimizer_callback.create_optimizer(model=model)
        return self.optimizer


def recorded(trainer: Trainer, *callbacks) -> dict[str, np.ndarray]:
    for callback in [*callbacks, recorder := Recorder()]:
        trainer.add_callback(callback)
    trainer.train()
    return recorder.factors


def test_callbacks_lora_one_starts_the_model_when_training_begins(swift, tmp_path):
    settings = {"args": arguments(tmp_path, max_steps=1), "train_dataset": rows()}
    got = recorded(SwiftTrainer(swift, adapted(), callbacks=["lora_one"], **settings))
    plain = Trainer(adapted(), **settings)
    expected = recorded(plain, LoraOneCallback(plain))
    assert got.keys() == expected.keys() and len(got) > 0
    for name, x in expected.items():
        np.testing.assert_array_equal(got[name], x)
        assert np.abs(x).max() > 1e-3


def test_optimizer_lora_one_makes_the_start_of_the_first_steps_and_trains(swift, tmp_path):
    settings = {"args": arguments(tmp_path, max_steps=18, weight_decay=0.1), "train_dataset": rows()}
    run = SwiftTrainer(swift, adapted(), optimizer="lora_one", **settings)
    began = recorded(run)
    assert isinstance(run.optimizer.optimizer, LoraOneAdamW)  # within accelerate's
    assert all(np.abs(x).max() == 0 for name, x in began.items() if name.endswith("lora_B"))
    chosen = optimizer(settings["args"], start_steps="auto")
    expected = Trainer(adapted(), **settings, optimizer_cls_and_kwargs=chosen)
    expected.train()
    got = factors(run.model)
    for name, x in factors(expected.model).items():
        np.testing.assert_array_equal(got[name], x)
        assert np.abs(x - began[name]).max() > 1e-3
