"""The algorithm: gradient -> SVD -> factors -> preconditioned step.

Pure functions on arrays. Each takes `ops`, the abstract array interface of `lora_one.core.ops`, first; none imports a
framework or holds state, and none but those of `krylov` looks at a value to decide what to do, so all others run under
`jax.jit`.
"""
