"""Parts of a pass over the batches of an MLX model."""
