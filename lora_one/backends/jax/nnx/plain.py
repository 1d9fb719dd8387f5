"""LoRA's usual start, for comparison: A random, B zero."""

import jax.numpy as jnp
from flax import nnx

from lora_one.backends.jax.ops import JaxOps
from lora_one.config import Config
from lora_one.core.factors import plain_factors
from lora_one.core.omega import draw_omega

from .binding import NnxBinding


def attach_plain(model: nnx.Module, config: Config) -> nnx.Module:
    """Attach LoRA to an NNX model, in place, with its usual start; A is drawn by `config.seed`, layer by layer."""
    ops, like = JaxOps(), jnp.zeros((), jnp.float32)
    binding = NnxBinding(model, config)
    for name, site in binding.sites.items():
        pairs = []
        for layer in site.layers():
            omega = ops.asarray(draw_omega(config.seed, layer.name, layer.in_features, layer.rank), like)
            pairs.append(plain_factors(ops, omega, layer.rank, layer.out_features))
        binding.write(name, site.trained(pairs))
    binding.finish()
    return model
