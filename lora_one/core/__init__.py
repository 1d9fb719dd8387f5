"""The algorithm: gradient -> SVD -> factors -> preconditioned step.

Pure functions on arrays. Each takes `ops`, the abstract array interface of `lora_one.core.ops`, first; none imports a
framework, holds state, or looks at a value to decide what to do, so all of them run under `jax.jit`.
"""
