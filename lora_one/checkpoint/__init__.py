"""Adapters on disk, without a framework: PEFT's layout and mlx-lm's, and `lora_one.json` beside them."""
