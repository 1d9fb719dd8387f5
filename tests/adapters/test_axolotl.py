"""The plugin for axolotl, against the interface as axolotl 0.19.0 has it. Its README says what was run in axolotl.

Read there: axolotl/integrations/base.py (BasePlugin, PluginManager), axolotl/cli/config.py (`register` before the
settings are checked), axolotl/integrations/config.py (the class that `get_input_args` names becomes a base of the
settings'), axolotl/core/builders/causal.py (`add_callbacks_post_trainer` when the trainer is made).
"""

import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pydantic
import pytest

from lora_one.errors import ConfigError
from lora_one.integrations.transformers import LoraOneCallback
from tests.integrations.trainers import EXACT, SAMPLES, Recorder, Recording, adapted, arguments, rows

FOLDER = Path(__file__).parents[2] / "adapters" / "axolotl"


class BasePlugin:
    """The hooks of axolotl's class that the plugin has."""

    def get_input_args(self):
        """Return the dotted name of a pydantic model."""

    def register(self, cfg):
        """Get the settings as they are in the YAML, before they are checked."""

    def add_callbacks_post_trainer(self, cfg, trainer):
        return []


@pytest.fixture
def plugin(monkeypatch):
    base = ModuleType("axolotl.integrations.base")
    base.BasePlugin = BasePlugin
    for name, module in (("axolotl", ModuleType("axolotl")), ("axolotl.integrations", ModuleType("integrations"))):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, base.__name__, base)
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delitem(sys.modules, "lora_one_axolotl", raising=False)
    yield importlib.import_module("lora_one_axolotl").LoraOnePlugin()
    sys.modules.pop("lora_one_axolotl", None)


def checked(plugin: BasePlugin, settings: dict) -> SimpleNamespace:
    """Return settings after axolotl's way with them."""
    plugin.register(settings)
    module, name = plugin.get_input_args().rsplit(".", 1)
    fields = getattr(importlib.import_module(module), name)(**settings)
    return SimpleNamespace(**{**settings, **fields.model_dump()})


def started(out: Path, callbacks) -> dict[str, np.ndarray]:
    trainer = Recording(adapted(), arguments(out, max_steps=1), train_dataset=rows())
    for callback in [*callbacks(trainer), recorder := Recorder()]:
        trainer.add_callback(callback)
    trainer.train()
    return recorder.factors


def test_it_starts_the_model_as_the_callback_does(plugin, tmp_path):
    cfg = checked(plugin, {"adapter": "lora", "lora_one": {"samples": SAMPLES, "gradient": "exact"}})
    got = started(tmp_path, lambda trainer: plugin.add_callbacks_post_trainer(cfg, trainer))
    expected = started(tmp_path, lambda trainer: [LoraOneCallback(trainer, EXACT, SAMPLES)])
    assert got.keys() == expected.keys() and len(got) > 0
    for name, x in expected.items():
        np.testing.assert_array_equal(got[name], x)
        assert np.abs(x).max() > 1e-3


def test_the_key_may_be_left_out(plugin, tmp_path):
    cfg = checked(plugin, {"adapter": "lora"})
    assert cfg.lora_one is None
    got = started(tmp_path, lambda trainer: plugin.add_callbacks_post_trainer(cfg, trainer))
    expected = started(tmp_path, lambda trainer: [LoraOneCallback(trainer)])
    for name, x in expected.items():
        np.testing.assert_array_equal(got[name], x)


def test_fused_kernels_are_off_and_refused_if_asked_for(plugin):
    cfg = checked(plugin, {"adapter": "lora"})
    assert (cfg.lora_mlp_kernel, cfg.lora_qkv_kernel, cfg.lora_o_kernel, cfg.lora_embedding_kernel) == (False,) * 4
    with pytest.raises(ValueError, match="LoRA's own layers, got lora_qkv_kernel: true"):
        plugin.register({"lora_qkv_kernel": True, "lora_o_kernel": False})


@pytest.mark.parametrize("settings", [{"gamma": -1}, {"gradient": "best"}])
def test_invalid_settings_are_refused_before_anything_is_loaded(plugin, settings):
    with pytest.raises((ConfigError, pydantic.ValidationError), match=next(iter(settings))):
        checked(plugin, {"lora_one": settings})
