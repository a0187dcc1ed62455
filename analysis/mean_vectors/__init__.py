"""Mean activation vectors: a pooled vector of each text, their mean, its standard error (docs/mean_vectors.md)."""
