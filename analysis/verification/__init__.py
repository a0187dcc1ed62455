"""Checks an output: every file that a commit record names, and that the folders hold each sample once."""
