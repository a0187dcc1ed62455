"""How far a fleet is, from its output alone."""
