"""Activations in memory: what a run computes, with nothing written."""

from core.in_memory.capture import capture
from core.in_memory.capturer import Activations, Capturer, load_capturer
from core.in_memory.given_samples import Sample

__all__ = ["Activations", "Capturer", "Sample", "capture", "load_capturer"]
