"""Fleets of TPU VMs: compares what exists with what is wanted and changes the difference. Standard library only."""
