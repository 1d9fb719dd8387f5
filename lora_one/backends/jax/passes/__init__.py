"""The passes of a JAX model over its batches."""
