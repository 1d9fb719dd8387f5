"""LoRA on a PyTorch model: which layers get it, what the model has already, and how to make it what it was."""
