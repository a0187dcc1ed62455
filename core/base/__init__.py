"""Shared by every part of the project: errors, redaction, JSON with a checksum, dtypes, fault points."""
