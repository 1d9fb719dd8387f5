"""A plugin of axolotl that starts its LoRA by LoRA-One when training begins.

In axolotl's YAML, with this file's folder on PYTHONPATH:

plugins:
  - lora_one_axolotl.LoraOnePlugin
lora_one: # may be left out: samples, and the settings of lora_one.Config
  samples: 64
  gradient: exact
"""

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, field_validator

from lora_one import Config
from lora_one.integrations.transformers import LoraOneCallback

KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")


class LoraOneArgs(BaseModel):
    """The key that the plugin adds to axolotl's configuration."""

    lora_one: dict[str, Any] | None = None

    @field_validator("lora_one")
    @classmethod
    def _has_settings_that_exist(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        _settings(value)
        return value


class LoraOnePlugin(BasePlugin):
    """Start LoRA from the first rows of the training, by axolotl's own data loader and loss."""

    def get_input_args(self) -> str:
        return f"{__name__}.LoraOneArgs"

    def register(self, cfg: Any) -> None:
        """Turn off the fused kernels, which axolotl turns on by itself: they pass by the LoRA layers."""
        if asked := [name for name in KERNELS if cfg.get(name)]:
            raise ValueError(f"lora_one needs LoRA's own layers, got {', '.join(asked)}: true; leave them out")
        for name in KERNELS:
            cfg[name] = False

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[LoraOneCallback]:
        samples, config = _settings(cfg.lora_one)
        return [LoraOneCallback(trainer, config, samples)]


def _settings(given: dict[str, Any] | None) -> tuple[int, Config]:
    settings = dict(given or {})
    return settings.pop("samples", 64), Config(**settings)
