"""Rows of a dataset: filtered, tokenized, kept on the disk, and put in order."""
