"""What a pass over a JAX model takes."""
