"""LoRA on parameters in a pytree: Flax Linen modules and pure functions."""
