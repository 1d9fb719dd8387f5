"""Llama-family checkpoints of Hugging Face into the NNX decoder."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from safetensors import SafetensorError, safe_open

from lora_one.errors import CheckpointError, ConfigError

from .config import read_llama_config
from .model import LlamaForCausalLM

_INDEX = "model.safetensors.index.json"


def load_llama(folder: str | Path, dtype: Any = jnp.float32) -> LlamaForCausalLM:
    """A causal language model from a local folder: Llama, Mistral, Qwen2 or Qwen3.

    Args:
        folder: config.json, and model.safetensors in one file or in several with their index.
        dtype: of the weights.

    Raises:
        ModelError: a model of another kind.
        CheckpointError: everything that is wrong with the weights, at once.
        ConfigError: float64 while JAX has x64 off.
    """
    folder = Path(folder)
    if jnp.dtype(dtype) == jnp.float64 and not jax.config.read("jax_enable_x64"):
        raise ConfigError("dtype float64 needs JAX's x64, which is off: jax.config.update('jax_enable_x64', True)")
    config = read_llama_config(folder)
    # Shapes alone: no random weights are ever made.
    graphdef, state = nnx.split(nnx.eval_shape(lambda: LlamaForCausalLM(config, nnx.Rngs(0), dtype)))
    wanted = {_hf_name(path): (tuple(path), variable) for path, variable in nnx.to_flat_state(state)}
    found, problems = {}, []
    for file in _weight_files(folder):
        try:
            with safe_open(file, framework="flax") as tensors:
                for name in tensors.keys():  # noqa: SIM118  (not a mapping)
                    if name not in wanted:
                        if not _redundant(name, config.tie_word_embeddings):
                            problems.append(f"{name}: the model has no such weight")
                        continue
                    path, variable = wanted[name]
                    value = tensors.get_tensor(name)
                    value = value.T if path[-1] == "kernel" else value
                    if value.shape != variable.shape:
                        problems.append(f"{name}: must be {variable.shape} as {path[-1]}, got {value.shape}")
                    found[path] = variable.replace(jnp.asarray(value, dtype))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from error
    problems += [f"{name}: missing" for name, (path, _) in wanted.items() if path not in found]
    if problems:
        raise CheckpointError(f"the weights in {folder} do not fit its config.json", problems)
    return nnx.merge(graphdef, nnx.from_flat_state(list(found.items())))


def _hf_name(path: tuple[Any, ...]) -> str:
    renamed = {"kernel": "weight", "embedding": "weight"}
    return ".".join(renamed.get(str(part), str(part)) for part in path)


def _weight_files(folder: Path) -> list[Path]:
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    try:
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8-sig"))
        return [folder / name for name in sorted(set(index["weight_map"].values()))]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder} must hold model.safetensors, or its parts and {_INDEX}: {error}") from error


def _redundant(name: str, tied: bool) -> bool:
    return name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight")
