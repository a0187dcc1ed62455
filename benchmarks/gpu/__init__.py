"""The step on a GPU, against its peak, its copies and transformers."""
