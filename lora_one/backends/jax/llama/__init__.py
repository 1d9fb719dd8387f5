"""A compact decoder in Flax NNX for Llama checkpoints, since Flax has none of its own."""
