"""LoRA on a PyTorch model: which layers, what is there already, and how it was before."""
