"""Fleets on paper and in simulation."""
