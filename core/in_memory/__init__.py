"""Activations in memory: what a run computes, with nothing written."""
