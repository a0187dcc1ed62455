"""Causal grouped-query attention over packed rows, in an implementation for each platform."""

from qwen2_jax.attention.dispatch import attention, kernel_tiles

__all__ = ["attention", "kernel_tiles"]
