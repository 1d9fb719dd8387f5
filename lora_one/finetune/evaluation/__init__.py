"""Answers of a fine-tuned model, scored: exact match, lm-eval's benchmarks, and visual ones."""
