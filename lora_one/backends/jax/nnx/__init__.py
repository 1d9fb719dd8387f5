"""LoRA in Flax NNX modules."""
