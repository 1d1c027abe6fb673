"""Packed caches, attention over them, and where mlx-lm is led to both."""
