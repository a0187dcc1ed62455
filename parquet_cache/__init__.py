"""The hidden states of a dataset's texts as Parquet files, a row a text: what `prepare.py` does."""
