"""What a run will cost: --plan, and the TPU laboratory."""
