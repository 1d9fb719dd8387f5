"""What a pass over an MLX model takes."""
