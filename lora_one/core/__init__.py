"""The algorithm: gradient -> SVD -> factors -> preconditioned step.

The functions here are pure functions of arrays. They take `ops`, the array interface of `lora_one.core.ops`, as first
argument; none imports a framework or holds state. All of them run under `jax.jit`, with one exception: for a large
gradient, `krylov` and `exact` look at values to decide when to stop.
"""
