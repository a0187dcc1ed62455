"""Fleets of TPU VMs: what gcloud says exists is compared with what is wanted, and made so. Standard library only."""
