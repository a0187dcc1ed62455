"""What is computed from committed shards."""
