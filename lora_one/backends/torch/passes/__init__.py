"""Everything that a pass over the batches needs from a PyTorch model."""
