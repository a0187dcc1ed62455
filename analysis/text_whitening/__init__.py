"""From texts to a dataset of whitened activations, in chunks: docs/whitening_texts.md."""
