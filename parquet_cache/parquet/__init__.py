"""The Parquet files: labels by pyarrow, hidden states by pages of our own."""
