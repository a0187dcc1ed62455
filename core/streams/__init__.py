"""Streams and sharded datasets: JSON Lines files of samples, read and written."""
