"""The price of a run: --plan, and the TPU laboratory."""
