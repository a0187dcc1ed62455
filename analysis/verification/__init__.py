"""Verifies an output: every file that a commit record names, and that the folders have each sample once."""
