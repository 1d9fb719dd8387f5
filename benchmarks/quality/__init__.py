"""Fine-tuning quality: who learns what, how fast, at which learning rate."""
