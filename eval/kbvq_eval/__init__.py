"""Evaluation of quantized models: perplexity, divergence from a baseline, and lm-eval tasks."""
