"""LoRA on Flax NNX modules."""
