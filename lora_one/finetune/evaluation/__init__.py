"""Scores of a fine-tuned model: its answers to test items, lm-eval's benchmarks, and visual ones."""
