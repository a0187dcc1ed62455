"""Analyses of committed shards: verification, the fidelity certificate and fleet status."""
