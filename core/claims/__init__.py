"""Leases on dataset shards."""
