"""The command lines of `analyze_activations.py` that run passes: flags in, one call out."""
