"""Whole models agree: one set of weights and batches in transformers, Flax and mlx-lm, from the logits to fifty steps.

    python -m benchmarks.agreement

`record` runs one framework, `compare` and `reference` say what must be equal and how nearly. tests/test_whole_models.py
asserts the same numbers.
"""
