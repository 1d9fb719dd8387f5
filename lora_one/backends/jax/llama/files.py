"""Read Llama-family checkpoints of Hugging Face into the NNX decoder."""

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
    """Read a causal language model from a local folder: Llama, Mistral, Qwen2 or Qwen3.

    Use it to fine-tune a model of Hugging Face with Flax. The decoder is compact: it computes whole sequences and has
    no key-value cache. Adapters saved from it have PEFT's names, so that PEFT and vLLM open them.

    Args:
        folder: holds config.json, and model.safetensors in one file or in several with their index.
        dtype: dtype of the weights, float32 by default.

    Returns:
        The model: tokens, (rows, length), -> logits, (rows, length, vocabulary).

    Raises:
        ModelError: a model of another family.
        CheckpointError: everything that is wrong with the weights, in one error.
        ConfigError: float64 while JAX has x64 off.

    Example:
        >>> import jax.numpy as jnp
        >>> from lora_one.backends.jax import load_llama
        >>> from lora_one.demo import MODEL
        >>> model = load_llama(MODEL)
        >>> logits = model(jnp.array([[1, 2, 3]]))
        >>> logits.shape[:2], logits.shape[2] == model.config.vocab_size
        ((1, 3), True)
    """
    folder = Path(folder)
    if jnp.dtype(dtype) == jnp.float64 and not jax.config.read("jax_enable_x64"):
        raise ConfigError("dtype float64 needs JAX's x64, which is off: jax.config.update('jax_enable_x64', True)")
    config = read_llama_config(folder)
    # eval_shape makes no random weights.
    graphdef, state = nnx.split(nnx.eval_shape(lambda: LlamaForCausalLM(config, nnx.Rngs(0), dtype)))
    expected = {_hf_name(path): (tuple(path), variable) for path, variable in nnx.to_flat_state(state)}
    weights, problems = {}, []
    for file in _weight_files(folder):
        try:
            with safe_open(file, framework="flax") as tensors:
                for name in tensors.keys():  # noqa: SIM118  (not a mapping)
                    if name not in expected:
                        if not _redundant(name, config.tie_word_embeddings):
                            problems.append(f"{name}: the model has no such weight")
                        continue
                    path, variable = expected[name]
                    value = tensors.get_tensor(name)
                    value = value.T if path[-1] == "kernel" else value
                    if value.shape != variable.shape:
                        problems.append(f"{name}: must be {variable.shape} as {path[-1]}, got {value.shape}")
                    weights[path] = variable.replace(jnp.asarray(value, dtype))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from error
    problems += [f"{name}: missing" for name, (path, _) in expected.items() if path not in weights]
    if problems:
        raise CheckpointError(f"the weights in {folder} do not fit its config.json", problems)
    return nnx.merge(graphdef, nnx.from_flat_state(list(weights.items())))


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
    """Return whether some checkpoints hold a tensor that the model does not need."""
    return name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight")
