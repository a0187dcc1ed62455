"""Shard files: what is written of a window, in which format."""
