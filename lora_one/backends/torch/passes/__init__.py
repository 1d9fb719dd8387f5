"""What a pass over a PyTorch model takes."""
