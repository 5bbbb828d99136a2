"""Packed experts inside transformers."""
