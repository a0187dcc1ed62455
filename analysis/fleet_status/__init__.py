"""The status of a fleet, from its output alone."""
